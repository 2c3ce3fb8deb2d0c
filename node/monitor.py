"""Health of the daemon: how late its loop is, how much memory it holds, how full the disk is."""

from __future__ import annotations

import collections
import os
import resource
import shutil
from pathlib import Path
from typing import Final

import trio

from aivillage.protocols.errors import AivillageError, NodeError
from aivillage.protocols.types import Seconds

BEAT_SECONDS: Final = 0.1
LAGS_KEPT: Final = 600
"""One minute of beats."""
FREE_BYTES_MIN: Final = 64 << 20
"""Room for the books to settle what runs; below it no new work and no new money."""
DISK_SECONDS: Final = 5.0


class Monitor:
    """Measures while it runs; `refusal` is why the node takes no new work now, or None."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._lags: collections.deque[Seconds] = collections.deque(maxlen=LAGS_KEPT)
        self._disk_full = False

    async def run(self) -> None:
        """Beats ten times a second; looks at the disk every five."""
        beats = 0
        while True:
            due = trio.current_time() + BEAT_SECONDS
            await trio.sleep_until(due)
            self._lags.append(trio.current_time() - due)
            if beats % int(DISK_SECONDS / BEAT_SECONDS) == 0:
                self.look_at_disk()
            beats += 1

    def look_at_disk(self) -> None:
        self._disk_full = shutil.disk_usage(self._data_dir).free < FREE_BYTES_MIN

    def refusal(self) -> AivillageError | None:
        if not self._disk_full:
            return None
        return NodeError(
            f"the disk under {self._data_dir} is full",
            code="DISK_FULL",
            next_step=f"free at least {FREE_BYTES_MIN >> 20} MB; the node then goes on by itself",
        )

    def loop_lag_ms(self, seconds: Seconds = LAGS_KEPT * BEAT_SECONDS) -> dict[str, float]:
        """p50 and p99 of the last `seconds`, a minute at most."""
        beats = max(1, round(min(seconds, LAGS_KEPT) / BEAT_SECONDS))
        lags = sorted(list(self._lags)[-beats:]) or [0.0]
        return {
            "p50": round(lags[len(lags) // 2] * 1000, 2),
            "p99": round(lags[int(len(lags) * 0.99)] * 1000, 2),
        }

    def tasks(self) -> int:
        """Tasks of the loop, the library's own included: where it only grows, something leaks."""
        return trio.lowlevel.current_statistics().tasks_living

    def rss_mb(self) -> float:
        """Resident memory now (Linux), else the most it ever was."""
        try:
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        except (OSError, IndexError, ValueError):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
