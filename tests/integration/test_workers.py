"""Workers as the daemon uses them: real processes, a real model, modules that misbehave."""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest
import trio

from aivillage.models.inference import catalogue
from aivillage.models.inference.generate import GenerateRequest, GenerateResult
from aivillage.models.mesh.noop import NoopResult
from aivillage.node.worker_process import WorkerLimits
from aivillage.node.workers import WorkerSettings, open_workers
from aivillage.protocols.errors import AivillageError, JobError, RefusedError, RequestError
from aivillage.protocols.ports import PartEvent, ResultEvent

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parents[2] / "examples" / "wordcount"

try:
    catalogue.weights_path(catalogue.known(catalogue.DEFAULT))
    MISSING = ""
except AivillageError as error:
    MISSING = str(error)
HAS_LANDLOCK = sys.platform == "linux" and ctypes.CDLL(None).syscall(444, None, 0, 1) > 0
needs_model = pytest.mark.skipif(bool(MISSING), reason=MISSING or "present")


def pack(**fields):
    return msgspec.msgpack.encode(fields)


async def no_call(operation, request, budget):
    raise AssertionError("no sub-job was expected")


def opened(folder, *enabled, **settings):
    return open_workers(
        WorkerSettings(enabled=enabled, **settings),
        cache_folder=folder / "cache",
        scratch_folder=folder / "scratch",
    )


async def ran(workers, operation, request, on_call=no_call, **context):
    """All events of a run."""
    async with workers.run(operation, request, on_call=on_call, **context) as run:
        return [event async for event in run]


