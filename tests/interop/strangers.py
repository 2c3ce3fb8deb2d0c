"""Other people's libp2p, and where it is: a folder outside the checkout that the caller names.

`AIVILLAGE_INTEROP=~/.cache/aivillage-interop pytest -m interop` fills it on the first run (10 MB
for Go, 60 MB for JavaScript) through pip and npm. Without it the tests are skipped, and say so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

FOLDER = "AIVILLAGE_INTEROP"
WHEEL = "hivemind==1.1.12 --hash=sha256:"
WHEEL += "acb8f0cf2cdb085259feb1c0a092c530f1953287cbfa4a1ab5e14e8c65359a2c\n"
"""A wheel for Linux on x86-64 that carries the daemon of go-libp2p; nothing else of it is used."""
FETCH_SECONDS = 100
JS = Path(__file__).with_name("js")


def folder() -> Path:
    named = os.environ.get(FOLDER)
    if not named:
        pytest.skip(f"set {FOLDER} to a folder outside the checkout, for other libp2p programs")
    found = Path(named).expanduser().resolve()
    found.mkdir(parents=True, exist_ok=True)
    return found


def go_daemon() -> Path:
    """The `p2pd` program."""
    daemon = folder() / "p2pd"
    if not daemon.exists():
        wanted = folder() / "wanted.txt"
        wanted.write_text(WHEEL)
        _fetched(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes",
             "--only-binary=:all:", "--dest", ".", "-r", wanted.name],
        )  # fmt: skip
        (wheel,) = folder().glob("hivemind-*.whl")
        with zipfile.ZipFile(wheel) as inside:
            daemon.write_bytes(inside.read("hivemind/hivemind_cli/p2pd"))
        daemon.chmod(0o755)
    return daemon


def js_script() -> Path:
    """`dial.mjs` beside the packages that it imports."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not installed")
    target = folder() / "js"
    if not (target / "node_modules").exists():
        target.mkdir(exist_ok=True)
        shutil.copy(JS / "package.json", target)
        _fetched(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=target)
    return Path(shutil.copy(JS / "dial.mjs", target))


def _fetched(command: list[str], cwd: Path | None = None) -> None:
    try:
        subprocess.run(
            command, cwd=cwd or folder(), capture_output=True, check=True, timeout=FETCH_SECONDS
        )
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"{command[0]} could not fetch it: {error}")
