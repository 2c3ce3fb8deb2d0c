"""How tests are shared out among processes: by `tests/whole_files.py`, in pytest-xdist's hands."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("xdist")

from tests.conftest import pytest_xdist_make_scheduler
from tests.house import ROOT
from tests.whole_files import TOGETHER


class Worker:
    """Notes what it is sent."""

    def __init__(self, number: int) -> None:
        self.gateway = SimpleNamespace(id=f"gw{number}")
        self.shutting_down = False
        self.sent: list[int] = []

    def send_runtest_some(self, indices: list[int]) -> None:
        self.sent += indices

    def shutdown(self) -> None:
        self.shutting_down = True


def config(dist: str) -> Any:
    return SimpleNamespace(
        getoption=lambda _name: dist,
        getvalue=lambda _name: ["popen", "popen"],
        option=SimpleNamespace(loadscopereorder=True),
    )


def shared_out(ids: list[str]) -> list[set[str]]:
    """What each of two processes is given at first."""
    scheduler = pytest_xdist_make_scheduler(config("loadfile"), None)
    workers = [Worker(0), Worker(1)]
    for worker in workers:
        scheduler.add_node(worker)
        scheduler.add_node_collection(worker, ids)
    scheduler.schedule()
    return [{ids[index] for index in worker.sent} for worker in workers]


def test_a_file_is_whole_and_the_first_ones_begin_however_few_tests_they_have():
    long = ["a/test_long.py::test_one[x::y]", "a/test_long.py::test_two", "a/test_long.py::test_3"]
    slow = [f"a/test_slow.py::test_{number}" for number in range(3)]
    many = [f"b/test_many.py::test_{number}" for number in range(9)]
    assert shared_out([*long, *slow, *many]) == [set(long), set(slow)]


def test_files_that_ask_the_same_engines_are_one_piece_of_work():
    engines = [f"tests/integration/{name}::test_{n}" for name in sorted(TOGETHER) for n in (1, 2)]
    other = [f"tests/integration/test_other.py::test_{number}" for number in range(3)]
    assert shared_out([*engines[:2], *other, *engines[2:]]) == [set(engines), set(other)]
    assert all((ROOT / "tests" / "integration" / name).is_file() for name in TOGETHER)


def test_whoever_names_another_way_gets_it():
    assert pytest_xdist_make_scheduler(config("worksteal"), None) is None
