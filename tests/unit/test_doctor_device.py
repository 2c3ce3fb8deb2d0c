"""What the doctor says of the device is so, with and without one."""

import pytest

from aivillage.cli.doctor_device import told
from aivillage.models import gpu
from aivillage.node.config import Settings

NO_DRIVER = "there is no /dev/nvidiactl: no NVIDIA GPU, or not its driver"


def engines(*devices):
    return {"engines": [{"device": device} for device in devices]}


@pytest.mark.parametrize(
    ("device", "engine", "why_none", "status", "level", "about"),
    [
        ("auto", "auto", NO_DRIVER, None, "ok", "compute on the CPU (there is no /dev/nvidiactl"),
        ("cpu", "auto", NO_DRIVER, None, "ok", "compute on the CPU (as set)"),
        ("cpu", "auto", "", None, "ok", "a GPU seems to be here: device = auto tries it"),
        ("auto", "openvino", "", None, "ok", "(as engine = openvino does)"),
        ("cuda", "auto", NO_DRIVER, None, "FAIL", "device = cuda, and there is no"),
        ("cuda", "openvino", "", None, "FAIL", "openvino computes on the CPU"),
        ("auto", "auto", "", None, "ok", "no model is loaded yet"),
        ("cuda:1", "auto", "", engines("cuda:1"), "ok", "compute on cuda:1"),
        ("auto", "auto", "", engines("cpu"), "warn", "a model is loaded on the CPU"),
        ("auto", "auto", "", engines("cpu", "cuda:0"), "warn", "a model is loaded on the CPU"),
    ],
)
def test_the_device_is_told_as_it_is(monkeypatch, device, engine, why_none, status, level, about):
    monkeypatch.setattr(gpu, "why_none", lambda: why_none)
    found = told(Settings(device=device, engine=engine), status)
    assert (found[0], about in found[2]) == (level, True), found
    assert bool(found[3]) == (level != "ok")


def test_a_running_nodes_own_settings_count(monkeypatch):
    monkeypatch.setattr(gpu, "why_none", lambda: NO_DRIVER)
    status = engines() | {"wanted": {"engine": "auto", "device": "cuda:2"}}
    assert told(Settings(), status)[:1] == ("FAIL",)
    assert "device = cuda:2" in told(Settings(), status)[2]
    assert told(Settings(device="cuda"), engines() | {"wanted": {"device": "cpu"}})[0] == "ok"
