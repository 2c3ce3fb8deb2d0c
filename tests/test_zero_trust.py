"""docs/zero_trust.md: a line for whatever anybody may say here, and no name that is not there."""

from __future__ import annotations

import ast
import functools
import re
from typing import Any

import msgspec
import pytest

from aivillage.node.desk import Desk
from aivillage.node.limits_desk import LimitsDesk
from aivillage.node.maps import Maps
from aivillage.node.models_desk import ModelsDesk
from aivillage.node.people_desk import PeopleDesk
from aivillage.node.reputation_desk import ReputationDesk
from aivillage.protocols import meeting, messages, papers
from tests.house import ROOT

PAGE = "docs/zero_trust.md"
PARTS = {"OperationInfo", "OfferedOperation", "PairLane", "StepItem", "Message"}
"""They travel inside of others only."""


def table(text: str) -> dict[str, list[list[str]]]:
    """First cell -> the other cells of each row."""
    found: dict[str, list[list[str]]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            found.setdefault(cells[0].strip("`"), []).append(cells[1:])
    return found


@functools.cache
def page() -> str:
    return (ROOT / PAGE).read_text(encoding="utf-8")


class _Names:
    """Stands for a desk: every method of it is its own name."""

    def __getattr__(self, name: str) -> str:
        return name


def requests() -> dict[str, str]:
    """Request -> where it is answered."""
    stand_in: Any = _Names()
    kinds = (
        ("node/desk.py", Desk),
        ("node/people_desk.py", PeopleDesk),
        ("node/limits_desk.py", LimitsDesk),
        ("node/reputation_desk.py", ReputationDesk),
        ("node/maps.py", Maps),
        ("node/models_desk.py", ModelsDesk),
    )
    return {
        name: f"{file}:{kind.__name__}.{method}"
        for file, kind in kinds
        for name, method in kind.handlers(stand_in).items()
    }


def kinds() -> set[str]:
    """Every message between peers, but a relay's, and every paper that is signed."""
    return {
        name
        for module in (messages, meeting, papers)
        for name, kind in vars(module).items()
        if isinstance(kind, type)
        and issubclass(kind, msgspec.Struct)
        and kind.__module__ == module.__name__
        and name not in PARTS
    }


def test_every_message_and_every_request_has_one_line_and_no_other_has():
    lines = table(page())
    assert len(kinds()) > 35
    assert len(requests()) > 30
    assert set(lines) == kinds() | set(requests())
    assert not [name for name, rows in lines.items() if len(rows) != 1]


def test_a_request_is_said_to_be_answered_where_it_is():
    lines = table(page())
    wrong = {name: at for name, at in requests().items() if f"`{at}`" not in lines[name][0][1]}
    assert not wrong


@pytest.mark.parametrize("name", sorted(kinds() | set(requests())))
def test_a_line_says_who_and_names_a_check_and_a_test(name):
    (cells,) = table(page())[name]
    assert cells[0] or name == "stop"
    if name in kinds():
        who, proof, _, limit, _ = cells
        assert proof or who.startswith("nobody")
        assert limit or who.startswith("nobody")
    assert re.search(r"`[a-z_/]+\.py:[\w.]+`", " ".join(cells))
    assert re.search(r"`test_\w+`", cells[-1])


@functools.cache
def defined(file: str) -> frozenset[str]:
    """`function` and `Class.method` of a file."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = {node.name for node in tree.body if isinstance(node, functions)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{m.name}" for m in node.body if isinstance(m, functions)}
    return frozenset(found)


def test_every_function_that_it_names_exists():
    named = re.findall(r"`([a-z_/]+\.py):([\w.]+)`", page())
    assert len(named) > 60
    assert not [f"{file}:{name}" for file, name in named if name not in defined(file)]


def test_every_test_that_it_names_exists():
    found: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        found |= set(re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8")))
    named = set(re.findall(r"`(test_\w+)`", page()))
    assert len(named) > 50
    assert not named - found
