"""`make sabotage`: plants each fault of sabotage/*.patch and demands that its test notices.

A patch begins with two lines, `# test: tests/path.py::test_name` and `# fault: one sentence`.
For each: a scratch copy of the tracked files, the named test there without the fault (it must
pass), then with it (it must fail in its call phase: not at import, not in a fixture).

The same file is the pytest plugin (`-p tests.sabotage`) that reports from inside the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
RUN_SECONDS_MAX = 300
REPORT = "SABOTAGE_REPORT"
"""Environment variable: where the plugin writes what it saw."""


class SabotageError(Exception):
    """This fault proves nothing; the sentence says why."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """One patch."""

    name: str
    patch: pathlib.Path
    test: str
    sentence: str

    @classmethod
    def read(cls, patch: pathlib.Path) -> Fault:
        first, second, *_ = [*patch.read_text().splitlines(), "", ""]
        test = re.fullmatch(r"# test: (tests/\S+\.py::\S.*)", first)
        sentence = re.fullmatch(r"# fault: (.+)", second)
        if not (test and sentence):
            raise SabotageError(f"{patch.name} must begin with `# test: ` and `# fault: ` lines")
        return cls(patch.stem, patch, test[1], sentence[1])


def scratch_copy(folder: pathlib.Path) -> pathlib.Path:
    """The tracked files as they are now, links as links."""
    target = folder / "tree"
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, names.split("\0")):
        source = ROOT / name
        if source.is_symlink() or source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)
    return target


def run_test(tree: pathlib.Path, test: str) -> dict[str, Any]:
    """What happened to `test` in `tree`: exit code, phases that failed, calls that ran."""
    report = tree.parent / "report.json"
    report.unlink(missing_ok=True)
    plugins = ["-p", "tests.sabotage", "-p", "no:cacheprovider", "-p", "no:randomly"]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "--tb=short", *plugins, test],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree), REPORT: str(report), "CI": "true"},
            capture_output=True,
            text=True,
            check=False,
            timeout=RUN_SECONDS_MAX,
        )
    except subprocess.TimeoutExpired:
        raise SabotageError(f"{test} did not end in {RUN_SECONDS_MAX} s") from None
    if not report.exists():
        raise SabotageError(f"pytest did not start:\n{done.stdout[-600:]}{done.stderr[-600:]}")
    seen: dict[str, Any] = json.loads(report.read_text())
    if seen["foreign"]:
        raise SabotageError(f"imported from outside the scratch tree: {seen['foreign'][:3]}")
    return seen | {"exit": done.returncode, "tail": done.stdout[-600:]}


def check_passes(tree: pathlib.Path, test: str) -> None:
    """Without a fault the test must pass, and must touch our code."""
    seen = run_test(tree, test)
    if seen["exit"] != 0 or not seen["calls"]:
        raise SabotageError(f"without any fault the test does not pass:\n{seen['tail']}")
    if not seen["ours"]:
        raise SabotageError("the test imports nothing of aivillage")


def check_noticed(tree: pathlib.Path, fault: Fault) -> None:
    """With the fault the test must fail while it runs."""
    applied = subprocess.run(
        ["git", "apply", "--whitespace=nowarn", str(fault.patch)],
        cwd=tree,
        env=os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    if applied.returncode != 0:
        raise SabotageError(f"the patch no longer applies: {applied.stderr.strip()}")
    seen = run_test(tree, fault.test)
    if seen["exit"] == 0:
        raise SabotageError("UNNOTICED: the test passes with the fault in place")
    if seen["exit"] != 1 or seen["failed"] != ["call"]:
        raise SabotageError(f"the test broke instead of failing:\n{seen['tail']}")


def judge(fault: Fault, passed: set[str]) -> None:
    """Raises SabotageError unless the fault is noticed by a test that passes without it."""
    with tempfile.TemporaryDirectory(prefix="sabotage-") as folder:
        tree = scratch_copy(pathlib.Path(folder))
        if fault.test not in passed:
            check_passes(tree, fault.test)
            passed.add(fault.test)
        check_noticed(tree, fault)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Plants faults; each must turn its test red.")
    parser.add_argument("--only", action="append", metavar="NAME", help="just this fault")
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "sabotage")
    args = parser.parse_args(argv)
    patches = sorted(args.folder.resolve().glob("*.patch"))
    chosen = [p for p in patches if not args.only or p.stem in args.only]
    if not chosen or len(chosen) < len(args.only or ()):
        print(f"no such fault; there are: {', '.join(p.stem for p in patches) or 'none'}")
        return 2
    passed: set[str] = set()
    bad = 0
    for patch in chosen:
        started, verdict, sentence = time.monotonic(), "noticed", ""
        try:
            fault = Fault.read(patch)
            sentence = fault.sentence
            judge(fault, passed)
        except SabotageError as error:
            verdict, bad = str(error), bad + 1
        print(f"{patch.stem:32} {time.monotonic() - started:5.1f} s  {sentence}")
        print(f"{'':32} -> {verdict}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} faults noticed")
    return 1 if bad else 0


# ------------------------------------------------------------------ the plugin

_phases: list[tuple[str, str]] = []


def pytest_runtest_logreport(report: Any) -> None:
    _phases.append((report.when, report.outcome))


def pytest_sessionfinish() -> None:
    if REPORT not in os.environ:
        return
    files = {
        name: str(getattr(module, "__file__", None) or "")
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == "aivillage"
    }
    home = os.path.realpath(pathlib.Path.cwd())
    seen = {
        "calls": sum(when == "call" and outcome == "passed" for when, outcome in _phases),
        "failed": sorted({when for when, outcome in _phases if outcome == "failed"}),
        "ours": len(files),
        "foreign": [
            f"{name} from {file}"
            for name, file in files.items()
            if file and not os.path.realpath(file).startswith(home + os.sep)
        ],
    }
    pathlib.Path(os.environ[REPORT]).write_text(json.dumps(seen))


if __name__ == "__main__":
    sys.exit(main())
