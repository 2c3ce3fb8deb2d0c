"""What a fingerprint is, and what it refuses to be."""

from __future__ import annotations

import math
import struct

import pytest

from aivillage.models.inference.fingerprint import (
    SPAN_BYTES_MAX,
    SPAN_TOKENS_MAX,
    Fingerprint,
    family,
    in_order,
    packed,
    read,
    require_span,
)
from aivillage.protocols.errors import RequestError
from aivillage.protocols.job import FINGERPRINT_BYTES_MAX


def of(first, count):
    return packed(Fingerprint(first, (1.5,) * count))


def test_it_is_133_bytes_for_32_tokens_and_fits_a_step():
    assert len(of(0, SPAN_TOKENS_MAX)) == SPAN_BYTES_MAX == 133 <= FINGERPRINT_BYTES_MAX
    assert read(of(7, SPAN_TOKENS_MAX)) == Fingerprint(7, (1.5,) * SPAN_TOKENS_MAX)


@pytest.mark.parametrize("count", [0, SPAN_TOKENS_MAX + 1])
def test_it_is_of_1_to_32_tokens(count):
    assert read(of(0, 1)).end == 1
    with pytest.raises(RequestError, match="bytes"):
        read(of(0, count))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0" * 4,
        of(0, 2)[:-1],
        struct.pack(">IB2f", 0, 3, 1, 2),
        struct.pack(">IBf", 0, 1, math.nan),
        struct.pack(">IBf", 0, 1, math.inf),
    ],
)
def test_what_is_none_is_refused(body):
    with pytest.raises(RequestError):
        read(body)


def test_it_begins_where_the_one_before_it_ended():
    assert require_span(of(32, 5), 32, 37) == 37
    for first, tokens in ((31, 37), (33, 38), (0, 37)):
        with pytest.raises(RequestError, match="where it begins"):
            require_span(of(32, 5), first, tokens)


def test_it_is_of_tokens_that_are_there():
    assert require_span(of(0, 5), 0, 5) == 5
    with pytest.raises(RequestError, match="4 are there"):
        require_span(of(0, 5), 0, 4)


def test_those_of_an_answer_lie_in_order_and_within_it():
    assert [s.first for s in in_order((of(0, 32), of(40, 2)), 42)] == [0, 40]
    for bodies, tokens in (((of(0, 32), of(31, 2)), 42), ((of(40, 2),), 41)):
        with pytest.raises(RequestError, match="wrong span"):
            in_order(bodies, tokens)


def test_a_family_is_weights_and_number_type_of_our_own_engine():
    name = "torch1/2.13.0/{}/{}/cpu/AVX2/threads1/rows/0"
    assert family(name.format("ab", "float32")) == family(
        "torch2/2.14/ab/float32/cpu/AVX512/threads2/other/1"
    )
    assert family(name.format("ab", "float32")) != family(name.format("cd", "float32"))
    assert family(name.format("ab", "bfloat16")) == family("scripted/1") == family("") == ""


def test_engines_that_compute_in_float32_are_of_one_family_and_one_that_rounded_is_not():
    rest = "v/ab/float32/cpu/x"
    assert family(f"openvino2/{rest}") == family(f"torch1/{rest}") == "ab/float32"
    assert family(f"openvino1/{rest}") == family(f"openai1/{rest}") == ""
