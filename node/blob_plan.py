"""Which chunks of a blob are still missing, and who fetches which: pure, without a clock.

Each source has a run of chunks, which it brings in order. A source with nothing to do takes over
the last half of what another has left; of the chunk that a slow one is at, it asks for a copy.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from aivillage.protocols.types import PeerId

RUN_MAX: Final = 16
"""Chunks in one call: what a call costs is little beside them, and what is in memory is bounded."""
COPIES_MAX: Final = 2
"""Sources that bring the same chunk at the same time: a copy is paid as well."""


class Run(NamedTuple):
    """Chunks `first` up to and without `end`."""

    first: int
    end: int


class Plan:
    """Of a blob of `count` chunks, some of which are `had`."""

    def __init__(self, count: int, had: set[int]) -> None:
        self.had = set(had)
        self.count = count
        self._runs: dict[PeerId, Run] = {}

    @property
    def missing(self) -> int:
        return self.count - len(self.had)

    def take(self, source: PeerId, most: int) -> Run | None:
        """The next chunks for `source`, which has none: new ones, or the last half of another's.

        None: whatever is missing is under way.
        """
        assert source not in self._runs, "one run at a time"
        run = self._free(most) or self._stolen(most)
        if run is not None:
            self._runs[source] = run
        return run

    def copy(self, source: PeerId, victim: PeerId) -> Run | None:
        """The chunk that `victim` is at, for `source` as well; None: enough bring it already."""
        theirs = self._runs.get(victim)
        if theirs is None or self._carriers(theirs.first) >= COPIES_MAX:
            return None
        run = self._runs[source] = Run(theirs.first, theirs.first + 1)
        return run

    def got(self, source: PeerId, index: int) -> None:
        """`source` brought a chunk, and is at the next one of its run."""
        self.had.add(index)
        run = self._runs.get(source)
        if run is not None:
            self._runs[source] = Run(index + 1, run.end)

    def wants(self, source: PeerId) -> bool:
        """Whether anything of its run is still missing."""
        run = self._runs.get(source)
        return run is not None and any(i not in self.had for i in range(run.first, run.end))

    def drop(self, source: PeerId) -> None:
        """Its run ended, well or not: what did not come is anybody's."""
        self._runs.pop(source, None)

    def at_work(self) -> list[PeerId]:
        """Who brings something that is missing."""
        return [source for source in self._runs if self.wants(source)]

    # ------------------------------------------------------------------ inside
    def _free(self, most: int) -> Run | None:
        """The first chunks that nobody brings."""
        taken = {i for run in self._runs.values() for i in range(run.first, run.end)}
        first = next((i for i in range(self.count) if i not in self.had and i not in taken), None)
        if first is None:
            return None
        end = first + 1
        while end < min(first + most, self.count) and end not in self.had and end not in taken:
            end += 1
        return Run(first, end)

    def _stolen(self, most: int) -> Run | None:
        """The last half of the longest run, without the chunk that its source is at."""
        victim = max(self._runs, key=lambda source: len(self._left(source)), default=None)
        left = self._left(victim) if victim is not None else []
        if victim is None or len(left) < 2:
            return None
        keep = max(1, len(left) // 2)
        first, end = left[keep], self._runs[victim].end
        self._runs[victim] = Run(self._runs[victim].first, first)
        return Run(first, min(end, first + most))

    def _left(self, source: PeerId) -> list[int]:
        run = self._runs[source]
        return [index for index in range(run.first, run.end) if index not in self.had]

    def _carriers(self, index: int) -> int:
        return sum(run.first <= index < run.end for run in self._runs.values())
