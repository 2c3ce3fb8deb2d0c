"""What a person sees of a choice: real daemons, real commands."""

from __future__ import annotations

import pytest

from tests.integration.daemons import Yard

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    with Yard(tmp_path_factory.mktemp("yard")) as yard:
        yield yard.village("ann", "bob")


def test_a_dry_run_shows_the_table_and_buys_nothing(pair):
    ann, bob = pair
    before = len(bob.read("jobs", "list"))
    done = bob.run("submit", "mesh.noop", "hello", "--explain", "--dry-run")
    assert done.code == 0, done
    first, second, headings, row = done.out.splitlines()
    assert first.endswith("the only one")
    assert second == "in seconds; balanced: 0.01 credits count as one"
    assert headings.split()[:3] == ["candidate", "score", "work"]
    assert row.startswith(ann.peer[-8:])
    assert row.endswith("chosen")
    found = bob.read("submit", "mesh.noop", "hello", "--dry-run", "--prefer", "cheap")
    assert (found["prefer"], found["micro_credits_a_second"]) == ("cheap", 1000)
    assert len(bob.read("jobs", "list")) == before


def test_a_job_explains_itself_at_once_and_later(pair):
    ann, bob = pair
    done = bob.run("submit", "mesh.noop", "hello", "--explain", "--mesh")
    assert done.code == 0, done
    assert "hello" in done.out
    assert "chosen" not in done.out, "the answer stays clean"
    assert ann.peer[-8:] in done.err
    assert "chosen" in done.err
    told = bob.read("submit", "mesh.noop", "hello", "--explain", "--mesh")
    assert told["choices"][0]["candidates"][0]["peer"] == ann.peer
    shown = bob.run("jobs", "show", told["job"])
    assert "chosen" in shown.out
    attempt = bob.read("jobs", "show", told["job"])["attempts"][0]
    assert attempt["choice"] == told["choices"][0]


def test_once_done_here_it_is_done_here_if_that_is_better(pair):
    _, bob = pair
    assert bob.run("submit", "mesh.noop", "x", "--local").code == 0
    choices = bob.read("submit", "mesh.noop", "x", "--dry-run")["candidates"]
    assert {one["here"] for one in choices} == {True, False}
    wrong = bob.run("submit", "mesh.noop", "x", "--local", "--mesh")
    assert wrong.code == 2
    assert "local job has no peer" in wrong.err
