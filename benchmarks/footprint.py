"""What an idle node costs: memory, time until it serves, time of `--help`.

    python benchmarks/footprint.py [--quick] [--json]

A real daemon without workers, in a fresh folder, on loopback. Memory is resident size five seconds
after it was ready; ready and help are the best of several starts, since machines are noisy.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from claims import Claims, main

from aivillage.cli.village_process import NodeProcess

IDLE_SECONDS = 5.0


def measure(claims: Claims, args: argparse.Namespace) -> None:
    starts = 3 if args.quick else 7
    with tempfile.TemporaryDirectory() as folder:
        node = NodeProcess("idle", Path(folder))
        ready = []
        for _ in range(starts):
            began = time.perf_counter()
            node.start()
            ready.append(time.perf_counter() - began)
            if len(ready) < starts:
                node.stop()
        time.sleep(IDLE_SECONDS)
        status = node.ask("status")
        node.stop()
    claims.add("idle_rss_mb", status["rss_mb"], at_most=120)
    claims.add("ready_s", min(ready), at_most=3)
    claims.add("ready_s_max", max(ready))
    claims.add("help_cpu_s", min(help_cpu_seconds() for _ in range(starts)), at_most=0.3)
    claims.add("idle_loop_lag_p99_ms", status["loop_lag_ms"]["p99"])


def help_cpu_seconds() -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "aivillage", "--help"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    sys.exit(main(measure, __doc__ or ""))
