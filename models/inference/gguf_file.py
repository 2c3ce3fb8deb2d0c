"""GGUF, the container: header, metadata and where each tensor lies. Strangers' files go in here.

Every count is bounded before anything is built, and every tensor must lie inside the file.

Source: ggml, docs/gguf.md, versions 2 and 3, little endian.
"""

from __future__ import annotations

import functools
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import msgspec

from aivillage.protocols.errors import RequestError

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
TENSORS_MAX: Final = 100_000
FIELDS_MAX: Final = 10_000
ARRAY_ITEMS_MAX: Final = 2_000_000
STRING_BYTES_MAX: Final = 1 << 20
DIMENSIONS_MAX: Final = 4
ALIGNMENT_BYTES_MAX: Final = 1 << 16

_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?",
                   10: "Q", 11: "q", 12: "d"}  # fmt: skip
_STRING: Final = 8
_ARRAY: Final = 9


class TensorInfo(msgspec.Struct, frozen=True):
    """`shape` is outermost first, as torch has it; `offset_bytes` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset_bytes: int

    @property
    def count(self) -> int:
        return functools.reduce(lambda product, size: product * size, self.shape, 1)


class GgufFile:
    """A mapped GGUF file. Tensor bytes are views of the mapping: nothing is read before use."""

    def __init__(self, path: Path) -> None:
        """Raises: RequestError: BAD_REQUEST, this is no whole GGUF file."""
        try:
            with path.open("rb") as file:
                self.mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.metadata, self.tensors = _parse(self.mapping)
        except (OSError, ValueError, struct.error, UnicodeDecodeError, OverflowError) as error:
            raise RequestError(
                f"{path.name} is no whole GGUF file: {error}", next_step="fetch the file again"
            ) from None

    def field(self, name: str, kind: type[Any]) -> Any:
        """One metadata value of type `kind` (int, float, str, bool, list).

        Raises:
            RequestError: it is missing or of another type.
        """
        value = self.metadata.get(name)
        if not isinstance(value, kind):
            raise RequestError(f"the GGUF file has no {kind.__name__} called {name}")
        return value

    def tensor(self, name: str) -> TensorInfo:
        """Raises: RequestError: there is no such tensor."""
        if name not in self.tensors:
            raise RequestError(f"the GGUF file has no tensor called {name}")
        return self.tensors[name]

    def bytes_of(self, tensor: TensorInfo, size_bytes: int) -> memoryview:
        """The first `size_bytes` of `tensor`.

        Raises:
            RequestError: the file ends before them.
        """
        end = tensor.offset_bytes + size_bytes
        if end > len(self.mapping):
            raise RequestError(f"the GGUF file ends inside {tensor.name}: it was cut short")
        return memoryview(self.mapping)[tensor.offset_bytes : end]


class _Cursor:
    """Reads forward; a read past the end is a `struct.error`."""

    def __init__(self, source: mmap.mmap) -> None:
        self.source = source
        self.at = 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.source, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        size_bytes = _bounded(self.scalar("Q"), STRING_BYTES_MAX, "bytes in a string")
        start, self.at = self.at, self.at + size_bytes
        if self.at > len(self.source):
            raise ValueError("it ends inside a string")
        return self.source[start : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise ValueError(f"unknown value type {kind}")
        return self.scalar(_SCALARS[kind])

    def array(self) -> list[Any]:
        kind = self.scalar("I")
        count = _bounded(self.scalar("Q"), ARRAY_ITEMS_MAX, "items in an array")
        if kind in _SCALARS:
            layout = f"<{count}{_SCALARS[kind]}"
            values = list(struct.unpack_from(layout, self.source, self.at))
            self.at += struct.calcsize(layout)
            return values
        if kind != _STRING:
            raise ValueError(f"an array of value type {kind}")
        return [self.text() for _ in range(count)]


def _parse(source: mmap.mmap) -> tuple[Mapping[str, Any], Mapping[str, TensorInfo]]:
    cursor = _Cursor(source)
    if source[:4] != MAGIC:
        raise ValueError("it does not begin with GGUF")
    cursor.at = 4
    if (version := cursor.scalar("I")) not in VERSIONS:
        raise ValueError(f"version {version} is unknown")
    tensor_count = _bounded(cursor.scalar("Q"), TENSORS_MAX, "tensors")
    field_count = _bounded(cursor.scalar("Q"), FIELDS_MAX, "metadata fields")
    metadata = {cursor.text(): cursor.value(cursor.scalar("I")) for _ in range(field_count)}
    infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= ALIGNMENT_BYTES_MAX:
        raise ValueError("the alignment makes no sense")
    base = -(-cursor.at // alignment) * alignment
    placed = {
        info.name: msgspec.structs.replace(info, offset_bytes=base + info.offset_bytes)
        for info in infos
    }
    return MappingProxyType(metadata), MappingProxyType(placed)


def _tensor_info(cursor: _Cursor) -> TensorInfo:
    name = cursor.text()
    rank = _bounded(cursor.scalar("I"), DIMENSIONS_MAX, "dimensions")
    shape = tuple(reversed([cursor.scalar("Q") for _ in range(rank)]))
    if any(not 1 <= size < 1 << 40 for size in shape):
        raise ValueError(f"the shape of {name} makes no sense")
    return TensorInfo(name, shape, cursor.scalar("I"), cursor.scalar("Q"))


def _bounded(count: int, most: int, what: str) -> int:
    if count > most:
        raise ValueError(f"{count} {what}, at most {most} are read")
    return count
