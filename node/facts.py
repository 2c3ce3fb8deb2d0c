"""What the owner's limits ask about this machine: power, other programs, disk. Plain file reads.

Linux says all of it; elsewhere power and other programs are not known.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from aivillage.protocols.types import Seconds

POWER: Final = Path("/sys/class/power_supply")
PROC: Final = Path("/proc")
MEMORY_SECONDS: Final = 10.0
"""A burst of a second is nobody at work; a minute of waiting for one's own machine is too long."""
_BUSY_FIELDS: Final = (0, 1, 2, 5, 6)
"""Of the `cpu` line in /proc/stat: user, nice, system, irq, softirq."""
_OWN_FIELDS: Final = slice(11, 15)
"""Of /proc/PID/stat after the name: utime, stime, and both of the children that have ended."""


def on_mains(folder: Path = POWER) -> bool | None:
    """Whether the machine runs on mains power; None where it does not say."""
    supplies = [path for path in sorted(folder.glob("*")) if _word(path / "scope") != "Device"]
    online = [_word(s / "online") for s in supplies if _word(s / "type") in {"Mains", "USB"}]
    if online:
        return "1" in online
    states = [_word(s / "status") for s in supplies if _word(s / "type") == "Battery"]
    known = [state for state in states if state not in {"", "Unknown"}]
    return "Discharging" not in known if known else None


def disk_bytes(folders: Sequence[Path]) -> int:
    """What the files below `folders` take on the disk."""
    return sum(_blocks(path) for folder in folders for path in _files(folder))


class OtherPrograms:
    """How many processor cores are busy with what is not ours, as a mean that forgets."""

    def __init__(self, proc: Path = PROC) -> None:
        self._proc = proc
        self._last: tuple[Seconds, float] | None = None
        self._mean: float | None = None

    def busy_cores(self, now: Seconds) -> float | None:
        """Looks again. Before there are two looks: the load average, since we did nothing yet."""
        ticks = self._ticks()
        if ticks is None:
            return None
        seconds = ticks / os.sysconf("SC_CLK_TCK")
        if self._mean is None or self._last is None:
            self._mean = os.getloadavg()[0]
        elif now > self._last[0]:
            elapsed = now - self._last[0]
            sample = max(0.0, seconds - self._last[1]) / elapsed
            self._mean += (sample - self._mean) * -math.expm1(-elapsed / MEMORY_SECONDS)
        self._last = now, seconds
        return self._mean

    def _ticks(self) -> int | None:
        """Of all programs but this one and its children, since the machine started."""
        try:
            fields = (self._proc / "stat").read_text(encoding="ascii").split("\n")[0].split()[1:]
            busy = sum(int(fields[at]) for at in _BUSY_FIELDS)
        except (OSError, ValueError, IndexError):
            return None
        return busy - sum(map(self._own_ticks, _family(self._proc, os.getpid())))

    def _own_ticks(self, pid: int) -> int:
        try:
            text = (self._proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
            return sum(map(int, text.rpartition(")")[2].split()[_OWN_FIELDS]))
        except (OSError, ValueError):
            return 0  # it ended meanwhile; its parent has its ticks now


def _family(proc: Path, pid: int) -> Iterator[int]:
    """This process and all below it."""
    yield pid
    for listing in proc.glob(f"{pid}/task/*/children"):
        try:
            children = listing.read_text(encoding="ascii").split()
        except OSError:
            continue  # the thread ended
        for child in children:
            yield from _family(proc, int(child))


def _word(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _files(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        yield from (Path(place, name) for name in names)


def _blocks(path: Path) -> int:
    try:
        return path.lstat().st_blocks * 512
    except OSError:
        return 0  # removed while we looked
