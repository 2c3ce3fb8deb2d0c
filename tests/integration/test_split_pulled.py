"""A pulled model that no lender has the memory for: split over real daemons, and paid."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the extra `models` is not installed")
pytest.importorskip("gguf")

from aivillage.models.inference import stages
from aivillage.models.inference.catalogue import pulled
from aivillage.models.library import manifest
from tests.integration.daemons import Daemon, Yard, settled, wait_for
from tests.integration.test_split import answered, events, kill_workers
from tests.unit.models import tiny_models

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
WIDE = 64 * 512
ONE_LAYER_MB = 440
"""Of 424 MB for a layer with an end, and 448 for both layers."""
LENDS = (
    "--enable", stages.OPERATION, "--set", f"worker_memory_mb={ONE_LAYER_MB}",
    "--set", "models_memory_mb=256", "--set", "offer_seconds=2",
)  # fmt: skip
PROMPT = "Say hello to all of them."
LONG = {"prompt": PROMPT, "model": "random", "max_tokens": 150, "temperature": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def village(tmp_path_factory):
    """The buyer has the model too: its driver needs the tables. `stray` has other weights."""
    folder = tmp_path_factory.mktemp("pulled")
    source = folder / "random.gguf"
    tiny_models.write_gguf(source, inner=WIDE)
    tiny_models.write_gguf(folder / "stray.gguf", inner=WIDE, seed=4)
    with Yard(tmp_path_factory.mktemp("yard")) as yard:
        buyer, *lenders = [yard.daemon(name) for name in ("buyer", "one", "two", "three", "stray")]
        for node in (buyer, *lenders):
            assert node.run("init").code == 0
            pull(node, folder / "stray.gguf" if node is lenders[3] else source)
        buyer.start("--set", "serve=false", "--set", "engine=torch", "--set", "offer_seconds=2")
        for lender in lenders:
            lender.start("--join", buyer.ask("invite")["token"], *LENDS)
        everybody = {lender.peer for lender in lenders}
        wait_for(lambda: everybody <= buyer.sellers_known(stages.OPERATION), 40, yard.logs)
        yield buyer, lenders
        print(yard.logs())


def pull(node: Daemon, file: Path, name: str = "random") -> None:
    done = node.run("models", "pull", f"file:{file}", "--name", name, "--json")
    assert done.code == 0, done


def asked(buyer: Daemon, *words: str):
    return buyer.run(
        "submit", "inference.generate", PROMPT, "--model=random", "--max-tokens=24", "--json",
        *words, seconds=120,
    )  # fmt: skip


def nets(nodes: list[Daemon]) -> dict[str, int]:
    return {node.peer: node.ask("balance")["net"] for node in nodes}


def test_a_stage_that_is_killed_goes_on_at_another_that_has_the_weights(village):
    """Before the buyer measured itself: it would do the next one here."""
    buyer, (*able, stray) = village
    wanted = answered(buyer, **LONG)["result"]["token_ids"]
    assert len(wanted) > 40
    lost = []

    def now(job: str, count: int) -> None:
        if count == 5:
            attempts = wait_for(
                lambda: buyer.ask("job", job=job)["attempts"], 5, "the job has attempts"
            )
            seller = attempts[-1]["seller"]
            lost.extend(node for node in able if node.peer == seller)
            kill_workers(lost[0])

    found = answered(buyer, now, **LONG)
    assert found["result"]["token_ids"] == wanted
    assert found["receipt"]["identical"] == "guaranteed"
    (replaced,) = events(buyer, "stage_replaced")
    assert (replaced["peer"], replaced["by"] == stray.peer) == (lost[0].peer, False)
    settled([buyer, *able, stray], 20)


def test_it_is_split_over_those_that_have_the_same_weights_and_each_is_paid(village):
    buyer, (*able, stray) = village
    folder = buyer.data_dir / "models" / "random"
    known = pulled(manifest.read(folder), folder)
    assert (known.layers, known.width) == (tiny_models.LAYERS, tiny_models.WIDTH)
    assert buyer.read("models", "info", "random")["layers"] == tiny_models.LAYERS
    before = nets([*able, stray])
    done = asked(buyer, "--mesh")
    assert done.code == 0, done
    receipt = done.json["receipt"]
    assert len(receipt["sellers"]) == 2
    assert {*receipt["sellers"]} < {node.peer for node in able}
    assert receipt["identical"] == "guaranteed"
    assert "nobody offers random whole" in receipt["why"]
    here = asked(buyer, "--local")
    assert here.code == 0, here
    assert here.json["result"]["token_ids"] == done.json["result"]["token_ids"]
    settled([buyer, *able, stray], 20)
    earned = {peer: net - before[peer] for peer, net in nets([*able, stray]).items()}
    assert sum(earned.values()) == receipt["price_micro_credits"] > 0
    assert {peer for peer, amount in earned.items() if amount} == {*receipt["sellers"]}


def test_where_those_with_the_weights_do_not_suffice_it_is_said(village):
    buyer, (one, *others, stray) = village
    for other in others:
        other.stop()
    done = asked(buyer, "--mesh", "--deadline=30")
    assert done.code != 0
    assert "random" in done.err + done.out, done
    for other in others:
        other.start(*LENDS)
    settled([buyer, one, *others, stray], 20)
