"""What a signature is worth: this key, this purpose, these bytes, nothing else."""

from __future__ import annotations

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import example, given
from hypothesis import strategies as st

from aivillage.protocols.envelope import (
    ED25519,
    ENVELOPE_BYTES_MAX,
    is_signed_by,
    prefix,
    seal,
    sign,
    unseal,
)
from aivillage.protocols.errors import PeerError
from aivillage.protocols.messages import TaskAd
from aivillage.protocols.types import peer_id
from tests.unit.protocols.samples import PEER

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
PUBLIC = KEY.public_key().public_bytes_raw()
AD = TaskAd(buyer=PEER, seq=1, not_after_unix_ms=2, operation="mesh.noop")
SEALED = seal(KEY, "task", AD)
pack, parts_of = msgspec.msgpack.encode, msgspec.msgpack.decode


def _refused(envelope, domain="task", code="BAD_REQUEST"):
    with pytest.raises(PeerError) as caught:
        unseal(envelope, domain, TaskAd)
    assert caught.value.code == code
    return str(caught.value)


def _signed(body, key=KEY):
    public = key.public_key().public_bytes_raw()
    return pack([public, body, sign(key, prefix("task") + body)])


def test_an_envelope_says_who_signed_what():
    assert unseal(SEALED, "task", TaskAd) == (peer_id(PUBLIC), AD)


def test_sealing_twice_gives_the_same_bytes():
    assert seal(KEY, "task", AD) == SEALED


@pytest.mark.parametrize("domain", ["offer", "task/1", "", "tas", "task\0"])
def test_a_signature_made_for_one_purpose_is_worth_nothing_for_another(domain):
    assert "signature" in _refused(SEALED, domain)


def test_a_domain_cannot_reach_into_the_body():
    assert not prefix("a").startswith(prefix("a")[:-1] + b"/")
    assert prefix("task") == b"aivillage/task/1\0"


def test_a_signature_of_another_key_is_refused():
    _, body, signature = parts_of(SEALED)
    assert "signature" in _refused(pack([OTHER.public_key().public_bytes_raw(), body, signature]))


@given(st.integers(0, len(SEALED) - 1), st.integers(1, 255))
def test_no_byte_can_be_changed(at, flip):
    changed = bytearray(SEALED)
    changed[at] ^= flip
    _refused(bytes(changed))


def test_no_cut_is_accepted():
    for cut in range(len(SEALED)):
        _refused(SEALED[:cut])
    _refused(SEALED + b"\0")


def test_the_same_envelope_in_other_msgpack_is_refused():
    public, body, signature = parts_of(SEALED)
    long_form = b"\x93" + b"\xc5\x00\x20" + public + pack(body) + pack(signature)
    assert parts_of(long_form) == [public, body, signature]
    assert "canonical" in _refused(long_form)


@pytest.mark.parametrize("alg", [0, ED25519 + 1, 255])
def test_an_unknown_algorithm_is_a_no(alg):
    public, body, signature = parts_of(SEALED)
    assert "signature" in _refused(pack([public, body, bytes([alg]) + signature[1:]]))


@pytest.mark.parametrize("signature", [b"", b"\1", bytes(64), bytes([ED25519]) + bytes(64)])
def test_a_signature_of_another_shape_is_a_no(signature):
    public, body, _ = parts_of(SEALED)
    assert "signature" in _refused(pack([public, body, signature]))
    assert not is_signed_by(PUBLIC, b"text", signature)


def test_a_key_that_anybody_can_sign_for_is_a_no():
    neutral = bytes([1]) + bytes(31)  # of order one: R = [S]B + [h]A holds for R = B, S = 1
    base = bytes([0x58]) + bytes([0x66]) * 31
    assert not is_signed_by(neutral, b"text", bytes([1]) + base + bytes([1]) + bytes(31))


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_key_of_another_size_is_a_no(size):
    assert not is_signed_by(PUBLIC[:size].ljust(size, b"\0"), b"text", sign(KEY, b"text"))
    _, body, signature = parts_of(SEALED)
    _refused(pack([PUBLIC[:size].ljust(size, b"\0"), body, signature]))


def test_a_fourth_part_is_refused():
    _refused(pack([*parts_of(SEALED), b"more"]))


def test_an_honestly_signed_body_of_another_kind_is_refused():
    assert "not an envelope of TaskAd" in _refused(_signed(pack({"seq": "one"})))


def test_an_honestly_signed_bottomless_body_is_refused():
    assert "recursion" in _refused(_signed(b"\x81\xa1x" + b"\x91" * 7_000 + b"\xc0"))


def test_a_body_may_carry_fields_of_a_later_version():
    body = pack(msgspec.to_builtins(AD) | {"since_1_1": 1})
    assert unseal(_signed(body), "task", TaskAd) == (peer_id(PUBLIC), AD)


def test_the_largest_envelope_is_read_and_one_byte_more_is_not():
    def sized(total):
        text = "x" * (total - len(seal(KEY, "task", msgspec.structs.replace(AD, operation=""))))
        for shorter in range(8):
            envelope = seal(KEY, "task", msgspec.structs.replace(AD, operation=text[shorter:]))
            if len(envelope) == total:
                return envelope
        raise AssertionError(total)

    assert unseal(sized(ENVELOPE_BYTES_MAX), "task", TaskAd)[0] == peer_id(PUBLIC)
    _refused(sized(ENVELOPE_BYTES_MAX + 1), code="TOO_LARGE")


@given(st.binary(max_size=300))
@example(b"\x93\xc4\x00\xc4\x00\xc4\x00")
def test_any_bytes_are_refused_without_another_exception(data):
    _refused(data)


def test_a_signature_is_over_every_byte_it_was_made_for():
    signature = sign(KEY, b"text")
    assert is_signed_by(PUBLIC, b"text", signature)
    assert not is_signed_by(PUBLIC, b"texts", signature)
    assert not is_signed_by(PUBLIC, b"", signature)
