"""What a map may be at most, at the limit and one above it; and what is wrong is told."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager

import pytest
import trio

from aivillage.node import maps as maps_file
from aivillage.node.config import Settings
from aivillage.node.maps import Maps
from aivillage.protocols.errors import RefusedError, RequestError
from tests.integration.loopback_nodes import villagers

pytestmark = pytest.mark.slow


@asynccontextmanager
async def maps_of_ann(tmp_path):
    """The maps of a node that knows nobody: all tasks are done here."""
    async with villagers(tmp_path, "ann") as (ann,), trio.open_nursery() as nursery:
        buyer = ann.desk.buyer
        maps = Maps(settings=Settings(), trade=buyer._trade, buyer=buyer, nursery=nursery)
        await maps.resume()
        yield maps
        nursery.cancel_scope.cancel()


async def _new(maps, *lines, **more):
    made = await maps.on_new({"operation": "mesh.noop", **more})
    await maps.on_add({**made, "lines": list(enumerate(lines, 1))})
    return made


async def _done(maps, *lines):
    """The lines of a map at its end."""
    made = await _new(maps, *lines)
    await maps.on_start(made)
    with trio.fail_after(30):
        await maps.on_wait({**made, "seconds": 20})
    return (await maps.on_lines(made))["lines"]


async def test_a_map_has_ten_thousand_lines_and_not_one_more(tmp_path):
    async with maps_of_ann(tmp_path) as maps:
        made = await _new(maps, *["{}"] * (maps_file.LINES_MAX - 1))
        last = (maps_file.LINES_MAX, "{}")
        assert (await maps.on_add({**made, "lines": [last]}))["lines"] == maps_file.LINES_MAX
        with pytest.raises(RequestError, match="10,000") as refused:
            await maps.on_add({**made, "lines": [(maps_file.LINES_MAX + 1, "{}")]})
        assert refused.value.code == "TOO_LARGE"


async def test_the_number_of_tasks_at_once_has_a_limit(tmp_path):
    async with maps_of_ann(tmp_path) as maps:
        await _new(maps, parallel=maps_file.PARALLEL_MAX)
        for wrong in (maps_file.PARALLEL_MAX + 1, -1):
            with pytest.raises(RequestError, match="48"):
                await _new(maps, parallel=wrong)


async def test_four_maps_are_under_way_and_the_fifth_is_told_so(tmp_path):
    async with maps_of_ann(tmp_path) as maps:
        made = [await _new(maps, '{"sleep_seconds": 30}') for _ in range(maps_file.MAPS_MAX + 1)]
        for one in made[:-1]:
            await maps.on_start(one)
        with pytest.raises(RefusedError) as refused:
            await maps.on_start(made[-1])
        assert refused.value.code == "BUSY"
        with trio.fail_after(20):
            await maps.on_stop(made[0])
        assert (await maps.on_start(made[-1]))["state"] == "running"


def _request_of_size(size_bytes):
    """A JSON text whose request has that many bytes as msgpack."""
    frame = len(b"\x81\xa4note\xdb") + 4
    return json.dumps({"note": "x" * (size_bytes - frame)})


def test_a_request_that_no_call_can_carry_is_refused():
    assert len(maps_file._request_of(_request_of_size(maps_file.REQUEST_BYTES_MAX))) == (
        maps_file.REQUEST_BYTES_MAX
    )
    for text in (_request_of_size(maps_file.REQUEST_BYTES_MAX + 1), None):
        with pytest.raises(RequestError) as refused:
            maps_file._request_of(text)
        assert refused.value.code == "TOO_LARGE"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", '{"note": "\\ud800"}', '{"n": 99999999999999999999999}', "{" * 9999],
)
async def test_a_line_that_is_no_request_fails_alone(tmp_path, text):
    async with maps_of_ann(tmp_path) as maps:
        good, bad = await _done(maps, '{"note": "a"}', text)
        assert good["result"]["note"] == "a"
        assert bad["error"] == "BAD_REQUEST"


async def test_a_map_that_is_not_there_or_has_its_lines_is_told(tmp_path):
    async with maps_of_ann(tmp_path) as maps:
        for name in ("", "zz", "0" * 32):
            with pytest.raises(RequestError, match="no single map"):
                await maps.on_wait({"map": name})
        made = await _new(maps, "{}")
        await maps.on_start(made)
        with pytest.raises(RequestError, match="has its lines"):
            await maps.on_add({**made, "lines": [(2, "{}")]})


async def test_an_operation_that_is_not_there_or_reduces_nothing_is_told(tmp_path):
    async with maps_of_ann(tmp_path) as maps:
        for wrong in ({"operation": "no.such"}, {"operation": "mesh.noop", "reduce": "no.such"}):
            with pytest.raises(RequestError) as refused:
                await maps.on_new(wrong)
            assert refused.value.code == "UNKNOWN_OPERATION"


async def test_a_map_of_nothing_is_done_at_once(tmp_path):
    async with maps_of_ann(tmp_path) as maps:
        assert await _done(maps) == []


async def test_a_map_whose_asking_was_broken_off_is_forgotten_at_the_next_start(tmp_path):
    async with maps_of_ann(tmp_path) as maps:
        made = await _new(maps, "{}")
        await maps.resume()
        with pytest.raises(RequestError, match="no single map"):
            await maps.on_start(made)
