"""safetensors, the container: names, shapes and places of tensors. Strangers' files go in here.

Every count is bounded before anything is built; tensors lie side by side and fill the file.

Source: huggingface/safetensors, README, "Format"; limits of its reference reader where stricter.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

import msgspec

from aivillage.protocols.errors import RequestError

LENGTH_BYTES: Final = 8
HEADER_BYTES_MAX: Final = 16 << 20
"""100,000 tensors with long names take half of it."""
TENSORS_MAX: Final = 100_000
DIMENSIONS_MAX: Final = 8
NAME_BYTES_MAX: Final = 512
TYPE_BYTES: Final = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "U8": 1,
    "BOOL": 1,
}
"""What is read; packed and 8-bit weights are not."""
_METADATA: Final = "__metadata__"


class TensorPlace(msgspec.Struct, frozen=True):
    """`begin` and `end` count from the end of the header."""

    name: str
    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> list[TensorPlace]:
    """Every tensor in `path`, in the order of its bytes; no tensor is read.

    Raises:
        RequestError: BAD_REQUEST, this is no whole safetensors file; TOO_LARGE, over a limit.
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if length > HEADER_BYTES_MAX:
                raise _too_large(path, f"a header of {length:,} bytes", HEADER_BYTES_MAX)
            if LENGTH_BYTES + length > size_bytes or length < 2:
                raise _broken(path, "it ends inside its header")
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(path, error) from None
    if not isinstance(header, dict):
        raise _broken(path, "its header is no table")
    header.pop(_METADATA, None)
    if len(header) > TENSORS_MAX:
        raise _too_large(path, f"{len(header):,} tensors", TENSORS_MAX)
    try:
        places = [_place(name, value) for name, value in header.items()]
        return _side_by_side(places, size_bytes - LENGTH_BYTES - length)
    except (ValueError, TypeError, KeyError) as error:
        raise _broken(path, error) from None


def _place(name: str, value: dict[str, Any]) -> TensorPlace:
    kind, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    if len(name.encode()) > NAME_BYTES_MAX:
        raise ValueError(f"a name of more than {NAME_BYTES_MAX} bytes")
    if kind not in TYPE_BYTES:
        raise ValueError(f"{name} is of type {kind!r}; {', '.join(TYPE_BYTES)} are read")
    numbers = [*shape, begin, end]
    if len(shape) > DIMENSIONS_MAX or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"the shape of {name} makes no sense")
    if any(size >= 1 << 40 for size in shape):
        raise ValueError(f"the shape of {name} makes no sense")
    found = TensorPlace(name, kind, tuple(shape), begin, end)
    if end - begin != found.count * TYPE_BYTES[kind]:
        raise ValueError(f"{name} has another number of bytes than its shape")
    return found


def _side_by_side(places: list[TensorPlace], size_bytes: int) -> list[TensorPlace]:
    """Raises: ValueError: there are holes, overlaps, or bytes that belong to nothing."""
    ordered = sorted(places, key=lambda place: (place.begin, place.end))
    at = 0
    for place in ordered:
        if place.begin != at:
            raise ValueError(f"{place.name} does not begin where the one before it ends")
        at = place.end
    if at != size_bytes:
        raise ValueError("its tensors do not fill the file: it was cut short, or has more in it")
    return ordered


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers could take different ones of two values."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in its header")
    return found


def _broken(path: Path, why: object) -> RequestError:
    return RequestError(
        f"{path.name} is no whole safetensors file: {why}", next_step="fetch the file again"
    )


def _too_large(path: Path, what: str, most: int) -> RequestError:
    return RequestError(
        f"{path.name} has {what}, at most {most:,} are read",
        code="TOO_LARGE",
        next_step="this is no model that runs here",
    )
