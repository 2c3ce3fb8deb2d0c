"""Fenced workers that an engine on a GPU would have, with or without one here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from aivillage.models import gpu
from aivillage.models import worker_messages as say
from aivillage.models.inference import catalogue
from aivillage.models.inference.generate import GenerateRequest
from aivillage.node.engines import load_engine
from aivillage.node.worker_process import WorkerLimits, start_worker
from aivillage.node.workers import WorkerSettings, open_workers
from aivillage.protocols.codec import pack
from aivillage.protocols.errors import AivillageError, ConfigError

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch", reason="the extra `models` is not installed")
try:
    catalogue.weights_path(catalogue.known(catalogue.DEFAULT))
except AivillageError as error:
    pytest.skip(str(error), allow_module_level=True)
HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="no GPU that torch can use is here")
needs_none = pytest.mark.skipif(HAS_GPU, reason="there is a GPU here")
MEMORY_BYTES = 3 << 30
AS_LIBCUDA = """
import json, os, socket, sys, threading
from aivillage.models import sandbox
from aivillage.models.file_fence import fence_files

def fails(do):
    try:
        do()
    except OSError as error:
        return error.errno
    return 0

def named():
    path = f"/proc/self/task/{threading.get_native_id()}/comm"
    os.close(os.open(path, os.O_RDWR))  # as glibc does
    with open(path, "w") as comm:
        comm.write("cuda-EvtHandlr")

def listens():
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as own:
        own.bind(f"\\0cuda-uvmfd-test-{os.getpid()}")
        own.listen()

def calls():
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.connect(sys.argv[2])

on_gpu = sys.argv[1] == "gpu"
no_fence = fence_files(readable=[], writable=[os.getcwd()], on_gpu=on_gpu)
no_filter = sandbox.deny_network(on_gpu=on_gpu)
found = {}
def thread():
    found["named"] = fails(named)
one = threading.Thread(target=thread)
one.start()
one.join()
found |= {
    "listens": fails(listens),
    "calls": fails(calls),
    "internet": fails(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)),
    "processes": fails(lambda: open("/proc/1/comm", "w")),
    "clock": fails(lambda: open("/proc/sys/vm/overcommit_memory", "w")),
}
print(json.dumps([no_fence, no_filter, found]))
"""
"""What libcuda is known to do as it starts, and what nobody may, under the fences of a worker."""
EPERM, EACCES = 1, 13


def data_limit(pid: int) -> str:
    limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    (line,) = [line for line in limits if line.startswith("Max data size")]
    return line.split()[3]


def variables(pid: int) -> set[str]:
    found = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return {line.partition("=")[0] for line in found if line}


async def test_only_a_worker_on_a_gpu_has_no_limit_of_data(tmp_path):
    limits = WorkerLimits(memory_bytes_max=MEMORY_BYTES)
    async with trio.open_nursery() as nursery:
        plain = await start_worker(nursery, limits, tmp_path)
        on_gpu = await start_worker(nursery, limits, tmp_path, on_gpu=True)
        assert data_limit(plain.pid) == str(MEMORY_BYTES)
        assert data_limit(on_gpu.pid) == str((1 << 63) - 1)
        assert variables(on_gpu.pid) - variables(plain.pid) >= {"CUBLAS_WORKSPACE_CONFIG"}
        assert (on_gpu.fences.sandboxed, on_gpu.fences.fenced) == (
            plain.fences.sandboxed, plain.fences.fenced,
        )  # fmt: skip
        await plain.stop()
        await on_gpu.stop()
        nursery.cancel_scope.cancel()


def tried(folder, fences):
    done = subprocess.run(
        [sys.executable, "-c", AS_LIBCUDA, fences, str(folder / "nobody")],
        cwd=folder, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    no_fence, no_filter, found = json.loads(done.stdout)
    if no_fence or no_filter:
        pytest.skip(f"{no_fence} {no_filter}")
    return found


def test_what_libcuda_does_as_it_starts_passes_the_fences_of_an_engine_on_a_gpu(tmp_path):
    """As others traced it: its own threads' names, and an abstract socket that nobody calls."""
    found = tried(tmp_path, "gpu")
    assert (found.pop("named"), found.pop("listens")) == (0, 0)
    assert set(found.values()) <= {EPERM, EACCES}, found


def test_no_other_worker_can_do_that(tmp_path):
    found = tried(tmp_path, "plain")
    assert len(found) == 6
    assert set(found.values()) <= {EPERM, EACCES}, found


@needs_none
@pytest.mark.parametrize("part", ["whole", "stage"])
async def test_a_gpu_that_is_wanted_and_not_there_is_an_error_and_the_worker_ends(tmp_path, part):
    model = catalogue.known(catalogue.DEFAULT)
    load = say.Load(
        model=model.name, slots=1, part=part, layers=(0, 2), weights_sha256=model.sha256,
        device=gpu.Device("cuda"),
    )  # fmt: skip
    async with trio.open_nursery() as nursery:
        worker = await start_worker(nursery, WorkerLimits(), tmp_path, on_gpu=True)
        with pytest.raises(ConfigError, match="no engine can compute on a GPU here") as caught:
            await load_engine(nursery, worker, load)
        assert "device = cpu" in caught.value.next_step
        assert worker.dead
        nursery.cancel_scope.cancel()


@needs_none
async def test_a_node_whose_owner_wants_a_gpu_does_not_quietly_use_the_cpu(tmp_path):
    settings = WorkerSettings(device="cuda")
    where = {"cache_folder": tmp_path / "c", "scratch_folder": tmp_path / "s"}
    async with open_workers(settings, **where) as workers:
        with pytest.raises(ConfigError, match="on a GPU here"):
            await workers.engine("inference.generate")
        assert not workers.engines()


async def test_a_loaded_model_says_what_computes_it(tmp_path):
    where = {"cache_folder": tmp_path / "c", "scratch_folder": tmp_path / "s"}
    settings = WorkerSettings(engine="torch", device="auto")
    async with open_workers(settings, **where) as workers:
        await workers.engine("inference.generate")
        [shown] = workers.engines()
    assert shown["device"] == ("cuda:0" if HAS_GPU and not gpu.why_none() else "cpu")


@needs_gpu
async def test_an_engine_on_a_gpu_answers_in_its_fenced_worker(tmp_path):
    where = {"cache_folder": tmp_path / "c", "scratch_folder": tmp_path / "s"}
    async with open_workers(WorkerSettings(engine="torch", device="cuda"), **where) as workers:
        engine = await workers.engine("inference.generate")
        info = engine.info
        assert (info.device, info.identical, info.rechecks) == ("cuda:0", "best effort", False)
        assert "bfloat16/cuda/sm" in info.kernel_class
        request = GenerateRequest(prompt="What is the capital of France?", max_tokens=16)
        async with engine.open_session(pack(request)) as session:
            session.allow(1_000)
            text = "".join([frame.text async for frame in session])
        assert "Paris" in text
        assert workers.fences is not None
        assert workers.fences.sandboxed
