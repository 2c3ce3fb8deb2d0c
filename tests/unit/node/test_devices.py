"""Who gets a worker on a GPU, and what follows where it does not work."""

import pytest
import trio

from aivillage.models import gpu
from aivillage.models import worker_messages as say
from aivillage.models.inference.catalogue import DEFAULT
from aivillage.models.inference.stages import StageRequest
from aivillage.node import config
from aivillage.node import workers as node_workers
from aivillage.node.config import Settings
from aivillage.node.daemon import worker_settings
from aivillage.node.devices import Devices, devices
from aivillage.node.workers import Workers, WorkerSettings
from aivillage.protocols.errors import ConfigError, JobError

LOAD = say.Load(model="m", slots=1)
NO_CUDA = ConfigError("no engine can compute on a GPU here")


class Attempts:
    """Loads on the CPU; on a GPU what is scripted."""

    def __init__(self, failure=None):
        self.failure, self.devices = failure, []

    async def __call__(self, load):
        await trio.lowlevel.checkpoint()
        self.devices.append(load.device.name)
        if load.device.is_gpu and self.failure:
            raise self.failure
        return load


@pytest.mark.parametrize("failure", [NO_CUDA, JobError("CUDA out of memory")])
async def test_auto_goes_on_on_the_cpu_where_the_gpu_fails(failure):
    attempts, where = Attempts(failure), devices("auto", "auto", 0, "")
    assert await where.loaded(LOAD, attempts) == LOAD
    assert attempts.devices == ["cuda", "cpu"]


async def test_a_device_that_was_named_is_never_quietly_the_cpu():
    attempts = Attempts(NO_CUDA)
    with pytest.raises(ConfigError, match="on a GPU"):
        await devices("cuda", "auto", 0, "no driver").loaded(LOAD, attempts)
    assert attempts.devices == ["cuda"]


async def test_a_gpu_that_works_is_used_with_its_limit():
    attempts = Attempts()
    loaded = await devices("cuda:1", "auto", 7, "").loaded(LOAD, attempts)
    assert loaded.device == gpu.Device("cuda:1", 7)


async def test_without_a_gpu_nothing_is_tried_on_one():
    attempts = Attempts()
    assert devices("auto", "auto", 0, "no driver") == devices("cpu", "torch", 9, "") == Devices()
    await Devices().loaded(LOAD, attempts)
    assert attempts.devices == ["cpu"]


def test_the_settings_say_so():
    found = worker_settings(Settings(device="cuda:1", gpu_memory_mb=3))
    assert (found.device, found.gpu_memory_bytes_max) == ("cuda:1", 3 << 20)
    assert (Settings().device, WorkerSettings().device) == (gpu.CPU, gpu.CPU)


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_a_device_can_be_named(tmp_path, name):
    assert config.load(tmp_path, {"device": name}, {})[0].device == name


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:123", "", "mps"])
def test_what_is_no_device_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="device"):
        config.load(tmp_path, {"device": name}, {})


@pytest.fixture
async def started(tmp_path, monkeypatch):
    """Workers of an owner who wants a GPU; what starts is told of and goes no further."""
    told = []

    async def start(_nursery, _limits, _scratch, *, place=None, on_gpu=False):
        await trio.lowlevel.checkpoint()
        told.append(on_gpu)
        raise JobError("far enough")

    monkeypatch.setattr(node_workers, "start_worker", start)
    async with trio.open_nursery() as nursery:
        found = Workers(nursery, WorkerSettings(device="cuda"), tmp_path)
        found.shelf.is_here = lambda _model: True
        found.told = told
        yield found


async def test_engines_and_stages_get_the_gpu(started):
    for load in (started.engine(DEFAULT), started.stage(StageRequest(first=0, last=2))):
        with pytest.raises(JobError, match="far enough"):
            await load
    assert started.told == [True, True]


@pytest.mark.parametrize("operation", ["text.of_a_stranger", "mesh.noop"])
async def test_a_module_never_gets_the_gpu_whoever_wrote_it(started, operation):
    for pool in (started._pool, started._short):
        with pytest.raises(JobError, match="far enough"):
            async with started._worker(pool, operation):
                pass
    with pytest.raises(JobError, match="far enough"):
        await started.driver(DEFAULT)
    assert started.told == [False, False, False]
