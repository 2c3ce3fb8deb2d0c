"""A small model of the buyer's that guesses for a split one: the same answer, and never needed."""

from __future__ import annotations

from typing import Any

import psutil
import pytest

pytest.importorskip("torch", reason="the extra `models` is not installed")
pytest.importorskip("gguf")

from aivillage.models.inference import stages
from tests.integration import test_split
from tests.integration.daemons import Daemon, Yard, settled, wait_for
from tests.integration.test_split import events, kill_workers, unheard
from tests.integration.test_split_pulled import LENDS, PROMPT, WIDE, nets, pull
from tests.unit.models import tiny_models

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
TOKENS = 64
ASKED: dict[str, Any] = {
    "prompt": PROMPT, "model": "random", "max_tokens": TOKENS, "temperature": 1.0, "seed": 5,
}  # fmt: skip
ALIEN = tiny_models.WORDS[:3] + tiny_models.WORDS[:2:-1]
"""As many words, in another order."""


@pytest.fixture(scope="module")
def village(tmp_path_factory):
    """The buyer has the split model, which is its own best guesser, a bad one, and an alien.

    Lenders are far away, so that guesses pay.
    """
    folder = tmp_path_factory.mktemp("draft")
    source = tiny_models.write_gguf(folder / "random.gguf", inner=WIDE)
    bad = tiny_models.write_gguf(folder / "bad.gguf", seed=4)
    alien = tiny_models.write_gguf(folder / "alien.gguf", seed=4, words=ALIEN)
    with Yard(tmp_path_factory.mktemp("yard")) as yard:
        buyer, *lenders = [yard.daemon(name) for name in ("buyer", "one", "two", "three")]
        for node in (buyer, *lenders):
            assert node.run("init").code == 0
            pull(node, source)
        pull(buyer, bad, "bad")
        pull(buyer, alien, "alien")
        buyer.start("--set", "serve=false", "--set", "engine=torch", "--set", "offer_seconds=2")
        for lender in lenders:
            lender.module = "tests.integration.far_node"
            lender.start("--join", buyer.ask("invite")["token"], *LENDS)
        everybody = {lender.peer for lender in lenders}
        wait_for(lambda: everybody <= buyer.sellers_known(stages.OPERATION), 40, yard.logs)
        yield buyer, lenders
        print(yard.logs())


def answered(buyer: Daemon, draft: str, on_text=unheard, **changed: Any) -> dict[str, Any]:
    """As of any split answer, with that model guessing."""
    return test_split.answered(buyer, on_text, draft=draft, mesh=True, **(ASKED | changed))


@pytest.fixture(scope="module")
def wanted(village):
    """Greedy and drawn, by one machine."""
    buyer, _ = village
    found = {}
    for heat in (0.0, 1.0):
        done = buyer.run(
            "submit", "inference.generate", PROMPT, "--model=random", f"--max-tokens={TOKENS}",
            f"--temperature={heat}", "--seed=5", "--local", "--json", seconds=120,
        )  # fmt: skip
        assert done.code == 0, done
        found[heat] = done.json["result"]["token_ids"]
    return found


def guesses_of(found: dict[str, Any]) -> tuple[int, int]:
    """How many were right, and how many there were, as the receipt says."""
    words = found["receipt"]["why"].rpartition("; ")[2].split()
    return int(words[0]), int(words[2])


@pytest.mark.parametrize("heat", [0.0, 1.0])
def test_the_answer_is_the_same_comes_in_fewer_rounds_and_each_stage_is_paid(village, wanted, heat):
    buyer, lenders = village
    before = nets(lenders)
    found = answered(buyer, "random", temperature=heat)
    assert found["result"]["token_ids"] == wanted[heat]
    receipt = found["receipt"]
    assert "random guesses where that pays" in receipt["why"]
    right, made = guesses_of(found)
    assert made == right > len(wanted[heat]) // 4
    assert receipt["identical"] == "guaranteed"
    settled([buyer, *lenders], 20)
    earned = {peer: net - before[peer] for peer, net in nets(lenders).items()}
    assert sum(earned.values()) == receipt["price_micro_credits"] > 0


def test_a_bad_one_changes_nothing_and_soon_guesses_no_more(village, wanted):
    buyer, lenders = village
    found = answered(buyer, "bad")
    assert found["result"]["token_ids"] == wanted[1.0]
    right, made = guesses_of(found)
    assert right < made < 30
    settled([buyer, *lenders], 20)


def test_a_stage_is_killed_while_a_model_guesses(village, wanted):
    buyer, lenders = village
    lost: list[Daemon] = []

    def now(job: str, count: int) -> None:
        if count == 5:
            seller = buyer.ask("job", job=job)["attempts"][-1]["seller"]
            lost.extend(node for node in lenders if node.peer == seller)
            kill_workers(lost[0])

    earlier = len(events(buyer, "stage_replaced"))
    found = answered(buyer, "random", now)
    assert found["result"]["token_ids"] == wanted[1.0]
    (replaced,) = events(buyer, "stage_replaced")[earlier:]
    assert replaced["peer"] == lost[0].peer
    assert guesses_of(found)[0] > 0
    settled([buyer, *lenders], 20)


def test_the_model_that_guesses_is_killed_and_the_answer_goes_on_without(village, wanted):
    buyer, lenders = village
    answered(buyer, "random", max_tokens=1)  # it is loaded, and its worker known

    def now(_job: str, count: int) -> None:
        if count == 3:
            (worker,) = [one["pid"] for one in engines(buyer) if one["model"] == "random"]
            psutil.Process(worker).kill()

    found = answered(buyer, "random", now)
    assert found["result"]["token_ids"] == wanted[1.0]
    assert any("random does not guess" in note for note in found["said"]), found["said"]
    assert "random guessed no more" in found["receipt"]["why"]
    settled([buyer, *lenders], 20)


def engines(buyer: Daemon) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = buyer.ask("status")["engines"]
    return found


def test_one_that_means_other_words_by_its_ids_is_refused_before_anything_is_bought(village):
    buyer, lenders = village
    before = nets(lenders)
    done = asked(buyer, "--mesh", "--draft=alien")
    assert done.code != 0
    assert "alien cannot guess for random" in done.text
    assert "--draft none" in done.text
    for words in (["--draft=nobody"], ["--draft=random", "--local"]):
        assert asked(buyer, *words).code != 0
    assert nets(lenders) == before


def test_who_is_loaded_and_much_smaller_guesses_unasked_and_nobody_where_that_is_said(village):
    buyer, lenders = village
    assert asked(buyer, "--mesh", "--draft=bad").code == 0
    unasked = asked(buyer, "--mesh")
    assert "bad guesses where that pays" in unasked.json["receipt"]["why"]
    none = asked(buyer, "--mesh", "--draft=none")
    assert "guesses" not in none.json["receipt"]["why"]
    assert unasked.json["result"] == none.json["result"]
    settled([buyer, *lenders], 20)


def test_it_is_told_before_anything_is_bought(village):
    buyer, _ = village
    told = asked(buyer, "--mesh", "--draft=bad", "--dry-run").json
    assert "bad guesses where that pays" in told["why"]


def asked(buyer: Daemon, *words: str):
    return buyer.run(
        "submit", "inference.generate", PROMPT, "--model=random", "--max-tokens=24", "--json",
        *words, seconds=120,
    )  # fmt: skip
