"""`pytest -n N --dist loadfile`: a file's tests stay in one process, whose fixtures they share.

Files that ask the same loaded engines stay together too. Files come in the order of their names,
so the long ones of `integration/` first; by pytest-xdist's own order, those of most tests first,
one that takes minutes for two tests would begin last, and everybody would wait for it.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any, Final

import pytest
from xdist.scheduler import LoadFileScheduling

TOGETHER: Final = frozenset(
    {"test_engine.py", "test_engine_conformance.py", "test_stages.py", "test_structured_engines.py"}
)
"""A load of an engine takes some ten seconds: `integration/asking_engines.py` keeps them."""


class WholeFiles(LoadFileScheduling):
    """`LoadFileScheduling` in the order of collection, some files joined."""

    def __init__(self, config: pytest.Config, log: Any = None) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "engines" if PurePath(file).name in TOGETHER else file
