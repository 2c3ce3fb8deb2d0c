"""The previous version of this program, which a village may still run.

`PREVIOUS` names the newest commit of this repository that speaks an older minor version of the
protocol; whoever raises `VERSION_MINOR` writes the commit before that there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

from tests.house import ROOT

COMMIT = Path(__file__).with_name("PREVIOUS").read_text(encoding="ascii").strip()


def missing() -> str:
    """Why its source cannot be had here; empty where it can."""
    if _git("cat-file", "-e", f"{COMMIT}^{{commit}}").returncode:
        return f"commit {COMMIT[:12]} is not in this clone: a shallow one, or no git"
    return ""


def minor_version() -> int:
    """Of the protocol that it speaks."""
    text = _read("show", f"{COMMIT}:protocols/messages.py").decode()
    found = re.search(r"^VERSION_MINOR: Final = (\d+)$", text, re.MULTILINE)
    assert found, "VERSION_MINOR is not in its protocols/messages.py"
    return int(found[1])


def unpack_to(folder: Path) -> Path:
    """Its source; with `folder` first in PYTHONPATH the same environment runs it."""
    with tarfile.open(fileobj=BytesIO(_read("archive", "--format=tar", COMMIT))) as tar:
        tar.extractall(folder, filter="tar")
    return folder


def _read(*words: str) -> bytes:
    found = _git(*words)
    assert not found.returncode, found
    return found.stdout


def _git(*words: str) -> subprocess.CompletedProcess[bytes]:
    git = shutil.which("git") or "false"
    return subprocess.run([git, *words], cwd=ROOT, capture_output=True, check=False)
