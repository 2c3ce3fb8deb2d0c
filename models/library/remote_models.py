"""Puts a model that answers elsewhere into the library: an endpoint and a manifest, no weights."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Final

import msgspec

from aivillage.models.durable import sync_folder
from aivillage.models.inference import endpoint, remote
from aivillage.models.inference.endpoint import Endpoint
from aivillage.models.library import manifest as manifests
from aivillage.models.library.manifest import ENDPOINT_FILE, Facts, Manifest, ModelFile
from aivillage.models.library.store import DRAFT_PREFIX, Library
from aivillage.protocols.errors import ConfigError, RequestError
from aivillage.protocols.pricing import FLOPS_PER_MICRO_CREDIT

MEMORY_BYTES: Final = 200_000_000
"""Of the worker that asks: no weights, some connections."""
PRICE_MAX: Final = 10_000_000
"""Micro-credits of 3 bytes: ten credits, beyond any model's."""


def add(
    library: Library, name: str, found: Endpoint, *, price_micro_credits: int, context_tokens: int
) -> Manifest:
    """Offers `name` from now on. `price_micro_credits`: of a unit, before the owner's percentage.

    Raises:
        RequestError: the name is taken or none for it, or a number is out of range.
        ConfigError: the key cannot be used, or the folder cannot.
    """
    endpoint.key_of(found)
    if not remote.is_remote(manifests.require_name(name)):
        raise RequestError(
            f"whoever asks {name} would not see that it answers elsewhere",
            next_step=f"call it {remote.NAME_PREFIX}{name}",
        )
    if not 1 <= price_micro_credits <= PRICE_MAX:
        raise RequestError(f"a price is 1 to {PRICE_MAX:,} micro-credits")
    body = msgspec.json.format(msgspec.json.encode(found), indent=1)
    file = ModelFile(
        name=ENDPOINT_FILE, size_bytes=len(body), sha256=hashlib.sha256(body).hexdigest()
    )
    facts = Facts(
        format="remote",
        architecture="openai",
        parameters=0,
        active_parameters=price_micro_credits * FLOPS_PER_MICRO_CREDIT // 2,
        vocabulary=remote.VOCABULARY,
        context_tokens=context_tokens,
        end_token_ids=(remote.END_TOKEN_ID,),
        memory_bytes=MEMORY_BYTES,
    )
    manifest = Manifest(name=name, source=f"openai:{found.model}", facts=facts, files=(file,))
    encoded = manifests.encode(manifest)
    manifests.decode(encoded)  # what cannot be read again is not written
    _put(library.folder / name, {ENDPOINT_FILE: body, manifests.MANIFEST_FILE: encoded})
    return manifest


def _put(place: Path, files: dict[str, bytes]) -> None:
    """All of them at once, or none; readable by the owner alone.

    Raises:
        RequestError: something of that name is there. ConfigError: it cannot be written.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():
            raise RequestError(
                f"a model called {place.name} is here already",
                next_step=f"aivillage-node models remove {place.name}",
            )
        draft = Path(tempfile.mkdtemp(prefix=DRAFT_PREFIX, dir=place.parent))
        for name, body in files.items():
            descriptor = os.open(draft / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(draft)
        draft.rename(place)
        sync_folder(place.parent)
    except OSError as error:
        raise ConfigError(
            f"{place} cannot be written: {error.strerror}", next_step="aivillage-node doctor"
        ) from None
