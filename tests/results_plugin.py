"""`-p tests.results_plugin --results FILE`: every test as {name, outcome, seconds} in JSON.

With `--again` a second run of what failed is written into the same file: who passes now has
`attempts` 2. `python -m tests.results_plugin FILE` says it all in one line, and which those were;
it fails where a test failed or none ran.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections import Counter
from typing import Any

import pytest

RANK = {"passed": 0, "skipped": 1, "failed": 2}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", metavar="FILE", help="write every test's outcome there")
    parser.addoption("--again", action="store_true", help="keep there what does not run now")


def pytest_configure(config: pytest.Config) -> None:
    # The workers of pytest-xdist report to the process that started them, which writes.
    if (path := config.getoption("--results")) and not hasattr(config, "workerinput"):
        results = Results(pathlib.Path(path), again=config.getoption("--again"))
        config.pluginmanager.register(results, "results-file")


class Results:
    """Adds up setup, call and teardown of each test; the worst of the three is its outcome."""

    def __init__(self, path: pathlib.Path, *, again: bool) -> None:
        self.path = path
        self.before: dict[str, dict[str, Any]] = (
            {entry["name"]: entry for entry in json.loads(path.read_text())} if again else {}
        )
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        entry = self.tests.setdefault(
            report.nodeid, {"name": report.nodeid, "outcome": "passed", "seconds": 0.0}
        )
        entry["seconds"] = round(entry["seconds"] + report.duration, 4)
        if RANK[report.outcome] > RANK[entry["outcome"]]:
            entry["outcome"] = report.outcome

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.tests[report.nodeid] = {
                "name": report.nodeid,
                "outcome": "failed",
                "seconds": 0.0,
            }

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus > pytest.ExitCode.TESTS_FAILED:
            # It ended early: nobody knows of the tests that did not run.
            name = f"pytest itself, exit {int(exitstatus)}"
            self.tests[name] = {"name": name, "outcome": "failed", "seconds": 0.0}
        for name in self.tests.keys() & self.before.keys():
            self.tests[name]["attempts"] = 2
        entries = (self.before | self.tests).values()
        self.path.write_text(json.dumps(list(entries), indent=1) + "\n")


def closing_lines(entries: list[dict[str, Any]]) -> list[str]:
    """A line for each test that passed at its second attempt, then how many passed and failed."""
    count = Counter(entry["outcome"] for entry in entries)
    late = [e["name"] for e in entries if e["outcome"] == "passed" and e.get("attempts") == 2]
    said = ", ".join(f"{count[o]} {o}" for o in ("failed", "passed", "skipped") if count[o])
    return [f"passed only at its second attempt: {name}" for name in late] + [
        said or "no tests ran"
    ]


if __name__ == "__main__":
    entries = json.loads(pathlib.Path(sys.argv[1]).read_text())
    print("\n".join(closing_lines(entries)))
    sys.exit(not entries or any(entry["outcome"] == "failed" for entry in entries))
