"""What tidy, docs and build tests know of the checkout."""

from __future__ import annotations

import pathlib
import subprocess
import tomllib
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("cli", "ledger", "models", "node", "protocols")


def tracked() -> list[pathlib.Path]:
    """Files that are in git or would be with `git add`, relative to the root."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    paths = {pathlib.Path(name) for name in listing.split("\0") if name}
    return sorted(p for p in paths if (ROOT / p).is_symlink() or (ROOT / p).is_file())


def python_files(*folders: str) -> list[pathlib.Path]:
    """Tracked Python files, all or those below `folders`."""
    return [
        path
        for path in tracked()
        if path.suffix == ".py" and (not folders or path.parts[0] in folders)
    ]


def module_name(path: pathlib.Path) -> str:
    """`node/transport/__init__.py` -> `aivillage.node.transport`."""
    parts = path.with_suffix("").parts
    parts = parts if parts[0] == "aivillage" else ("aivillage", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())
