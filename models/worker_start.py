"""How a worker process is started, by a daemon or by whoever stands in for it on a cluster."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

import aivillage

_THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_KEPT_VARIABLES: Final = (
    "PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "ATEN_CPU_CAPABILITY",
)  # fmt: skip
"""The last one is torch's: an owner may say which instructions it is to use."""
_GPU_VARIABLES: Final = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
"""Which devices there are, and which is `cuda:0`, as the owner's other programs have it."""


def command() -> list[str]:
    """It ends with this very process, and with the thread that starts it."""
    return [sys.executable, "-m", "aivillage.models.worker", str(os.getpid())]


def environment(scratch: Path, threads: int, *, on_gpu: bool = False) -> dict[str, str]:
    """Only what a worker needs: the owner's variables may hold secrets."""
    names = (*_KEPT_VARIABLES, *(_GPU_VARIABLES if on_gpu else ()))
    kept = {name: os.environ[name] for name in names if name in os.environ}
    if on_gpu:  # else products of the same rows differ from run to run; read before CUDA starts
        kept["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    source = str(Path(aivillage.__file__).parent.parent)
    paths = [source, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **kept,
        **dict.fromkeys(_THREAD_VARIABLES, str(threads)),
        "OMP_WAIT_POLICY": "passive",  # a thread that waits for the others takes no core from them
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(scratch),
        "TMPDIR": str(scratch),
        "THP_MEM_ALLOC_ENABLE": "1",  # torch waits mostly for fresh pages while it loads weights
    }
