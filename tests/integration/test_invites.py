"""The command line's invites, with real nodes."""

from __future__ import annotations

import pytest

from tests.integration.daemons import Yard

pytestmark = pytest.mark.slow


def test_an_invite_of_two_uses_is_made_used_listed_and_revoked(tmp_path):
    with Yard(tmp_path) as yard:
        ann = yard.daemon("ann").start()
        made = ann.run("invite", "--uses", "3", "--days", "2", "--note", "the choir", "--qr")
        assert made.code == 0, made
        *picture, token = made.out.splitlines()
        assert token.startswith("aiv1.")
        assert len({len(line) for line in picture}) == 1
        assert set("".join(picture)) <= set("\u2588\u2580\u2584 ")
        assert "Good for 3 people and 2 days" in made.err
        guests = [yard.daemon(name).start("--join", token) for name in ("bob", "cat")]
        listed = ann.run("invite", "--list")
        assert "1 of 3 left" in listed.out
        assert "the choir" in listed.out
        assert all(guest.peer[-8:] in listed.out for guest in guests)
        assert token[:30] not in listed.text
        name = ann.read("invite", "--list")[0]["id"]
        assert "revoked" in ann.run("invite", "--revoke", name).out
        late = yard.daemon("dan").start()
        refused = late.run("join", token)
        assert (refused.code, "revoked by its maker" in refused.text) == (5, True)
        assert ann.read("invite", "--list")[0]["state"] == "revoked"
        for words in (
            ("--uses", "0"), ("--days", "366"), ("--note", "n" * 201), ("--revoke", "zz"),
            ("--list", "--revoke", name),
        ):  # fmt: skip
            wrong = ann.run("invite", *words)
            assert (wrong.code, "next:" in wrong.err) == (2, True), wrong
        assert len(ann.read("invite", "--list")) == 1
        assert not [d for d in yard.daemons if "aiv1." in d.log.read_text()]
