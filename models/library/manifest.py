"""What is known of one model on this machine: its files by hash, its sizes, its licence.

Written by `pull`, beside the files, from what the fenced inspection told. Pure but for one read.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from aivillage.models.inference.remote import is_remote
from aivillage.protocols.errors import ConfigError, RequestError

MANIFEST_FILE: Final = "manifest.json"
MANIFEST_BYTES_MAX: Final = 1 << 18
FILES_MAX: Final = 256
"""A model of 700 GB in shards of 5 GB has 140."""
NAME_CHARACTERS_MAX: Final = 64
_NAME: Final = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{NAME_CHARACTERS_MAX - 1}}}")
_FILE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
WEIGHTS: Final = (".gguf", ".safetensors")
TABLES: Final = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "model.safetensors.index.json",
    "modules.json", "sentence_bert_config.json", "pooling.json",
)  # fmt: skip
"""What belongs to a model beside its weights; nothing that is code, and nothing pickled."""
ENDPOINT_FILE: Final = "endpoint.json"
"""All there is of a model that answers elsewhere. Only its owner writes it: it is never pulled."""

Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
Format = Literal["gguf", "safetensors", "remote", "encoder", "ranker"]
"""The last two are safetensors that give vectors of texts, or scores of pairs of them."""


class ModelFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file, in the model's folder itself."""

    name: Annotated[str, msgspec.Meta(pattern=f"^{_FILE.pattern}$")]
    size_bytes: Size
    sha256: Sha256


class Facts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the inspection read in the files' headers.

    `active_parameters` are those that one token multiplies: experts that sit idle, the table of
    words and norms are no work. `memory_bytes` is what it takes loaded, with one full context.
    """

    format: Format
    architecture: Annotated[str, msgspec.Meta(max_length=64)]
    parameters: Size
    active_parameters: Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]
    vocabulary: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    context_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    end_token_ids: Annotated[tuple[int, ...], msgspec.Meta(min_length=1, max_length=16)]
    memory_bytes: Size
    licence: Annotated[str, msgspec.Meta(max_length=128)] = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model. `source` is what it can be pulled from again."""

    version: Literal[1] = 1
    name: Annotated[str, msgspec.Meta(pattern=f"^{_NAME.pattern}$")]
    source: Annotated[str, msgspec.Meta(max_length=4096)]
    facts: Facts
    files: Annotated[tuple[ModelFile, ...], msgspec.Meta(min_length=1, max_length=FILES_MAX)]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def weights(self) -> tuple[ModelFile, ...]:
        """The files that hold tensors, by name."""
        return weights_of(self.files)

    @property
    def sha256(self) -> str:
        """Of the weights: of the one file, or of the list of names and hashes of several."""
        return weights_digest(self.files)


def weights_of(files: tuple[ModelFile, ...]) -> tuple[ModelFile, ...]:
    found = [file for file in files if file.name.endswith((*WEIGHTS, ENDPOINT_FILE))]
    return tuple(sorted(found, key=lambda file: file.name))


def weights_digest(files: tuple[ModelFile, ...]) -> str:
    """What names the weights: for one file its sha-256, so that others compute the same."""
    weights = weights_of(files)
    if len(weights) == 1:
        return weights[0].sha256
    listing = "".join(f"{file.name} {file.sha256}\n" for file in weights)
    return hashlib.sha256(listing.encode()).hexdigest()


def is_name(name: str) -> bool:
    """Whether a model can be called that."""
    return _NAME.fullmatch(name) is not None


def require_name(name: str) -> str:
    """Raises: RequestError: no model can be called that."""
    if not is_name(name):
        raise RequestError(
            f"no model can be called {name[:80]!r}",
            next_step=f"--name with at most {NAME_CHARACTERS_MAX} letters, digits, '.', '_', '-'",
        )
    return name


def require_file_name(name: str) -> str:
    """Raises: RequestError: a file called that does not belong to a model."""
    if not _FILE.fullmatch(name) or not (name in TABLES or name.endswith(WEIGHTS)):
        raise RequestError(f"a file called {name[:80]!r} does not belong to a model")
    return name


def encode(manifest: Manifest) -> bytes:
    """The same manifest gives the same bytes: its hash names the model to other machines."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=1)


def decode(body: bytes) -> Manifest:
    """Raises: RequestError: this is no manifest that this version reads."""
    if len(body) > MANIFEST_BYTES_MAX:
        raise RequestError(f"a manifest has at most {MANIFEST_BYTES_MAX:,} bytes", code="TOO_LARGE")
    try:
        manifest = msgspec.json.decode(body, type=Manifest)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise RequestError(f"this is no manifest of a model: {error}") from None
    names = [file.name for file in manifest.files]
    kinds = manifest.facts.format == "remote", is_remote(manifest.name), names == [ENDPOINT_FILE]
    if any(kinds):
        if all(kinds):
            return manifest
        raise RequestError(f"{manifest.name} is half a model that answers elsewhere")
    if len({require_file_name(name) for name in names}) != len(names):
        raise RequestError("the manifest names a file twice")
    if not manifest.weights:
        raise RequestError("the manifest names no weights")
    return manifest


def read(folder: Path) -> Manifest:
    """The manifest of the model in `folder`.

    Raises:
        ConfigError: it is missing or damaged.
    """
    path = folder / MANIFEST_FILE
    try:
        with path.open("rb") as file:
            return decode(file.read(MANIFEST_BYTES_MAX + 1))
    except (OSError, RequestError) as error:
        raise ConfigError(
            f"the manifest of model {folder.name} cannot be read: {error}",
            next_step=f"aivillage-node models remove {folder.name}, then pull it again",
        ) from None
