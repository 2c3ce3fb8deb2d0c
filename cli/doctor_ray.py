"""Whether the Ray cluster is there, where modules are to run on one."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Final

from aivillage.node.config import Settings

RAY_SECONDS_MAX: Final = 30.0
"""To join a cluster takes Ray 2 to 15 s; only who set `executor = "ray"` waits for it."""


def cluster(settings: Settings) -> tuple[str, str]:
    """What is there, and what to do about it; the second is empty where all is well."""
    command = [
        *(sys.executable, "-m", "aivillage.models.ray_bridge", "check", settings.ray_address),
        str(os.getpid()),
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=RAY_SECONDS_MAX, check=False
        )
    except subprocess.TimeoutExpired:
        return f"{settings.ray_address}: no answer within {RAY_SECONDS_MAX:.0f} s", NO_CLUSTER
    if done.returncode == 0:
        return f"{settings.ray_address}: {done.stdout.strip().splitlines()[-1]}", ""
    reason = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
    missing = "No module named 'ray'" in reason
    step = "pip install -c constraints.txt -e '.[ray]'" if missing else NO_CLUSTER
    return f"{settings.ray_address}: {reason[:300]}", step


NO_CLUSTER: Final = "join the cluster (`ray start --address=...`), or set executor to local"
