"""A worker that embeds and sends garbage, hangs, outgrows its memory or dies: a typed error of that
run, nothing that was delivered is lost, and the next run has a worker that gives the same bits."""

from __future__ import annotations

import os
import signal
from contextlib import asynccontextmanager
from typing import NamedTuple

import msgspec
import pytest
import trio

pytest.importorskip("torch")
pytest.importorskip("transformers")

from aivillage.models import worker_messages as say
from aivillage.models.inference import embed
from aivillage.models.inference.embed import EmbedRequest, EmbedResult, Encoded
from aivillage.models.library import inspection, pull, sources
from aivillage.models.library.store import Library
from aivillage.node.worker_process import WorkerLimits
from aivillage.node.workers import WorkerSettings, open_workers
from aivillage.protocols.errors import AivillageError, JobError
from aivillage.protocols.ports import PartEvent, ResultEvent
from tests.unit.models import tiny_encoders

pytestmark = pytest.mark.slow
WIDE = {"hidden_size": 512, "num_hidden_layers": 1}
"""A part is 32 KiB: two fill a pipe, so that a run which nobody reads on from is not over."""
DEEP = {"intermediate_size": 1 << 16, "max_position_embeddings": 1_026, "num_hidden_layers": 1}
LONG = "a " * 1_024
"""256 MiB of inner states of a deep one; its weights are 17."""
MEMORY_BYTES = 420 << 20
TEXTS = tuple(f"fox {n}" for n in range(embed.TEXTS_MAX))


class Village(NamedTuple):
    """What every test here has; `whole` is the undisturbed result of `TEXTS`."""

    folder: object
    library: str
    whole: EmbedResult


@pytest.fixture(scope="module")
def village(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fences")
    library = Library(folder / "models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pull.inspection, "look", inspection.facts_of)
        for name, sizes in {"wide": WIDE, "deep": DEEP}.items():
            (made := folder / name).mkdir()
            tiny_encoders.write(made, **sizes)
            source = sources.parse(f"file:{made}", None)
            pull.Pull(library, source, name="", bytes_max=1 << 30, progress=lambda *_: None).run()
    found = Village(folder, str(folder / "models"), EmbedResult(**_EMPTY))
    return found._replace(whole=trio.run(_whole, found))


_EMPTY = {"model": "", "weights_sha256": "", "kernel_class": "", "dimension": 0, "vectors": ()}


async def _whole(village):
    async with opened(village) as workers:
        return (await embedded(workers, TEXTS))[1]


@asynccontextmanager
async def opened(village, **limits):
    settings = WorkerSettings(limits=WorkerLimits(library=village.library, **limits))
    scratch = village.folder / "scratch"
    async with open_workers(
        settings, cache_folder=village.folder / "cache", scratch_folder=scratch
    ) as workers:
        yield workers
    assert list(scratch.iterdir()) == []


def begun(workers, texts, model="wide", **options):
    request = msgspec.msgpack.encode(EmbedRequest(text=texts, model=model))
    return workers.run("inference.embed", request, on_call=None, **options)


async def embedded(workers, texts, model="wide", **options):
    """(parts, result) of an undisturbed run."""
    parts = []
    async with begun(workers, texts, model, **options) as run:
        async for event in run:
            if isinstance(event, PartEvent):
                parts.append(event.body)
            elif isinstance(event, ResultEvent):
                return parts, msgspec.msgpack.decode(event.body, type=EmbedResult)
    raise AssertionError("a run ends with a result or an error")


async def disturbed(workers, disturb, **options):
    """(parts, error) of a run of `TEXTS` whose worker is dealt with after its first part."""
    parts = []
    async with begun(workers, TEXTS, **options) as run:
        with trio.fail_after(60), pytest.raises(AivillageError) as caught:
            async for event in run:
                if isinstance(event, PartEvent):
                    parts.append(event.body)
                    if len(parts) == 1:
                        disturb(run._worker)
    return parts, caught.value


async def require_nothing_lost(workers, village, parts):
    """Another run goes on from what was delivered, and the whole is what it would have been."""
    assert 1 <= len(parts) < len(TEXTS) / embed.PART_TEXTS
    had = sum(len(msgspec.msgpack.decode(part, type=Encoded).values) for part in parts)
    with trio.fail_after(60):
        rest, result = await embedded(workers, TEXTS, delivered=parts)
    assert result == village.whole
    gained = [v for part in rest for v in msgspec.msgpack.decode(part, type=Encoded).values]
    assert len(gained) == len(TEXTS) - had


def says(body):
    """As if the worker itself had written `body` between two replies: it stands still."""

    def disturb(worker):
        os.kill(worker.pid, signal.SIGSTOP)
        worker._received[:] = body  # half of its next reply may be here: that would go before

    return disturb


def killed(worker):
    os.kill(worker.pid, signal.SIGKILL)


def stopped(worker):
    os.kill(worker.pid, signal.SIGSTOP)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"\x00\x00\x00\x05hello" * 3, "no reply"),
        (b"\xff\xff\xff\xff", "announced"),
        (say.framed(say.Metered(id=1, usage={})), "said Metered"),
    ],
    ids=["no_reply", "announced", "out_of_turn"],
)
async def test_garbage_of_a_worker_is_a_typed_error(village, body, why):
    async with opened(village) as workers:
        parts, error = await disturbed(workers, says(body))
        assert (type(error), error.code) == (JobError, "JOB_FAILED")
        assert why in error.message
        await require_nothing_lost(workers, village, parts)


async def test_a_worker_that_hangs_is_ended_at_the_deadline(village):
    async with opened(village) as workers:
        await embedded(workers, TEXTS[:1])  # the deadline is not for loading
        parts, error = await disturbed(workers, stopped, deadline_seconds=5)
        assert (type(error), error.code) == (JobError, "DEADLINE")
        await require_nothing_lost(workers, village, parts)


async def test_a_worker_that_hangs_is_ended_when_its_run_is_left(village):
    async with opened(village) as workers:
        async with begun(workers, TEXTS) as run:
            while not isinstance(event := await anext(run), PartEvent):
                pass
            stopped(run._worker)
        await require_nothing_lost(workers, village, [event.body])


async def test_a_text_that_needs_more_than_a_worker_may_have_fails_alone(village):
    async with opened(village, memory_bytes_max=MEMORY_BYTES) as workers:
        before = await embedded(workers, TEXTS[:1], "deep")
        with trio.fail_after(60), pytest.raises(JobError) as caught:
            await embedded(workers, (LONG,), "deep")
        assert caught.value.code == "JOB_FAILED"
        assert await embedded(workers, TEXTS[:1], "deep") == before
    async with opened(village) as workers:
        assert len((await embedded(workers, (LONG,), "deep"))[1].vectors) == 1, "else it is right"


async def test_a_killed_worker_is_a_typed_error_and_the_next_one_goes_on(village):
    async with opened(village) as workers:
        parts, error = await disturbed(workers, killed)
        assert (type(error), error.code) == (JobError, "JOB_FAILED")
        assert "the worker is gone" in error.message
        await require_nothing_lost(workers, village, parts)
