"""A few seeds of the simulator, and proof that its invariants can fail."""

import pytest

from aivillage.ledger import sync
from tests.simulation import ledger_sim, mutants

SEEDS_MAX = 60


@pytest.mark.parametrize("seed", range(10))
def test_every_invariant_holds(seed):
    outcome = ledger_sim.run_seed(seed)
    assert outcome.failure == ""
    assert outcome.vouchers > 0


def test_a_seed_replays_exactly():
    assert ledger_sim.run_seed(3) == ledger_sim.run_seed(3)


@pytest.mark.parametrize("name", mutants.NAMES)
def test_a_planted_bug_is_caught_by_its_invariant(name):
    """Other invariants may trip over it first in some seeds; its own must in one of them."""
    wanted = mutants.MUTANTS[name][1]
    for seed in range(SEEDS_MAX):
        failure = ledger_sim.run_seed(seed, name).failure
        if failure.split(":")[0] in wanted:
            return
    pytest.fail(f"{name} lived through {SEEDS_MAX} seeds without tripping {wanted}")


@pytest.mark.parametrize("seed", range(20, 30))
def test_answers_that_do_not_fit_come_in_rounds(seed, monkeypatch):
    monkeypatch.setattr(sync, "VOUCHERS_MAX", 1)
    assert ledger_sim.run_seed(seed).failure == ""


def test_the_summary_is_one_line_of_json(capsys):
    assert ledger_sim.main(["--seeds", "1", "--steps", "40", "--json"]) == 0
    assert '"failures": 0' in capsys.readouterr().out
