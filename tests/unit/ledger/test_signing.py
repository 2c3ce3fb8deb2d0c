"""Who signs for a book: by libsodium, and nobody can tell from the bytes."""

from hypothesis import given
from hypothesis import strategies as st

from aivillage.protocols.envelope import ED25519
from tests.unit.ledger.test_steps import A_KEY, A, B


@given(st.binary(max_size=600))
def test_a_signature_is_byte_for_byte_what_openssl_signs(prefixed):
    signature = A.sign(prefixed)
    assert signature == bytes([ED25519]) + A_KEY.sign(prefixed)
    assert A.verify(A.public_key, prefixed, signature)
    assert not A.verify(B.public_key, prefixed, signature)
    assert not A.verify(A.public_key, prefixed + b".", signature)
