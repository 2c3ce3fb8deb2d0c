"""Vectors as bytes: float32, little endian. Pure, and without numpy: whoever pays looks at them."""

from __future__ import annotations

import array
import math
import sys
from collections.abc import Iterable
from typing import Final

FLOAT_BYTES: Final = 4
NORM_MISS_MAX: Final = 1e-4
"""Of a vector of unit length; rounding to float32 misses by less than a millionth."""
DISTANCE_MAX: Final = 1e-4
"""Between one text's vectors of two honest machines, whose kernels round otherwise: some 1e-6 was
measured. Weights in bfloat16 or 8 bits are ten times further off and more."""


def packed(numbers: Iterable[float]) -> bytes:
    found = array.array("f", numbers)
    if sys.byteorder == "big":
        found.byteswap()
    return found.tobytes()


def numbers(body: bytes) -> array.array[float]:
    """Raises: ValueError: no whole number of them."""
    found = array.array("f")
    found.frombytes(body)
    if sys.byteorder == "big":
        found.byteswap()
    return found


def fault(body: bytes, dimension: int) -> str:
    """Why `body` is no vector of unit length with so many numbers; empty: it is one."""
    if len(body) != FLOAT_BYTES * dimension:
        return f"it has {len(body)} bytes where {dimension} numbers were said"
    length = math.sqrt(math.fsum(number * number for number in numbers(body)))
    if not abs(length - 1) <= NORM_MISS_MAX:  # what is no number fails this too
        return f"its length is {length:.6f}"
    return ""


def distance(first: bytes, second: bytes) -> float:
    """Euclidean; infinite where they have different lengths."""
    if first == second:
        return 0.0
    if len(first) != len(second):
        return math.inf
    pairs = zip(numbers(first), numbers(second), strict=True)
    return math.sqrt(math.fsum((one - other) ** 2 for one, other in pairs))


def dot(first: bytes, second: bytes) -> float:
    """Of two of unit length their cosine."""
    return math.fsum(a * b for a, b in zip(numbers(first), numbers(second), strict=True))
