"""Who signs for a book: by libsodium, and nobody can tell from the bytes."""

from hypothesis import given
from hypothesis import strategies as st

from aivillage.protocols.envelope import sign
from tests.unit.ledger.test_steps import A_KEY, A, B


@given(st.binary(max_size=600))
def test_a_book_signs_as_every_envelope_is_signed(prefixed):
    signature = A.sign(prefixed)
    assert signature == sign(A_KEY, prefixed)
    assert A.verify(A.public_key, prefixed, signature)
    assert not A.verify(B.public_key, prefixed, signature)
    assert not A.verify(A.public_key, prefixed + b".", signature)
