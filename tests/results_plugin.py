"""`-p tests.results_plugin --results FILE`: every test as {name, outcome, seconds} in JSON."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

RANK = {"passed": 0, "skipped": 1, "failed": 2}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", metavar="FILE", help="write every test's outcome there")


def pytest_configure(config: pytest.Config) -> None:
    # The workers of pytest-xdist report to the process that started them, which writes.
    if (path := config.getoption("--results")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Results(pathlib.Path(path)), "results-file")


class Results:
    """Adds up setup, call and teardown of each test; the worst of the three is its outcome."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
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

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps(list(self.tests.values()), indent=1) + "\n")
