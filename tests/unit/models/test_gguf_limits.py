"""GGUF headers at each limit, and one beyond."""

import struct

import pytest

from aivillage.models.inference import gguf_file
from aivillage.models.inference.gguf_file import GgufFile
from aivillage.protocols.errors import RequestError

STRING, ARRAY, U8 = 8, 9, 0


def text(value):
    return struct.pack("<Q", len(value)) + value


def file(tmp_path, *, fields=(), tensors=()):
    body = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    (tmp_path / "x").write_bytes(body + b"".join(fields) + b"".join(tensors) + bytes(64))
    return GgufFile(tmp_path / "x")


def flag(number):
    return text(b"f%d" % number) + struct.pack("<IB", U8, 1)


def tensor(number, rank=1, size=1):
    sizes = struct.pack("<Q", size) * rank
    return text(b"t%d" % number) + struct.pack("<I", rank) + sizes + struct.pack("<IQ", 0, 0)


@pytest.mark.parametrize(
    ("most", "made"),
    [
        (gguf_file.FIELDS_MAX, lambda n: {"fields": [flag(i) for i in range(n)]}),
        (gguf_file.TENSORS_MAX, lambda n: {"tensors": [tensor(i) for i in range(n)]}),
        (gguf_file.DIMENSIONS_MAX, lambda n: {"tensors": [tensor(0, rank=n)]}),
        (
            gguf_file.STRING_BYTES_MAX,
            lambda n: {"fields": [text(b"k") + struct.pack("<I", STRING) + text(b"a" * n)]},
        ),
        (
            gguf_file.ARRAY_ITEMS_MAX,
            lambda n: {"fields": [text(b"k") + struct.pack("<IIQ", ARRAY, U8, n) + bytes(n)]},
        ),
        (
            gguf_file.ALIGNMENT_BYTES_MAX,
            lambda n: {"fields": [text(b"general.alignment") + struct.pack("<II", 4, n)]},
        ),
    ],
    ids=["fields", "tensors", "dimensions", "string", "array", "alignment"],
)
def test_a_limit_holds_at_one_more(tmp_path, most, made):
    assert file(tmp_path, **made(most))
    with pytest.raises(RequestError, match="no whole GGUF"):
        file(tmp_path, **made(most + 1))
