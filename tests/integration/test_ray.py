"""Modules on a real Ray cluster: streamed, fenced, cancelled, killed, unreachable."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import trio

from aivillage.cli.doctor_ray import cluster
from aivillage.node.config import Settings
from aivillage.protocols.errors import ConfigError, JobError
from aivillage.protocols.ports import PartEvent
from tests.house import ROOT
from tests.integration.test_workers import installed, no_call, opened, pack, ran, rogue_says

__all__ = ["installed"]  # a fixture
NO_RAY = "" if importlib.util.find_spec("ray") else "ray is not installed: pip install -e '.[ray]'"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(bool(NO_RAY), reason=NO_RAY or "present"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where third-party packages will lie, on the cluster as well."""
    return tmp_path_factory.mktemp("cluster") / "site"


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    script = Path(__file__).with_name("ray_cluster.py")
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{site}",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    process = subprocess.Popen(
        [sys.executable, str(script), "2"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=environment, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        lines = iter(process.stdout.readline, "")
        yield next(line.split()[1] for line in lines if line.startswith("address "))
        process.stdin.close()


@pytest.fixture
def on_cluster(site: Path, tmp_path: Path, installed: None) -> None:
    """Third-party packages, here and there."""
    site.unlink(missing_ok=True)
    site.symlink_to(tmp_path / "site")


def far_workers() -> list[psutil.Process]:
    """The fenced workers on the cluster: children of Ray's."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "aivillage.models.worker" in (process.info["cmdline"] or ()):
            with contextlib.suppress(psutil.Error):  # one of the two is ending
                if "FencedWorker" in " ".join(process.parents()[0].cmdline()):
                    found.append(process)
    return found


async def gone() -> None:
    """Returns when the cluster has none of our workers left."""
    with trio.fail_after(20):
        while far_workers():
            await trio.sleep(0.1)


async def test_a_module_runs_on_the_cluster_and_its_parts_come_as_they_are_made(tmp_path, address):
    async with opened(tmp_path, ray_address=address) as workers:
        events = await ran(workers, "mesh.noop", pack(note="far", parts=3))
        assert [e.body for e in events if isinstance(e, PartEvent)] == [b"\x00", b"\x01", b"\x02"]
        seen = trio.Event()
        async with workers.run(
            "mesh.noop", pack(parts=4, sleep_seconds=8.0), on_call=no_call
        ) as run:
            with trio.fail_after(6):
                async for event in run:
                    if isinstance(event, PartEvent):
                        seen.set()
                        break
        assert seen.is_set()
        assert len(far_workers()) == 1
    await gone()


async def test_a_strangers_module_is_fenced_in_on_the_cluster_too(tmp_path, address, on_cluster):
    async with opened(tmp_path, "test.rogue", ray_address=address) as workers:
        ways = json.loads(await rogue_says(workers, "reach_out"))
        assert set(ways.values()) <= {"PermissionError"}, ways
        with pytest.raises(JobError, match="ZeroDivisionError"):
            await rogue_says(workers, "raise_")
        assert await rogue_says(workers, "nothing") == "nothing"
    await gone()


async def test_a_worker_that_dies_on_the_cluster_is_the_same_error_as_one_that_dies_here(
    tmp_path, address
):
    async with opened(tmp_path, ray_address=address) as workers:
        with trio.fail_after(30), pytest.raises(JobError, match="the worker is gone") as caught:
            async with workers.run("mesh.noop", pack(sleep_seconds=60), on_call=no_call) as run:
                far_workers()[0].send_signal(signal.SIGKILL)
                await anext(run)
        assert caught.value.code == "JOB_FAILED"
        assert len(await ran(workers, "mesh.noop", pack())) == 1
        with trio.fail_after(30), pytest.raises(JobError, match="the Ray cluster let it go"):
            async with workers.run("mesh.noop", pack(sleep_seconds=60), on_call=no_call) as run:
                far_workers()[0].parents()[0].send_signal(signal.SIGKILL)
                await anext(run)
    await gone()


async def test_a_run_that_is_left_is_cancelled_and_one_that_does_not_listen_is_killed(
    tmp_path, address, on_cluster
):
    async with opened(tmp_path, "test.rogue", ray_address=address) as workers:
        with trio.fail_after(10):
            async with workers.run("mesh.noop", pack(sleep_seconds=60), on_call=no_call):
                (kept,) = far_workers()
            assert len(await ran(workers, "mesh.noop", pack())) == 1
            assert far_workers() == [kept]
        with trio.fail_after(20):
            async with workers.run("test.rogue", pack(do="spin"), on_call=no_call):
                pass
            while len(far_workers()) > 1:
                await trio.sleep(0.1)
    await gone()


async def test_where_there_is_no_ray_a_run_says_so_and_what_to_do(tmp_path):
    async with opened(tmp_path, ray_address="127.0.0.1:1") as workers:
        with pytest.raises(ConfigError, match=r"no Ray cluster at '127\.0\.0\.1:1'") as caught:
            await ran(workers, "mesh.noop", pack())
        assert "executor to local" in caught.value.next_step
        assert (await workers.check("mesh.noop", pack(), pack())).ok  # short calls stay here


async def test_the_doctor_says_what_the_cluster_has(address):
    settings = Settings(executor="ray", ray_address=address)
    detail, next_step = await trio.to_thread.run_sync(cluster, settings)
    assert detail.startswith(f"{address}: Ray ")
    assert detail.endswith("1 machines, 2 processor cores")
    assert next_step == ""
