"""Who may follow whom: what both keys signed, in a chain that leads to the peer."""

import msgspec
import pytest

from aivillage.protocols import succession
from aivillage.protocols.envelope import seal
from aivillage.protocols.errors import PeerError
from aivillage.protocols.messages import SUCCESSIONS_MAX
from aivillage.protocols.papers import Succession
from tests.conftest import make_key, make_peer


def step(old, new):
    return succession.make(make_key(old), make_key(new), 1)


def changed(envelope, signer=None, **changes):
    body = msgspec.msgpack.decode(msgspec.msgpack.decode(envelope)[1], type=Succession)
    return seal(make_key(signer or 1), "succession", msgspec.structs.replace(body, **changes))


def test_a_change_of_key_says_who_follows_whom():
    envelope = step(1, 2)
    assert succession.read(envelope) == (make_peer(1), make_peer(2), envelope)


@pytest.mark.parametrize(
    "forged",
    [
        changed(step(1, 2), signer=3),  # a stranger speaks for the old key
        changed(step(1, 2), old=make_peer(3)),
        changed(step(1, 2), new=make_peer(3)),  # somebody who did not consent
        changed(step(1, 2), at_unix_ms=5),
        changed(step(1, 2), consent=b""),
        changed(step(1, 2), new="nobody"),
        changed(step(1, 1)),
        step(1, 2)[:-1] + b"\xff",
        b"",
    ],
)
def test_a_succession_that_one_of_the_keys_did_not_sign_is_refused(forged):
    with pytest.raises(PeerError):
        succession.read(forged)
    assert succession.chain([forged], make_peer(2)) == []


def test_a_chain_is_put_in_order_and_ends_at_the_peer():
    steps = [step(2, 3), b"junk", step(1, 2), step(3, 9)]
    found = succession.chain(steps, make_peer(3))
    assert [(one.old, one.new) for one in found] == [
        (make_peer(1), make_peer(2)),
        (make_peer(2), make_peer(3)),
    ]
    assert succession.chain(steps, make_peer(4)) == []


def test_keys_that_name_each_other_end():
    found = succession.chain([step(1, 2), step(2, 1)], make_peer(1))
    assert [one.new for one in found] == [make_peer(2), make_peer(1)]


def test_no_more_changes_are_looked_at_than_a_hello_may_carry():
    junk = [step(8, 9)] * SUCCESSIONS_MAX
    assert succession.chain([*junk, step(1, 2)], make_peer(2)) == []
    assert succession.chain([*junk[1:], step(1, 2)], make_peer(2))
