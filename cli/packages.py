"""Which packages a node needs, from which version on, and which are here."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sysconfig
from pathlib import Path
from typing import Final

PACKAGES: Final = {
    "aiosqlite": ">=0.22",
    "apsw": ">=3.51.3",
    "cryptography": ">=48",
    "libp2p": "==0.8.1",
    "msgspec": ">=0.22",
    "platformdirs": ">=4",
    "pycryptodome": ">=3.20",
    "pynacl": ">=1.6",
    "segno": ">=1.6",
    "trio": ">=0.35",
    "zeroconf": ">=0.150",
}
MODEL_PACKAGES: Final = {
    "gguf": ">=0.17",
    "jinja2": ">=3.1",
    "numpy": ">=2",
    "openvino": ">=2026.4.1",
    "safetensors": ">=0.8",
    "llguidance": "==1.9.1",
    "tokenizers": ">=0.22",
    "torch": ">=2.13",
    "transformers": ">=5.24",
}
"""Both as in pyproject.toml; a test compares them."""


def installed(package: str) -> str | None:
    """The version that pip knows; None: it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def fits(version: str, wish: str) -> bool:
    """Whether `version` satisfies one `==` or `>=`; a local part such as `+cpu` does not count."""
    have = numbers(version.partition("+")[0])
    if wish.startswith("=="):
        return version.partition("+")[0] == wish[2:]
    return have >= numbers(wish[2:])


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:4])


def headers_missing() -> dict[str, str]:
    """What compiling fastecdsa, which libp2p needs, lacks here -> its Debian package."""
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    folders = ("/usr/include", f"/usr/include/{multiarch}", "/usr/local/include")
    lacks = {}
    if not (shutil.which("gcc") or shutil.which("cc")):
        lacks["a C compiler"] = "gcc"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        lacks["Python.h"] = "python3-dev"
    if not any((Path(folder) / "gmp.h").exists() for folder in folders):
        lacks["gmp.h"] = "libgmp-dev"
    return lacks
