"""Invites and certificates: who belongs, and what a forger can do about it."""

import base64

import msgspec
import pytest

from aivillage.node import village
from aivillage.node.village import DAY_MS, TOKEN_PREFIX
from aivillage.protocols.envelope import seal
from aivillage.protocols.errors import RefusedError, RequestError
from aivillage.protocols.messages import CERTIFICATES_MAX
from aivillage.protocols.papers import Certificate, Invite
from tests.conftest import make_key, make_peer

NOW = 1_800_000_000_000
FOUNDER, DEPUTY, GUEST, OTHER = 1, 2, 3, 4
VILLAGE = village.village_of(make_peer(FOUNDER))


def token(by=FOUNDER, line=500):
    return village.make_invite(make_key(by), VILLAGE, ("/memory/x/p2p/y",), line, NOW)


def certificate(issuer, member, *, signer=None, line=100, days=1, may_invite=False, of=VILLAGE):
    body = Certificate(
        village=of,
        issuer=make_peer(issuer),
        member=make_peer(member),
        line_micro_credits=line,
        not_after_unix_ms=NOW + days * DAY_MS,
        may_invite=may_invite,
    )
    return seal(make_key(signer or issuer), "certificate", body)


def line_of(*certificates, peer=GUEST, now=NOW):
    return village.membership(certificates, [make_peer(peer)], VILLAGE, now)


def test_an_invite_comes_back_as_it_was_made():
    invite = village.read_invite("  " + token() + "\n")
    assert (invite.village, invite.inviter) == (VILLAGE, make_peer(FOUNDER))
    assert (invite.addresses, invite.line_micro_credits) == (("/memory/x/p2p/y",), 500)
    assert invite.not_after_unix_ms == NOW + 7 * DAY_MS
    assert len(invite.nonce) == 16
    assert village.read_invite(token()).nonce != invite.nonce


def test_a_redeemed_invite_makes_a_member_with_the_promised_line():
    nonce, body = village.redeem(make_key(FOUNDER), token(), make_peer(GUEST), NOW)
    assert len(nonce) == 16
    assert line_of(body) == 500
    assert line_of(body, peer=OTHER) is None
    assert (
        village.membership([body], [make_peer(GUEST)], village.village_of(make_peer(5)), NOW)
        is None
    )


def test_an_invite_is_good_to_its_last_moment_and_not_after():
    end = NOW + 7 * DAY_MS
    village.redeem(make_key(FOUNDER), token(), make_peer(GUEST), end)
    with pytest.raises(RefusedError, match="expired"):
        village.redeem(make_key(FOUNDER), token(), make_peer(GUEST), end + 1)


def test_only_its_maker_redeems_an_invite():
    with pytest.raises(RefusedError, match="another node"):
        village.redeem(make_key(OTHER), token(), make_peer(GUEST), NOW)


def test_an_invite_signed_by_somebody_else_is_refused():
    genuine = village.read_invite(token())
    forged = seal(make_key(OTHER), "invite", genuine)
    text = TOKEN_PREFIX + base64.urlsafe_b64encode(forged).decode().rstrip("=")
    with pytest.raises(RequestError, match="somebody else"):
        village.read_invite(text)


def test_a_certificate_is_no_invite():
    text = TOKEN_PREFIX + base64.urlsafe_b64encode(certificate(FOUNDER, GUEST)).decode().rstrip("=")
    with pytest.raises(RequestError):
        village.read_invite(text)