async def rogue_says(workers, do, on_call=no_call, **context):
    events = await ran(workers, "test.rogue", pack(do=do, pid=os.getpid()), on_call, **context)
    return msgspec.msgpack.decode(events[-1].body)["said"]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Two third-party packages, as pip would have put them on the path."""

    def install(module, operation, source):
        site = tmp_path / "site"
        info = site / f"{module}-0.1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(source.read_text())
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 0.1.0\n")
        (info / "entry_points.txt").write_text(
            f"[aivillage.modules]\n{operation} = {module}:MODULE\n"
        )

    install("aivillage_wordcount", "text.count_words", EXAMPLE / "aivillage_wordcount.py")
    install("rogue_module", "test.rogue", Path(__file__).parent / "rogue_module.py")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("OWNERS_SECRET", "42")


# --------------------------------------------------------------------------- built-in modules


async def test_a_module_runs_and_passes_its_check(tmp_path):
    request = pack(note="hello", parts=2)
    async with opened(tmp_path) as workers:
        assert await workers.estimate("mesh.noop", request) == ({"calls": 1, "parts": 2}, 0.001)
        events = await ran(workers, "mesh.noop", request)
        assert [type(e) for e in events if not hasattr(e, "done")] == [
            PartEvent,
            PartEvent,
            ResultEvent,
        ]
        body = events[-1].body
        assert await workers.meter("mesh.noop", request, body) == {"calls": 1, "parts": 2}
        assert (await workers.check("mesh.noop", request, body)).ok
        lie = msgspec.msgpack.encode(NoopResult(note="bye", parts=2))
        assert not (await workers.check("mesh.noop", request, lie)).ok
        assert not (await workers.check("mesh.noop", request, b"\xc1")).ok


async def test_operations_carry_schemas_terms_and_stability(tmp_path):
    async with opened(tmp_path) as workers:
        infos = {info.name: info for info in workers.operations()}
        noop = infos["mesh.noop"]
        assert noop.terms.prices_micro_credits == {"calls": 10, "parts": 10}
        assert "note" in noop.request_schema["$defs"]["NoopRequest"]["properties"]
        assert (noop.stability, noop.enabled) == ("stable", True)
        with pytest.raises(RequestError, match="UNKNOWN_OPERATION"):
            workers.describe("no.such")
        assert workers.module("mesh.noop").name == "mesh.noop"


async def test_a_bad_request_is_typed_and_leaves_the_worker_usable(tmp_path):
    async with opened(tmp_path) as workers:
        with pytest.raises(RequestError, match="BAD_REQUEST"):
            await ran(workers, "mesh.noop", pack(parts=-1))
        assert len(await ran(workers, "mesh.noop", pack())) == 1
        assert len(list((tmp_path / "scratch").iterdir())) == 1


async def test_leaving_a_run_cancels_it_and_keeps_the_worker(tmp_path):
    async with opened(tmp_path) as workers:
        with trio.fail_after(10):
            async with workers.run("mesh.noop", pack(sleep_seconds=60, parts=60), on_call=no_call):
                pass
            with trio.move_on_after(1.5):
                await ran(workers, "mesh.noop", pack(sleep_seconds=60))
            assert len(await ran(workers, "mesh.noop", pack())) == 1
        assert len(list((tmp_path / "scratch").iterdir())) == 1


async def test_a_run_goes_on_from_delivered_parts(tmp_path):
    async with opened(tmp_path) as workers:
        events = await ran(workers, "mesh.noop", pack(parts=3), delivered=(b"\x00", b"\x01"))
        assert [e.body for e in events if isinstance(e, PartEvent)] == [b"\x02"]


async def test_a_run_beyond_its_deadline_ends_with_a_code(tmp_path):
    async with opened(tmp_path) as workers:
        with pytest.raises(JobError) as caught:
            await ran(workers, "mesh.noop", pack(sleep_seconds=60), deadline_seconds=0.3)
        assert caught.value.code == "DEADLINE"
        assert len(await ran(workers, "mesh.noop", pack())) == 1


async def test_idle_workers_end(tmp_path):
    async with opened(tmp_path, idle_exit_seconds=0.2) as workers:
        await ran(workers, "mesh.noop", pack())
        with trio.fail_after(5):
            while list((tmp_path / "scratch").iterdir()):
                await trio.sleep(0.05)
        assert len(await ran(workers, "mesh.noop", pack())) == 1


async def test_runs_that_hold_all_workers_do_not_delay_a_verdict(tmp_path):
    request = pack(note="x")
    result = msgspec.msgpack.encode(NoopResult(note="x"))
    async with opened(tmp_path) as workers, trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(
                lambda: ran(workers, "mesh.noop", pack(sleep_seconds=60), deadline_seconds=1e300)
            )
        await trio.sleep(2)
        with trio.fail_after(15):
            assert (await workers.check("mesh.noop", request, result)).ok
        nursery.cancel_scope.cancel()


async def test_runs_beyond_the_pool_wait_their_turn(tmp_path):
    done = []

    async def one(workers, number):
        await ran(workers, "mesh.noop", pack(sleep_seconds=0.05))
        done.append(number)

    async with opened(tmp_path, module_workers_max=1) as workers:
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(one, workers, number)
        assert sorted(done) == [0, 1, 2, 3]
        assert len(list((tmp_path / "scratch").iterdir())) == 1


# --------------------------------------------------------------------------- third-party modules


async def test_the_example_module_is_described_priced_run_and_checked(tmp_path, installed):
    request = pack(text="one two three")
    async with opened(tmp_path, "text.count_words") as workers:
        info = workers.describe("text.count_words")
        assert info.title == "Count the words of a text"
        assert info.stability == "experimental"
        assert workers.module("text.count_words") is None
        assert (await workers.estimate("text.count_words", request))[0] == {"characters": 13}
        body = (await ran(workers, "text.count_words", request))[-1].body
        assert msgspec.msgpack.decode(body) == {"words": 3}
        assert await workers.meter("text.count_words", request, body) == {"characters": 13}
        assert (await workers.check("text.count_words", request, body)).ok
        assert not (await workers.check("text.count_words", request, pack(words=4))).ok
    assert "aivillage_wordcount" not in sys.modules


async def test_a_module_that_nobody_enabled_does_not_run(tmp_path, installed):
    async with opened(tmp_path) as workers:
        with pytest.raises(RequestError) as caught:
            await ran(workers, "text.count_words", pack(text="x"))
        assert caught.value.code == "NOT_ENABLED"
        listed = {info.name: info.enabled for info in workers.operations()}
        assert listed["text.count_words"] is False


async def test_without_a_fence_a_stranger_runs_in_development_only(tmp_path, installed):
    unfenced = msgspec.structs.replace(WorkerSettings().limits, sandbox=False)
    async with opened(tmp_path, "test.rogue", limits=unfenced) as workers:
        with pytest.raises(RequestError, match="NOT_ENABLED"):
            await rogue_says(workers, "nothing")
    async with opened(tmp_path, "test.rogue", limits=unfenced, dev_mode=True) as workers:
        assert await rogue_says(workers, "nothing") == "nothing"


@pytest.mark.skipif(sys.platform != "linux", reason="affinity")
async def test_a_worker_keeps_to_the_owners_cores_and_steps_back(tmp_path):
    fewer = msgspec.structs.replace(WorkerSettings().limits, cores=1, nice=17)
    async with opened(tmp_path, limits=fewer) as workers:
        await ran(workers, "mesh.noop", pack(note="x"))
        pid = next(iter(workers._pool._idle.values()))[0].pid
        assert os.sched_getaffinity(pid) == {max(os.sched_getaffinity(0))}
        assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, os.nice(0) + 17)


async def test_a_worker_reaches_neither_network_nor_its_daemon(tmp_path, installed):
    async with opened(tmp_path, "test.rogue") as workers:
        outcome = json.loads(await rogue_says(workers, "reach_out"))
        assert workers.fences.sandboxed
    assert set(outcome.values()) == {"PermissionError"}
    assert len(outcome) == 8


@pytest.mark.skipif(not HAS_LANDLOCK, reason="this kernel has no Landlock")
async def test_a_worker_touches_no_file_of_the_owners(tmp_path, installed):
    (tmp_path / "identity.key").write_text("secret")
    async with opened(tmp_path, "test.rogue") as workers:
        outcome = json.loads(await rogue_says(workers, "open_files"))
    assert outcome == dict.fromkeys(("read", "list", "write", "memory"), "PermissionError")
    assert (tmp_path / "identity.key").read_text() == "secret"


async def test_a_worker_sees_no_variable_of_the_owners(tmp_path, installed):
    async with opened(tmp_path, "test.rogue") as workers:
        seen = json.loads(await rogue_says(workers, "environment"))
    assert "OWNERS_SECRET" not in seen
    assert seen["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("do", "why"),
    [
        ("die", "going down"),
        ("raise_", "ZeroDivisionError: no such number"),
        ("flood", "more than"),
        ("garbage", "no reply|announced"),
        ("huge", "does not fit"),
        ("eat", "MemoryError"),
    ],
)
async def test_what_a_rogue_does_is_a_typed_failure_of_its_job_only(tmp_path, installed, do, why):
    async with opened(tmp_path, "test.rogue") as workers:
        with trio.fail_after(20), pytest.raises(AivillageError, match=why) as caught:
            await rogue_says(workers, do)
        assert caught.value.code in {"JOB_FAILED", "INTERNAL"}
        assert await rogue_says(workers, "nothing") == "nothing"


async def test_a_rogue_that_does_not_heed_a_cancel_is_killed(tmp_path, installed):
    async with opened(tmp_path, "test.rogue") as workers:
        with trio.fail_after(30):
            with trio.move_on_after(1):
                await rogue_says(workers, "spin")
            assert await rogue_says(workers, "nothing") == "nothing"


async def test_what_a_module_prints_stays_out_of_the_pipe(tmp_path, installed):
    async with opened(tmp_path, "test.rogue") as workers:
        assert await rogue_says(workers, "prints") == ""


async def test_a_module_has_its_own_scratch_folder_and_it_goes_with_it(tmp_path, installed):
    async with opened(tmp_path, "test.rogue") as workers:
        assert await rogue_says(workers, "mark_scratch") == "True"
    assert list((tmp_path / "scratch").iterdir()) == []


async def test_a_sub_job_goes_to_the_daemon_and_its_answer_comes_back(tmp_path, installed):
    asked = []

    async def answer(operation, request, budget):
        asked.append((operation, budget))
        if len(asked) == 2:
            raise RefusedError("not today", code="NO_PEER")
        return b"done"

    async with opened(tmp_path, "test.rogue") as workers:
        assert await rogue_says(workers, "ask_mesh", answer) == "done"
        assert await rogue_says(workers, "ask_mesh", answer) == "refused NO_PEER"
    assert asked == [("mesh.noop", 50)] * 2


# --------------------------------------------------------------------------- engines


async def answer_of(engine, request, delivered=()):
    ids, text, finished, read_bytes = list(delivered), "", "", 0
    async with engine.open_session(msgspec.msgpack.encode(request), delivered) as session:
        session.allow(10**6)
        async for frame in session:
            ids += frame.token_ids
            text += frame.text
            finished, read_bytes = frame.finished, frame.read_bytes
    return GenerateResult(
        text=text, token_ids=tuple(ids), finish_reason=finished, prompt_bytes=read_bytes
    )


@needs_model
async def test_sessions_share_one_engine_and_survive_their_neighbours(tmp_path):
    request = GenerateRequest(prompt="What is the capital of France?", max_tokens=16)
    results = []

    async def one(engine, prompt):
        results.append(await answer_of(engine, msgspec.structs.replace(request, prompt=prompt)))

    async with opened(tmp_path) as workers:
        engine = await workers.engine("inference.generate")
        assert engine is await workers.engine(catalogue.DEFAULT)
        assert engine.info.identical == "guaranteed"
        alone = await answer_of(engine, request)
        assert alone.text == "The capital of France is Paris."
        body = msgspec.msgpack.encode(alone)
        assert (await workers.check("inference.generate", pack(**fields(request)), body)).ok
        async with trio.open_nursery() as nursery:
            for prompt in (request.prompt, "Name a colour.", request.prompt):
                nursery.start_soon(one, engine, prompt)
        assert sum(result == alone for result in results) == 2
        # A slot is free again at once when its session is left, at whatever point.
        for _ in range(engine.slots + 1):
            async with engine.open_session(msgspec.msgpack.encode(request)) as session:
                session.allow(3)
                await session.__anext__()
        assert engine.session_count == 0
        half = alone.token_ids[:3]
        assert (await answer_of(engine, request, half)).token_ids == alone.token_ids
        with pytest.raises(RequestError, match="BAD_REQUEST"):
            await answer_of(engine, GenerateRequest(prompt="x", model="other"))
        await the_worker_dies(workers, engine, request)


async def test_a_module_that_hoards_memory_fails_and_nobody_else(tmp_path, installed):
    limits = WorkerLimits(memory_bytes_max=512 << 20)
    async with opened(tmp_path, "test.rogue", dev_mode=True, limits=limits) as workers:
        with pytest.raises(JobError) as caught:
            await rogue_says(workers, "hoard")
        assert caught.value.code == "JOB_FAILED"
        assert await rogue_says(workers, "nothing") == "nothing"
        assert len(await ran(workers, "mesh.noop", pack())) == 1


@needs_model
async def test_an_engine_that_runs_out_of_memory_is_an_error_and_the_node_goes_on(tmp_path):
    """Its worker may have less than the model takes, which the catalogue does not know."""
    limits = WorkerLimits(memory_bytes_max=500 << 20)
    async with opened(tmp_path, limits=limits) as workers:
        with pytest.raises(RefusedError) as refused:
            await workers.engine(catalogue.DEFAULT)
        assert refused.value.code == "OWNER_LIMIT", "it is not even tried"
        model = workers.shelf.find(catalogue.DEFAULT)
        lie = msgspec.structs.replace(model, memory_bytes=400_000_000, context_bytes=0)
        workers.shelf._models[catalogue.DEFAULT] = lie
        for _ in range(2):
            with pytest.raises(JobError) as caught:
                await workers.engine(catalogue.DEFAULT)
            assert caught.value.code == "JOB_FAILED"
        assert not workers.engines()
        assert len(await ran(workers, "mesh.noop", pack())) == 1


@needs_model
async def test_an_engine_has_as_many_slots_as_its_memory_holds_full_contexts(tmp_path):
    known = catalogue.MODELS[catalogue.DEFAULT]
    three = known.memory_bytes + 2 * known.context_bytes
    request = pack(prompt="Say a word.", max_tokens=2)
    async with opened(tmp_path, models_memory_bytes_max=three - 1) as workers:
        assert workers.places_of(f"model:{catalogue.DEFAULT}") == 2
    async with opened(tmp_path, models_memory_bytes_max=three) as workers:
        assert workers.places_of(f"model:{catalogue.DEFAULT}") == 3
        engine = await workers.engine(catalogue.DEFAULT)
        [shown] = workers.engines()
        assert (shown["slots"], shown["memory_bytes_max"]) == (3, three)
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(3):
                await stack.enter_async_context(engine.open_session(request))
            with pytest.raises(RefusedError) as caught:
                await stack.enter_async_context(engine.open_session(request))
        assert caught.value.code == "BUSY"


async def the_worker_dies(workers, engine, request):
    """Its sessions fail with a code; the next call has a new engine."""
    async with engine.open_session(msgspec.msgpack.encode(request)) as session:
        session.allow(10**6)
        await session.__anext__()
        os.kill(engine.pid, signal.SIGKILL)
        with trio.fail_after(5), pytest.raises(JobError) as caught:
            async for _ in session:
                pass
    assert caught.value.code == "JOB_FAILED"
    with pytest.raises(JobError):
        async with engine.open_session(b""):
            pass
    again = await workers.engine("inference.generate")
    assert (await answer_of(again, request)).text == "The capital of France is Paris."


def fields(request):
    return {name: getattr(request, name) for name in ("prompt", "max_tokens")}


async def test_an_unknown_model_is_refused_before_a_worker_starts(tmp_path):
    async with opened(tmp_path) as workers:
        with pytest.raises(RefusedError, match="NOT_OFFERED"):
            await workers.engine("no-such-model")
        assert list((tmp_path / "scratch").iterdir()) == []


# --------------------------------------------------------------------------- the daemon's end


DAEMON = """
    import sys, trio
    from pathlib import Path
    import msgspec
    from aivillage.node.workers import WorkerSettings, open_workers

    async def main():
        folder = Path(sys.argv[1])
        async with open_workers(
            WorkerSettings(), cache_folder=folder / "c", scratch_folder=folder / "s"
        ) as workers:
            request = msgspec.msgpack.encode({"prompt": "hello"})
            await workers.estimate("inference.generate", request)
            await workers.check("inference.generate", request, b"")
            pid = next(iter(workers._short._idle.values()))[0].pid
            heavy = {"torch", "gguf", "tokenizers", "numpy"} & set(sys.modules)
            print(pid, sorted(heavy), flush=True)
            await trio.sleep_forever()

    trio.run(main)
"""


def test_workers_die_with_a_killed_daemon_that_never_imported_torch(tmp_path):
    code = textwrap.dedent(DAEMON)
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as daemon:
        try:
            pid, heavy = daemon.stdout.readline().split(maxsplit=1)
            assert heavy.strip() == "[]"
            os.kill(int(pid), 0)
        finally:
            daemon.kill()
    for _ in range(100):
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return
        trio.run(trio.sleep, 0.05)
    pytest.fail("the worker outlived its daemon")
