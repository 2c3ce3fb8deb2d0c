"""Evidence as a document: what a book holds against a payer, for anybody to check offline."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from aivillage.ledger.documents import (
    VERSION,
    Evidence,
    PayerPayee,
    Proof,
    SignedBodies,
    wrong,
)
from aivillage.protocols.envelope import Verify
from aivillage.protocols.errors import PeerError
from aivillage.protocols.types import PeerId, as_credits, peer_id
from aivillage.protocols.vouchers import SignedBody, VoucherBody, check_contradiction

KEPT: Final = """
  SELECT first_body, first_signature, second_body, second_signature FROM evidence
  WHERE payer = ? ORDER BY id
"""
ACCUSED: Final = "SELECT DISTINCT payer FROM evidence ORDER BY payer"


class Contradiction(NamedTuple):
    """Two bodies that one payer signed."""

    first: VoucherBody
    second: VoucherBody

    def __str__(self) -> str:
        (a, b), lane = self, self.first.lane.hex()
        said = [as_credits(body.cum) for body in self]
        if a.n != b.n:
            return f"on lane {lane} voucher {a.n} says {said[0]} in all, and {b.n} says {said[1]}"
        if a.cum != b.cum:
            return f"voucher {a.n} on lane {lane} says {said[0]} once, and {said[1]} once"
        return f"voucher {a.n} on lane {lane} says {said[0]} for different things"


def as_bodies(row: tuple[Any, ...]) -> SignedBodies:
    """`row`: as `KEPT` selects it."""
    names = SignedBodies.__struct_fields__
    return SignedBodies(**{n: value.hex() for n, value in zip(names, row, strict=True)})


def contradictions(document: Evidence, keys: PayerPayee, verify: Verify) -> list[Contradiction]:
    """What each proof says. `keys`: of issuer and peer.

    Raises:
        StatementError: the first that is no proof.
    """
    issuer, accused = keys
    found = []
    for number, proof in enumerate(document.proofs, 1):
        first = SignedBody(bytes.fromhex(proof.first_body), bytes.fromhex(proof.first_signature))
        second = SignedBody(bytes.fromhex(proof.second_body), bytes.fromhex(proof.second_signature))
        try:
            # One payee may have changed its key in between: then it is the issuer, and shows so.
            bodies = check_contradiction(accused, first, second, verify, families=(issuer,))
        except PeerError as error:
            raise wrong(f"proof {number} of {document.peer.peer}: {error.message}") from None
        found.append(Contradiction(*bodies))
    return found


def verify_evidence(document: Evidence, keys: PayerPayee, verify: Verify) -> Proof:
    """What `document` proves. `keys`: of issuer and peer.

    Raises:
        StatementError: the first proof in it that is none.
    """
    found = contradictions(document, keys, verify)
    accused = document.peer.peer
    payees = sorted({peer_id(one.first.payee) for one in found})
    return Proof(
        issuer=document.issuer.peer,
        peer=accused,
        amount=0,
        proven=(
            f"{accused} contradicted itself in writing to {', '.join(payees)},"
            f" {len(found)} times: " + "; ".join(map(str, found))
        ),
        not_proven=_not_proven(accused, changed=document.version != VERSION),
    )


def _not_proven(accused: PeerId, *, changed: bool) -> str:
    return (
        f"that its owner meant to: two running copies of {accused}, or one that was resumed from a"
        " snapshot, do so too. What is owed is the higher sum, and the payee has it"
        + ("; nor who held a key after it was replaced" if changed else "")
    )
