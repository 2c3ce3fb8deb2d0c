"""The style, as a test. CONTRIBUTING.md says why."""

from __future__ import annotations

import ast
import functools
import pathlib
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.house import FOLDERS, ROOT, module_name, pyproject, python_files, tracked

FILE_LINES_MAX = 500
TEST_FILE_LINES_MAX = 700
FUNCTION_LINES_MAX = 60
FUNCTION_LINES_MEDIAN_MAX = 12
LINE_MAX = 100
BLOB_BYTES_MAX = 256 * 1024
ROOT_ENTRIES_MAX = 22

Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def text_of(path: pathlib.Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@functools.cache
def tree_of(path: pathlib.Path) -> ast.Module:
    return ast.parse(text_of(path))


def functions(*folders: str) -> Iterator[tuple[str, int]]:
    """(where it is, how many lines) of every function below `folders`, docstring included."""
    for path in python_files(*folders):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, Function):
                lines = (node.end_lineno or 0) - node.lineno + 1
                yield f"{path}:{node.lineno} {node.name}", lines


def texts() -> Iterator[tuple[pathlib.Path, str]]:
    """Every tracked text file."""
    for path in tracked():
        if (ROOT / path).is_symlink():
            continue
        try:
            yield path, text_of(path)
        except UnicodeDecodeError:
            continue  # a picture or a model


# ------------------------------------------------------------------ sizes


def test_no_file_is_longer_than_a_reader_can_hold():
    long = {
        str(path): lines
        for path in python_files()
        if (lines := text_of(path).count("\n"))
        > (TEST_FILE_LINES_MAX if path.parts[0] == "tests" else FILE_LINES_MAX)
    }
    assert not long, "split where the reasons to change are split"


def test_no_function_is_longer_than_a_screen():
    assert not [(where, n) for where, n in functions() if n > FUNCTION_LINES_MAX]


def test_most_functions_are_short():
    lengths = [n for _, n in functions(*FOLDERS)]
    median = statistics.median(lengths)
    print(f"{len(lengths)} functions, median {median} lines, longest {max(lengths)}")
    assert median <= FUNCTION_LINES_MEDIAN_MAX


def test_no_line_is_too_wide():
    assert not [
        f"{path}:{number}"
        for path in python_files()
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if len(line) > LINE_MAX
    ]


def test_no_large_blob_is_tracked():
    sizes = {path: (ROOT / path).lstat().st_size for path in tracked()}
    assert not {str(path): size for path, size in sizes.items() if size > BLOB_BYTES_MAX}


def test_the_root_is_a_short_list():
    entries = sorted({path.parts[0] for path in tracked()})
    assert len(entries) <= ROOT_ENTRIES_MAX, entries


# ------------------------------------------------------------------ habits


def test_no_file_has_a_name_that_says_nothing():
    empty_name = re.compile(
        r"utils?|helpers?|common|misc|managers?|manager_.*|.*_manager|.*_utils?"
    )
    assert not [str(path) for path in python_files() if empty_name.fullmatch(path.stem)]


def test_no_error_is_swallowed():
    assert not [
        f"{path}:{node.lineno}"
        for path in python_files()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ExceptHandler) and all(map(_does_nothing, node.body))
    ], "handle it, or contextlib.suppress(TheError) with a comment that says why it is no loss"


def _does_nothing(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


def test_every_suppressed_error_has_its_reason_beside_it():
    bare = []
    for path in python_files(*FOLDERS):
        lines = text_of(path).splitlines()
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.With | ast.AsyncWith) and "suppress(" in ast.unparse(
                node.items[0].context_expr
            ):
                nearby = lines[node.lineno - 2 : node.body[0].lineno]
                if not any("#" in line for line in nearby):
                    bare.append(f"{path}:{node.lineno}")
    assert not bare, "a comment on the line, the one above or the first one inside"


def test_nothing_is_left_for_later():
    later = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    assert not [
        str(path) for path, text in texts() if path.name != "LICENSE" and later.search(text)
    ]


