"""A few seeds of the simulator, and proof that its invariants can fail."""

from contextlib import nullcontext

import pytest

from aivillage.ledger import books, sync
from aivillage.protocols.errors import RequestError
from tests.simulation import edits, kill_mutants, ledger_sim, liars, mutants, scenes, world


@pytest.mark.parametrize("seed", range(10))
def test_every_invariant_holds(seed):
    outcome = ledger_sim.run_seed(seed)
    assert outcome.failure == ""
    assert outcome.vouchers > 0


def test_eight_strangers_of_one_liar_together_take_no_more_than_the_pool():
    """Its names come one after the other and at once; the bound is checked at every step."""
    seeds = [seed for seed in range(80) if len(liars.sybils(seed)) == 8][:4]
    outcomes = [ledger_sim.run_seed(seed) for seed in seeds]
    assert [outcome.failure for outcome in outcomes] == [""] * len(seeds)
    assert world.POOL / 2 < max(outcome.taken for outcome in outcomes) <= world.POOL


def test_a_full_disk_undoes_a_whole_group():
    """The writer in the simulator is the daemon's: it rolls back, tells everybody, and goes on."""
    village = scenes.Village(2)
    a, b = village.nodes
    told: list[str] = []
    village.world.rates.disk_full = 1.0
    for number in range(2):
        a.ledger.buying.give(
            b.id, 5, bytes([number]) * 16, pytest.fail, lambda e: told.append(e.code)
        )
    a.runner.flush()
    village.world.rates.disk_full = 0.0
    assert told == ["DISK_FULL"] * 2
    assert not a.db.in_transaction
    assert village.owes(a, b) == 0 == -books.read_pair(a.db, b.id).balance
    scenes.present(a, b, 5)
    village.rest()
    assert village.owes(a, b) == 5
    village.end()


def test_a_refused_step_leaves_nothing():
    village = scenes.Village(2)
    a, b = village.nodes

    def half(db):
        db.execute("UPDATE peer SET line = 1")
        raise RequestError("not so")

    refused: list[str] = []
    a.ledger.desk.submit(half, pytest.fail, lambda error: refused.append(error.message))
    scenes.present(a, b, 5)  # the same group
    assert refused == ["not so"]
    assert books.read_pair(a.db, b.id).line == world.LINE
    village.rest()
    assert village.owes(a, b) == 5
    village.end()


def test_sybils_of_every_number_and_lie_are_drawn():
    drawn = [liars.sybils(seed) for seed in range(300)]
    assert {len(names) for names in drawn} == {*liars.SYBILS}
    assert {name for names in drawn for name in names} == {*liars.SYBIL_LIES}
    assert sum(map(bool, drawn)) > 150


def test_a_seed_replays_exactly():
    assert ledger_sim.run_seed(3) == ledger_sim.run_seed(3)


@pytest.mark.parametrize("name", mutants.NAMES)
def test_a_planted_bug_is_caught_by_its_own_check(name):
    """Other checks may trip over it first in some seeds; its own must in one of them."""
    killed = kill_mutants.kill(name)
    assert killed.check, f"{name} lived; noticed by {killed.others}"


@pytest.mark.parametrize("scene", scenes.SCENES, ids=lambda scene: scene.__name__)
def test_a_scene_goes_as_it_should_where_no_bug_is_planted(scene):
    scene()


@pytest.mark.parametrize("name", mutants.SURVIVORS)
@pytest.mark.parametrize("seed", range(4))
def test_a_bug_of_another_design_does_no_harm_here(name, seed):
    assert ledger_sim.run_seed(seed, name).failure == ""


def test_a_bug_whose_words_are_gone_is_not_planted_silently():
    with pytest.raises(AssertionError, match="nothing to plant"):
        edits.edited(sync, "answer", ("words that nobody wrote", ""))


def test_a_bug_that_lives_fails_the_run(capsys, monkeypatch):
    living = mutants.Mutant(nullcontext, ("I9",), scene="a_ring_ends_once")
    monkeypatch.setitem(mutants.MUTANTS, "sign_twice", living)
    assert kill_mutants.main(["--only", "sign_twice"]) == 1
    assert "LIVES" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(20, 30))
def test_answers_that_do_not_fit_come_in_rounds(seed, monkeypatch):
    monkeypatch.setattr(sync, "VOUCHERS_MAX", 1)
    assert ledger_sim.run_seed(seed).failure == ""


def test_the_summary_is_one_line_of_json(capsys):
    assert ledger_sim.main(["--seeds", "1", "--steps", "40", "--json"]) == 0
    assert '"failures": 0' in capsys.readouterr().out
