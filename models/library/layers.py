"""What splitting a pulled model needs to know of its layers, beside the manifest and no part of it.

The inspection read it in the weights of this very machine. The manifest travels, its hash names the
model, and an earlier version refuses one that says more than it knows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import msgspec

LAYERS_FILE: Final = "layers.json"
FILE_BYTES_MAX: Final = 4_096
LAYERS_MAX: Final = 1024
PACKING_BYTES_INCLUDED: Final = 120_000_000
"""The packaged model's head is 113 MB."""
WIDTH_MAX: Final = 8_000
"""32 rows of float32 states, the most that travel at once, fit into a frame of 1 MiB."""

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]


class LayerFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of layers that are all alike.

    `layer_parameters` and `head_parameters` count what one token multiplies; `context_bytes` are
    the keys and values of one full context, all layers together.
    """

    layers: Annotated[int, msgspec.Meta(ge=1, le=LAYERS_MAX)]
    width: Annotated[int, msgspec.Meta(ge=1, le=WIDTH_MAX)]
    layer_parameters: Count
    head_parameters: Count
    context_bytes: Count


def packing_bytes(layer_parameters: int, head_parameters: int) -> int:
    """What loading takes for a moment beyond what stays, and beyond what any process needs.

    Two layers, as they are read and as they are joined; or the head, unpacked.
    """
    return max(0, 4 * max(2 * layer_parameters, head_parameters) - PACKING_BYTES_INCLUDED)


def encode(facts: LayerFacts) -> bytes:
    return msgspec.json.encode(facts)


def read(folder: Path) -> LayerFacts | None:
    """Of the model in `folder`; None: it was pulled by an earlier version, or cannot be split."""
    try:
        with (folder / LAYERS_FILE).open("rb") as file:
            return msgspec.json.decode(file.read(FILE_BYTES_MAX), type=LayerFacts)
    except (OSError, msgspec.DecodeError):
        return None
