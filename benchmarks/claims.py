"""What benchmarks share: claims with bars, one flat JSON object, results with their origin.

A claim is a figure with a name, and perhaps a bar that it must hold. `--json` prints, as the last
line, one object: each key, its bar as `<key>_bar`, the verdict as `<key>_ok`. `--save` keeps it in
benchmarks/results/ with commit, hash of the script, machine and date.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
"""Some measure with what the tests have: real daemons, made-up villages."""


class Claims:
    """Figures of one run."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def add(
        self, key: str, value: float, *, at_most: float | None = None, at_least: float | None = None
    ) -> None:
        """One figure; with a bar, also whether it holds."""
        self.found[key] = round(value, 4)
        bar = at_least if at_most is None else at_most
        if bar is not None:
            self.found[f"{key}_bar"] = bar
            self.found[f"{key}_ok"] = value >= bar if at_most is None else value <= bar

    def note(self, key: str, value: Any) -> None:
        self.found[key] = value

    def all_ok(self) -> bool:
        return all(value for key, value in self.found.items() if key.endswith("_ok"))


def main(measure: Callable[[Claims, argparse.Namespace], None], about: str) -> int:
    """Parses the shared flags, measures, prints; exit 1 where a bar does not hold."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--json", action="store_true", help="one flat object as the last line")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, under 50 s")
    parser.add_argument("--save", action="store_true", help="keep in benchmarks/results/")
    args = parser.parse_args()
    claims, started = Claims(), time.monotonic()
    measure(claims, args)
    claims.note("seconds", round(time.monotonic() - started, 1))
    if args.save:
        _save(claims)
    if args.json:
        print(json.dumps(claims.found))
    else:
        for key, value in claims.found.items():
            print(f"{key:36} {value}")
    return 0 if claims.all_ok() else 1


def script_sha256() -> str:
    """Of the script that runs: kept figures are of it, or stale."""
    return hashlib.sha256(Path(sys.argv[0]).read_bytes()).hexdigest()


def _save(claims: Claims) -> None:
    script = Path(sys.argv[0]).resolve()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    origin = {
        "commit": commit,
        "script_sha256": script_sha256(),
        "machine": f"{platform.machine()}, {platform.processor() or 'cpu'}, Linux "
        f"{platform.release().partition('-')[0]}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    target = ROOT / "benchmarks" / "results" / f"{script.stem}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(claims.found | origin, indent=1) + "\n", encoding="utf-8")
