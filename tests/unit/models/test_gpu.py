"""What a worker on a GPU is let, and that nobody else is: rules as values, no GPU needed."""

import importlib.metadata

import pytest

from aivillage.models import file_fence, gpu, worker_start

READ, WRITE = file_fence._READ, file_fence._WRITE_FILE


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    """A folder like /dev of a machine with two GPUs and other things."""
    there = ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools")
    for name in (*there, "nvidia-modeset", "nvidia0x", "sda", "kmsg", "mem"):
        (tmp_path / name).touch()
    found = gpu.nodes(tmp_path)
    assert sorted(found) == sorted(str(tmp_path / name) for name in there)
    monkeypatch.setattr(gpu, "nodes", lambda: found)
    return found


def test_an_engine_on_a_gpu_has_what_every_worker_has_and_exactly_this_more(nodes):
    asked = {"readable": ["/library"], "writable": ["/scratch"]}
    without, having = file_fence.rules(**asked), file_fence.rules(**asked, on_gpu=True)
    assert having[: len(without)] == without
    use = file_fence._READ_FILE | WRITE | file_fence._DEVICE
    assert sorted(having[len(without) :]) == sorted(
        [
            *((path, READ) for path in gpu.READABLE),
            *((path, use) for path in nodes),
            ("/proc/self/task", WRITE | file_fence._TRUNCATE),
        ]
    )
    assert all(path.startswith("/proc/") for path in gpu.READABLE)


def test_every_other_worker_has_none_of_it(nodes):
    paths = {path for path, _ in file_fence.rules(readable=["/library"], writable=["/scratch"])}
    assert not paths & {*nodes, *gpu.READABLE, gpu.NAMED}
    assert not [path for path in paths if "nvidia" in path]


def test_every_other_workers_files_are_as_ever():
    """Before there was a GPU: this list, the system to read, four devices and scratch to use."""
    rules = dict(file_fence.rules(readable=["/library"], writable=["/scratch"]))
    used = {path for path, rights in rules.items() if rights != READ}
    assert used == {"/dev/null", "/dev/zero", "/dev/random", "/dev/urandom", "/scratch"}
    assert {"/usr", "/etc", "/proc/self", "/sys/devices", "/library"} <= set(rules) - used
    assert {path for path in rules if path.startswith("/proc")} == {
        "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat",
    }  # fmt: skip


def test_only_a_worker_on_a_gpu_hears_which_devices_its_owner_means(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("OWNERS_SECRET", "42")
    without = worker_start.environment(tmp_path, 1)
    having = worker_start.environment(tmp_path, 1, on_gpu=True)
    assert not [name for name in without if name.startswith(("CUDA", "CUBLAS"))]
    assert having == without | {
        "CUDA_VISIBLE_DEVICES": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }


def test_without_a_driver_or_with_a_cpu_build_there_is_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.13.0+cu128")
    assert "no NVIDIA GPU, or not its driver" in gpu.why_none(tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert not gpu.why_none(tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.13.0+cpu")
    assert "a build for the CPU" in gpu.why_none(tmp_path)


@pytest.mark.parametrize(
    ("setting", "engine", "why_none", "device"),
    [
        ("auto", "auto", "", "cuda"),
        ("auto", "torch", "", "cuda"),
        ("auto", "openvino", "", "cpu"),
        ("auto", "auto", "no driver", "cpu"),
        ("cuda", "auto", "no driver", "cuda"),
        ("cuda:1", "openvino", "", "cuda:1"),
        ("cpu", "torch", "", "cpu"),
    ],
)
def test_auto_tries_a_gpu_that_may_be_there_and_a_named_device_is_insisted_on(
    setting, engine, why_none, device
):
    assert gpu.wanted(setting, engine, why_none) == device
