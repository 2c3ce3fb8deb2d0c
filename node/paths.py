"""Where everything of a node lives."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import msgspec
import platformdirs


class Paths(msgspec.Struct, frozen=True):
    """All places of one node. `cache` is shared by the nodes of one user: weights are large."""

    data_dir: Path
    socket: Path
    cache: Path

    @property
    def config(self) -> Path:
        return self.data_dir / "config.toml"

    @property
    def key(self) -> Path:
        return self.data_dir / "identity.key"

    @property
    def ledger(self) -> Path:
        return self.data_dir / "ledger.db"

    @property
    def jobs(self) -> Path:
        return self.data_dir / "jobs.db"

    @property
    def blobs(self) -> Path:
        return self.data_dir / "blobs"

    @property
    def models(self) -> Path:
        return self.data_dir / "models"

    @property
    def scratch(self) -> Path:
        return self.data_dir / "scratch"

    def listing(self) -> dict[str, str]:
        """Name -> path, for `aivillage-node paths`."""
        names = ("data_dir", "config", "key", "ledger", "jobs", "blobs", "models", "scratch")
        found = {name: str(getattr(self, name)) for name in names}
        return found | {"socket": str(self.socket), "cache": str(self.cache)}


def paths(data_dir: str | None) -> Paths:
    """The places of the node in `data_dir`, by default the user's own."""
    text = (
        data_dir or os.environ.get("AIVILLAGE_DATA_DIR") or platformdirs.user_data_dir("aivillage")
    )
    folder = Path(text).expanduser().absolute()
    cache = os.environ.get("AIVILLAGE_CACHE_DIR") or platformdirs.user_cache_dir("aivillage")
    return Paths(folder, _socket(folder), Path(cache).expanduser().absolute())


def _socket(data_dir: Path) -> Path:
    """A short path, since a Unix socket's ends at 108 bytes; one per data folder and user."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime) if runtime else Path(tempfile.gettempdir()) / f"aivillage-{os.getuid()}"
    name = hashlib.sha256(str(data_dir).encode()).hexdigest()[:12]
    return folder / f"aivillage-{name}.sock"
