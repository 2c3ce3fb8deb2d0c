"""Which packages a node needs, and from which version on."""

from __future__ import annotations

from typing import Final

PACKAGES: Final = {
    "aiosqlite": ">=0.22",
    "apsw": ">=3.51.3",
    "cryptography": ">=48",
    "libp2p": "==0.8.1",
    "msgspec": ">=0.22",
    "platformdirs": ">=4",
    "pynacl": ">=1.6",
    "segno": ">=1.6",
    "trio": ">=0.35",
    "zeroconf": ">=0.150",
}
MODEL_PACKAGES: Final = {
    "gguf": ">=0.17",
    "jinja2": ">=3.1",
    "numpy": ">=2",
    "safetensors": ">=0.8",
    "tokenizers": ">=0.22",
    "torch": ">=2.13",
    "transformers": ">=5.24",
}
"""Both as in pyproject.toml; a test compares them."""
