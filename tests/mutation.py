"""`make mutation`: small changes to the ledger's steps, and how many of them some test notices.

A sample with a fixed seed: comparisons, +/-1, and/or, calls dropped, words of SQL. Each is tried
in a process of its own, where this file is the pytest plugin that changes the module on import.
A survivor is a test that is missing, or code that makes no difference: read it. On 2026-11-28 the
default sample of 150 had 10, none of which makes a difference (a cache's size, a row read in vain).
"""

from __future__ import annotations

import argparse
import ast
import importlib.abc
import importlib.util
import os
import pathlib
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODULES = ("transfers", "payee", "payer", "exposure", "sync", "books")
CHOICE = "MUTATION_CHOICE"
"""Environment variable: module and number of the change that the plugin makes."""
RUN_SECONDS_MAX = 120
TESTS = (
    *(
        f"tests/unit/ledger/test_{name}.py"
        for name in ("steps", "edges", "transfers", "corrections", "evidence")
    ),
    "tests/simulation/test_rings.py",
    "tests/unit/ledger",
    "tests/simulation/test_ledger_sim.py::test_every_invariant_holds",
    "tests/simulation/test_ledger_sim.py::test_a_scene_goes_as_it_should_where_no_bug_is_planted",
)
"""What sees the ledger without daemons; the quick ones that notice most come first."""
_COMPARE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_SQL = re.compile(r"\b(SELECT|UPDATE|INSERT|DELETE)\b")
_WORDS = {" AND ": " OR ", " < ": " <= ", " > ": " >= ", "max(": "min(", " + ": " - ", "<>": "="}


class Change(NamedTuple):
    module: str
    number: int
    line: int
    what: str


def source_of(module: str) -> str:
    return (ROOT / "ledger" / f"{module}.py").read_text(encoding="utf-8")


def changes(tree: ast.Module) -> Iterator[tuple[int, str, Any]]:
    """(line, what, a call that makes the change in `tree`)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            for index, op in enumerate(node.ops):
                new = _COMPARE[type(op)]
                yield _at(node, new.__name__, node.ops, index, new())
        elif isinstance(node, ast.BoolOp):
            new_op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            yield node.lineno, type(new_op).__name__, _set(node, "op", new_op)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
            sign = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
            yield node.lineno, type(sign).__name__, _set(node, "op", sign)
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield node.lineno, f"{node.value} + 1", _set(node, "value", node.value + 1)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from _sql(node, node.value)
        yield from _dropped_calls(node)


def _dropped_calls(node: ast.AST) -> Iterator[tuple[int, str, Any]]:
    for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
        for index, statement in enumerate(body if isinstance(body, list) else ()):
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
                yield _at(statement, "call dropped", body, index, ast.Pass())


def _sql(node: ast.Constant, text: str) -> Iterator[tuple[int, str, Any]]:
    for old, new in _WORDS.items():
        for found in re.finditer(re.escape(old), text if _SQL.search(text) else ""):
            changed = text[: found.start()] + new + text[found.end() :]
            line = node.lineno + text.count("\n", 0, found.start())
            yield line, f"SQL {old.strip()} is {new.strip()}", _set(node, "value", changed)


def _at(node: ast.AST, what: str, items: Any, index: int, new: Any) -> tuple[int, str, Any]:
    return node.lineno, what, lambda: items.__setitem__(index, new)  # type: ignore[attr-defined]


def _set(node: ast.AST, name: str, value: Any) -> Any:
    return lambda: setattr(node, name, value)


def changed(module: str, number: int) -> ast.Module:
    tree = ast.parse(source_of(module))
    list(changes(tree))[number][2]()
    return ast.fix_missing_locations(tree)


class _Importer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, module: str, number: int) -> None:
        self._module, self._number = module, number

    def find_spec(self, name: str, *_: Any) -> Any:
        wanted = name == f"aivillage.ledger.{self._module}"
        return importlib.util.spec_from_loader(name, self) if wanted else None

    def exec_module(self, module: Any) -> None:
        tree = changed(self._module, self._number)
        exec(compile(tree, f"<{self._module}, changed>", "exec"), module.__dict__)


if CHOICE in os.environ:
    _name, _number = os.environ[CHOICE].split(":")
    sys.meta_path.insert(0, _Importer(_name, int(_number)))


def is_noticed(change: Change) -> bool:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "tests.mutation"]
    try:
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider", *TESTS],
            cwd=ROOT,
            env={**os.environ, CHOICE: f"{change.module}:{change.number}", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            timeout=RUN_SECONDS_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return True  # it hangs: that is noticed
    return done.returncode != 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop after so long")
    options = parser.parse_args(arguments)
    every = [
        Change(module, number, line, what)
        for module in MODULES
        for number, (line, what, _) in enumerate(changes(ast.parse(source_of(module))))
    ]
    sample = random.Random(options.seed).sample(every, min(options.sample, len(every)))
    started, tried, noticed = time.monotonic(), 0, 0
    for change in sample:
        if time.monotonic() - started > options.seconds:
            break
        tried += 1
        if tried % 10 == 0:
            print(f"# {tried} of {len(sample)}: {noticed} noticed", file=sys.stderr, flush=True)
        if is_noticed(change):
            noticed += 1
        else:
            line = source_of(change.module).splitlines()[change.line - 1].strip()
            print(f"lives: {change.module}.py:{change.line} {change.what}: {line}", flush=True)
    print(f"{noticed} of {tried} changes noticed ({len(every)} possible, seed {options.seed})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
