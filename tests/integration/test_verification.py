"""Results done again on real daemons: the real engine, and the command that explains."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from aivillage.models.inference import catalogue
from aivillage.protocols.errors import EXIT_USAGE, AivillageError
from tests.integration.daemons import Yard, wait_for

pytestmark = pytest.mark.slow
PROMPT = "Name a colour."
try:
    catalogue.weights_path(catalogue.known(catalogue.DEFAULT))
    MISSING = ""
except AivillageError as error:
    MISSING = str(error)


@pytest.fixture
def yard(tmp_path: pathlib.Path) -> Iterator[Yard]:
    with Yard(tmp_path) as yard:
        yield yard


@pytest.mark.skipif(bool(MISSING), reason=MISSING or "present")
def test_a_real_answer_is_done_again_here_and_found_the_same(yard: Yard) -> None:
    """Two machines of one kernel class and nobody else: the buyer's own engine looks."""
    ann, bob = yard.village("ann", "bob", flags=("--set", "verify_percent_max=50"))
    yard.know_each_other(ann, bob)
    words = ("submit", "inference.generate", PROMPT, "--max-tokens", "6", "--peer", bob.peer)
    assert ann.run(*words).code == 0

    def checked() -> int:
        (peer,) = ann.run("reputation", "--json").json["peers"]
        return sum(row["checked"] for row in peer["results"])

    wait_for(checked, 60, "ann did bob's answer again")
    (row,) = ann.run("reputation", bob.peer[-8:], "--json").json["peers"][0]["results"]
    assert (row["done"], row["count"], row["failed"], row["chance"]) == (1, 1, 0, 1)
    assert row["kernel"]
    said = ann.run("reputation", bob.peer).out
    assert "1 done, 1 done again, 0 wrong" in said
    assert "checks cost 0 credits" in said
    first = ann.run(*words, "--verify", "--json", "--logprobs", "2").json
    assert first["receipt"]["checked"] == "rechecked at this node"


def test_nothing_is_forgiven_where_nothing_is_held_against_anybody(yard: Yard) -> None:
    ann = yard.daemon("ann").start()
    assert "nobody did anything for this node yet" in ann.run("reputation").out
    assert ann.run("reputation", "--forgive", ann.peer).code == EXIT_USAGE
    assert ann.run("reputation", "nobody").code == EXIT_USAGE
    refused = ann.run("submit", "mesh.noop", "x", "--local", "--verify")
    assert (refused.code, "leave out --verify" in refused.text) == (EXIT_USAGE, True)
