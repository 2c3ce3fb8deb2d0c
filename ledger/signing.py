"""Who signs for this book. A structural type, so that a simulation can bring its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import product
from typing import Protocol, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.protocols.envelope import Verify, is_signed_by, sign
from aivillage.protocols.errors import PeerError
from aivillage.protocols.vouchers import (
    Receipt,
    ReceiptBody,
    Voucher,
    VoucherBody,
    check_receipt,
    check_voucher,
)

T = TypeVar("T")


class Signer(Protocol):
    @property
    def public_key(self) -> bytes: ...

    def sign(self, prefixed: bytes) -> bytes: ...

    def verify(self, public_key: bytes, prefixed: bytes, signature: bytes) -> bool: ...


class Ed25519Signer:
    """Signs with the key of the node's peer id."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes_raw()

    def sign(self, prefixed: bytes) -> bytes:
        return sign(self._key, prefixed)

    def verify(self, public_key: bytes, prefixed: bytes, signature: bytes) -> bool:
        return is_signed_by(public_key, prefixed, signature)


def verified_voucher(
    voucher: Voucher, payers: Sequence[bytes], payees: Sequence[bytes], verify: Verify
) -> VoucherBody:
    """The body, if any key of the payer signed it to any key of the payee.

    Raises:
        PeerError: BAD_REQUEST, what is wrong by the keys in force, which come first.
    """
    return _by_any_key(
        lambda payer, payee: check_voucher(voucher, payer, payee, verify, former=(payers, payees)),
        payers,
        payees,
    )


def verified_receipt(
    receipt: Receipt, payers: Sequence[bytes], payees: Sequence[bytes], verify: Verify
) -> ReceiptBody:
    """The body, if any key of the payee signed it to any key of the payer.

    Raises:
        PeerError: BAD_REQUEST, what is wrong by the keys in force, which come first.
    """
    return _by_any_key(
        lambda payer, payee: check_receipt(receipt, payer, payee, verify), payers, payees
    )


def _by_any_key(
    check: Callable[[bytes, bytes], T], payers: Sequence[bytes], payees: Sequence[bytes]
) -> T:
    in_force, *former = product(payers, payees)
    try:
        return check(*in_force)
    except PeerError:
        for pair in former:
            with suppress(PeerError):  # the keys in force say what is wrong
                return check(*pair)
        raise
