"""Peer ids are libp2p's; credits print exactly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aivillage.protocols.types import AMOUNT_MAX, as_credits, peer_id, public_key

# RFC 8032's first three public keys and the two extremes, named by py-libp2p 0.8.1.
VECTORS = {
    "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a": (
        "12D3KooWQK1wnefoLrcVHbbnf5tLzbopUd3K3bFAoJpA7YJgL5pV"
    ),
    "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c": (
        "12D3KooWDwTirQce1RRKnasT5fPVFgzXCy6SiRgSwrwPGLC7zE91"
    ),
    "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025": (
        "12D3KooWSoKFn4y7TtC1chE8CRkXdPZZfkjfNbTSUK5rjjp4oPHn"
    ),
    "00" * 32: "12D3KooW9pNAk8aiBuGVQtWRdbkLmo5qVL3e2h5UxbN2Nz9ttwiw",
    "ff" * 32: "12D3KooWT3gYEvLJyx1FyyHqrmvdy1tMjpgxmu9aSeKMEuafQtyC",
}
PEER = next(iter(VECTORS.values()))


@pytest.mark.parametrize(("key", "name"), VECTORS.items())
def test_a_key_has_the_name_that_libp2p_gives_it(key, name):
    assert peer_id(bytes.fromhex(key)) == name
    assert public_key(name) == bytes.fromhex(key)


@given(st.binary(min_size=32, max_size=32))
def test_a_key_comes_back_out_of_its_name(key):
    assert public_key(peer_id(key)) == key


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_key_of_another_size_has_no_name(size):
    with pytest.raises(ValueError, match="32 bytes"):
        peer_id(bytes(size))


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        PEER[:-1],
        PEER + "1",
        "1" + PEER,
        PEER[:-1] + "0",  # no base58 digit
        PEER[:-1] + "é",
        PEER.lower(),
        "z" * 52,
        "1" * 38,
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",  # an RSA key's name
        "2" * 10_000,
    ],
)
def test_what_is_no_ed25519_peer_id_is_refused(wrong):
    with pytest.raises(ValueError, match=r"peer id|base58"):
        public_key(wrong)


@given(st.text(max_size=70))
def test_any_text_is_a_peer_id_or_a_value_error(text):
    try:
        assert peer_id(public_key(text)) == text
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("amount", "shown"),
    [
        (0, "0"),
        (1, "0.000001"),
        (-269, "-0.000269"),
        (1_000_000, "1"),
        (1_234_500, "1.2345"),
        (-20_000_000, "-20"),
        (AMOUNT_MAX, "9007199254.740991"),
    ],
)
def test_credits_are_shown_exactly(amount, shown):
    assert as_credits(amount) == shown


@given(st.integers(-AMOUNT_MAX, AMOUNT_MAX))
def test_shown_credits_lose_nothing(amount):
    whole, _, fraction = as_credits(amount).lstrip("-").partition(".")
    assert int(whole) * 10**6 + int(fraction.ljust(6, "0")) == abs(amount)
    assert as_credits(amount).startswith("-") == (amount < 0)