def test_every_module_says_what_it_is():
    folders = ("aivillage", "benchmarks", "examples", "tests", *FOLDERS)
    assert not [
        str(path)
        for path in python_files(*folders)
        if text_of(path).strip() and not ast.get_docstring(tree_of(path))
    ]


def test_nothing_names_a_place_that_a_reader_has_not():
    """Paths of a developer's machine, hosts of registries, and notes that are not in the repo."""
    notes = "LEDGER-SPEC LEDGER LIBP2P HOTPATH MESH PEERS SERVING COMPRESSION RETRIEVAL LEARNING"
    notes += " STYLE ARCHITECTURE DEFAULTS"
    private = re.compile(
        r"(?<![\w.])/wo" + r"rk/|/tm" + r"p/v\b|/ro" + r"ot/|py" + r"pi\.org|pythonho" + r"sted|"
        r"\b(?:" + "|".join(notes.split()) + r")\.md\b"
    )
    assert not [
        f"{path}: {found.group()}"
        for path, text in texts()
        for found in private.finditer(text)
        if found
    ]


# ------------------------------------------------------------------ structure


def test_pyproject_lists_exactly_the_packages_of_the_tree():
    on_disk = {
        module_name(path)
        for path in python_files("aivillage", *FOLDERS)
        if path.name == "__init__.py"
    }
    assert set(pyproject()["tool"]["setuptools"]["packages"]) == on_disk


def test_every_folder_with_python_is_a_package():
    files = python_files(*FOLDERS)
    packages = {path.parent for path in files if path.name == "__init__.py"}
    assert not sorted({str(path.parent) for path in files} - {str(path) for path in packages})


def test_the_links_lead_from_the_package_to_the_five_folders():
    links = {
        p.name: p.readlink().as_posix() for p in (ROOT / "aivillage").iterdir() if p.is_symlink()
    }
    assert links == {folder: f"../{folder}" for folder in FOLDERS}


def _named_modules() -> set[str]:
    """Every aivillage module that an import, a string of product code or pyproject names."""
    named = set(re.findall(r"aivillage\.[\w.]+", text_of(pathlib.Path("pyproject.toml"))))
    for path in python_files("aivillage", *FOLDERS):
        own = module_name(path)
        for node in ast.walk(tree_of(path)):
            found: set[str] = set()
            if isinstance(node, ast.Import):
                found = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found = {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Constant) and " " not in str(node.value):
                found = set(re.findall(r"aivillage\.[\w.]+", str(node.value)))
            named |= found - {own}
    return named


def test_no_module_is_dead():
    named = _named_modules()
    assert not [
        str(path)
        for path in python_files(*FOLDERS)
        # loopback.py is the transport's twin, for the tests.
        if path.name not in {"__init__.py", "__main__.py", "loopback.py"}
        and module_name(path) not in named
        and '__name__ == "__main__"' not in text_of(path)
    ], "nobody imports it and no table names it"


HEAVY = ("torch", "transformers", "libp2p", "multiaddr", "trio", "numpy", "tokenizers", "fastapi")


def test_help_loads_nothing_heavy():
    code = (
        "import sys, contextlib, io\n"
        "from aivillage.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    try:\n        main(['--help'])\n"
        "    except SystemExit as end:\n        assert not end.code, end.code\n"
        f"print(*sorted(set(sys.modules) & set({HEAVY!r})))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split(), "import it where it is used"


# ------------------------------------------------------------------ sabotage


@pytest.mark.parametrize("patch", sorted((ROOT / "sabotage").glob("*.patch")), ids=lambda p: p.name)
def test_a_planted_fault_names_an_existing_test_and_says_what_it_breaks(patch):
    first, second, *_ = patch.read_text().splitlines()
    named = re.fullmatch(r"# test: (tests/[\w/]+\.py)::(\w+)(\[.*\])?", first)
    assert named, first
    assert re.fullmatch(r"# fault: .{10,}", second), second
    names = {
        node.name
        for node in ast.walk(tree_of(pathlib.Path(named[1])))
        if isinstance(node, Function)
    }
    assert named[2] in names
