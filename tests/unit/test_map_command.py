"""`aivillage-node map`: what it reads, how it sends it, and what it says of the end."""

from __future__ import annotations

import io
import json

import pytest

from aivillage.cli import map as command
from aivillage.node.map_store import REDUCE_LINE
from aivillage.node.reduction import reduce_request
from aivillage.protocols.codec import FRAME_BYTES_MAX, frame
from aivillage.protocols.errors import RequestError
from aivillage.protocols.messages import Ask, OperationInfo


def test_blank_lines_are_left_out_and_counted():
    assert list(command._lines(io.StringIO("{}\n\n  \n[]"))) == [(1, "{}\n"), (4, "[]")]


def test_a_line_is_sent_at_the_limit_and_only_named_above_it():
    longest = "x" * command.LINE_BYTES_MAX
    assert list(command._lines(io.StringIO(longest))) == [(1, longest)]
    assert list(command._lines(io.StringIO(longest + "x"))) == [(1, None)]
    assert list(command._lines(io.StringIO("ü" * (command.LINE_BYTES_MAX // 2 + 1)))) == [(1, None)]


@pytest.mark.parametrize("length", [1, 1000, command.BATCH_BYTES, command.LINE_BYTES_MAX])
def test_batches_hold_every_line_in_order_and_fit_a_frame(length):
    lines = [(number, '"' * length) for number in range(1, 600 if length < 1001 else 6)]
    batches = list(command._batches(iter(lines)))
    assert [line for batch in batches for line in batch] == lines
    for batch in batches:
        assert len(batch) <= command.BATCH_LINES
        ask = Ask(id=1, what="map_add", args={"map": "0" * 32, "lines": batch})
        assert len(frame(ask)) <= FRAME_BYTES_MAX


@pytest.mark.parametrize("name", ["not there", "binary"])
def test_a_file_that_cannot_be_read_is_told_with_its_name(tmp_path, name):
    (tmp_path / "binary").write_bytes(b"\xff\xfe{}")
    path = str(tmp_path / name)
    with pytest.raises(RequestError, match=name), command._reading(path) as file:
        list(command._lines(file))


def test_standard_input_that_is_no_text_is_told(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    with pytest.raises(RequestError, match="no UTF-8"), command._reading("-") as file:
        list(command._lines(file))


@pytest.mark.parametrize(
    ("done", "reduced", "whole"),
    [
        (2, None, True),
        (1, None, False),
        (2, {"line": REDUCE_LINE, "result": 1}, True),
        (2, {"line": REDUCE_LINE, "error": "TOO_LARGE"}, False),
    ],
)
def test_a_map_is_whole_when_every_line_and_the_reduction_have_a_result(done, reduced, whole):
    assert command._is_whole({"done": done, "total": 2, "reduced": reduced}) is whole


# ------------------------------------------------------------------ reducing


def _operation(kind):
    fields = {"what": {"type": kind}}
    schema = {"$ref": "#/$defs/R", "$defs": {"R": {"properties": fields}}}
    return OperationInfo(name="test.reduce", positional="what", request_schema=schema)


def test_results_are_given_as_a_list_or_as_a_text_of_one_json_value_a_line():
    import msgspec

    found = [{"a": 1}, "b"]
    assert msgspec.msgpack.decode(reduce_request(_operation("array"), found)) == {"what": found}
    text = msgspec.msgpack.decode(reduce_request(_operation("string"), found))["what"]
    assert [json.loads(line) for line in text.splitlines()] == found


def test_an_operation_that_takes_neither_reduces_nothing():
    with pytest.raises(RequestError, match="takes no list"):
        reduce_request(_operation("integer"), [])
