"""What engines compute on, or would: by settings, files, and what the running node loaded."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from aivillage.models import gpu
from aivillage.node.config import Settings

Told = tuple[Literal["ok", "warn", "FAIL"], str, str, str]
"""Level, what, detail and next step of a finding."""
WHAT: Final = "device"


def told(settings: Settings, status: dict[str, Any] | None) -> Told:
    """Whether torch can use a GPU shows only in a worker that loads a model.

    Where a node runs, its settings count: it may have been started with others.
    """
    settings = msgspec.structs.replace(settings, **(status or {}).get("wanted", {}))
    wish = f"device = {settings.device}"
    why_none = gpu.why_none()
    wanted = gpu.wanted(settings.device, settings.engine, why_none)
    if wanted == gpu.CPU:
        return "ok", WHAT, f"engines compute on the CPU ({_why_cpu(settings, why_none)})", ""
    if settings.engine == "openvino":
        step = "set engine = torch, or device = cpu"
        return "FAIL", WHAT, f"{wish}, and engine = openvino computes on the CPU", step
    if why_none and settings.device != gpu.AUTO:
        step = "install NVIDIA's driver and a build of torch for CUDA, or set device = cpu"
        return "FAIL", WHAT, f"{wish}, and {why_none}", step
    used = sorted({str(engine["device"]) for engine in (status or {}).get("engines", ())})
    if gpu.CPU in used:
        step = "look for gpu_left_out in the node's log, or set device = cpu"
        return "warn", WHAT, f"{wish}, and a model is loaded on the CPU", step
    where = f"loaded models compute on {', '.join(used)}" if used else "no model is loaded yet"
    return "ok", WHAT, f"{wish}: engines are tried on a GPU first; {where}", ""


def _why_cpu(settings: Settings, why_none: str) -> str:
    if settings.device == gpu.CPU:
        return "as set" if why_none else "as set; a GPU seems to be here: device = auto tries it"
    return why_none or "as engine = openvino does"