def test_a_token_changed_in_any_byte_is_refused():
    """Every place in key, body and signature, and in the text around them."""
    good = token()
    raw = base64.urlsafe_b64decode(good.removeprefix(TOKEN_PREFIX) + "==")
    for place in range(len(raw)):
        for change in (1, 0x80):
            bad = bytearray(raw)
            bad[place] ^= change
            text = TOKEN_PREFIX + base64.urlsafe_b64encode(bytes(bad)).decode().rstrip("=")
            with pytest.raises(RequestError):
                village.read_invite(text)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[:-1],
        lambda t: t + "A",
        lambda t: t[:40] + t[41:],
        lambda t: t[:40] + "é" + t[41:],
        lambda t: t[:40] + "=" + t[41:],
        lambda t: t.replace("aiv1.", "aiv2."),
        lambda t: t[5:],
        lambda _: "",
        lambda _: "aiv1.",
        lambda t: t + "A" * 5000,
    ],
)
def test_a_token_that_was_cut_or_typed_wrong_is_refused_with_advice(change):
    with pytest.raises(RequestError) as caught:
        village.read_invite(change(token()))
    assert "copy the whole token" in caught.value.next_step


def test_the_founder_belongs_without_papers_and_nobody_else_does():
    assert line_of(peer=FOUNDER) == 2**53 - 1
    assert line_of() is None


def test_a_chain_of_delegates_leads_to_the_founder_and_its_weakest_promise_counts():
    deputy = certificate(FOUNDER, DEPUTY, line=70, may_invite=True)
    assert line_of(certificate(DEPUTY, GUEST, line=100), deputy) == 70
    assert line_of(deputy, certificate(DEPUTY, GUEST, line=50)) == 50
    assert line_of(certificate(DEPUTY, GUEST)) is None


def test_a_member_who_may_not_invite_invites_nobody():
    assert line_of(certificate(FOUNDER, DEPUTY), certificate(DEPUTY, GUEST)) is None


def test_a_certificate_counts_to_its_last_moment_in_every_link_of_the_chain():
    deputy = certificate(FOUNDER, DEPUTY, days=1, may_invite=True)
    guest = certificate(DEPUTY, GUEST, days=2)
    assert line_of(guest, deputy, now=NOW + DAY_MS) == 100
    assert line_of(guest, deputy, now=NOW + DAY_MS + 1) is None


@pytest.mark.parametrize(
    "forged",
    [
        certificate(FOUNDER, GUEST, signer=OTHER),
        certificate(OTHER, GUEST),
        certificate(GUEST, GUEST, may_invite=True),
        certificate(FOUNDER, GUEST, of=bytes(32)),
        certificate(FOUNDER, GUEST)[:-1] + b"\0",
        b"",
    ],
)
def test_a_forged_certificate_counts_for_nothing_and_hides_nothing(forged):
    assert line_of(forged) is None
    assert line_of(forged, certificate(FOUNDER, GUEST)) == 100


def test_certificates_that_vouch_for_each_other_end():
    circle = [certificate(a, b, may_invite=True) for a, b in ((2, 3), (4, 2), (3, 4))]
    assert line_of(*circle) is None


def test_no_more_certificates_are_looked_at_than_a_hello_may_carry():
    junk = [certificate(OTHER, OTHER) for _ in range(CERTIFICATES_MAX)]
    assert line_of(*junk[1:], certificate(FOUNDER, GUEST)) == 100
    assert line_of(*junk, certificate(FOUNDER, GUEST)) is None


def test_an_invite_names_no_secret_but_the_key_of_a_private_village():
    assert set(Invite.__struct_fields__) == {
        "village", "inviter", "addresses", "nonce", "not_after_unix_ms", "line_micro_credits",
        "village_key",
    }  # fmt: skip
    assert msgspec.structs.asdict(village.read_invite(token()))["line_micro_credits"] == 500


@pytest.mark.parametrize(("size", "whole"), [(0, True), (31, False), (32, True)])
def test_an_invite_carries_a_whole_village_key_or_none(size, whole):
    key = bytes(range(size))
    text = village.make_invite(make_key(1), VILLAGE, (), 7, NOW, village_key=key)
    if whole:
        assert village.read_invite(text).village_key == key
    else:
        with pytest.raises(RequestError, match="cut"):
            village.read_invite(text)
