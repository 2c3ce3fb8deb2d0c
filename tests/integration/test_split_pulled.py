"""A pulled model that no lender has the memory for: split over real daemons, and paid."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the extra `models` is not installed")
pytest.importorskip("gguf")

from aivillage.models.inference import stages
from aivillage.models.inference.catalogue import pulled
from aivillage.models.library import manifest
from tests.integration.daemons import Daemon, Yard, settled, wait_for
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


@pytest.fixture(scope="module")
def village(tmp_path_factory):
    """The buyer has the model too: its driver needs the tables. `stray` has other weights."""
    folder = tmp_path_factory.mktemp("pulled")
    source = folder / "random.gguf"
    tiny_models.write_gguf(source, inner=WIDE)
    tiny_models.write_gguf(folder / "stray.gguf", inner=WIDE, seed=4)
    with Yard(tmp_path_factory.mktemp("yard")) as yard:
        buyer, *lenders = [yard.daemon(name) for name in ("buyer", "one", "two", "stray")]
        for node in (buyer, *lenders):
            assert node.run("init").code == 0
            file = folder / "stray.gguf" if node is lenders[2] else source
            done = node.run("models", "pull", f"file:{file}", "--name", "random", "--json")
            assert done.code == 0, done
        buyer.start("--set", "serve=false", "--set", "engine=torch", "--set", "offer_seconds=2")
        for lender in lenders:
            lender.start("--join", buyer.ask("invite")["token"], *LENDS)
        everybody = {lender.peer for lender in lenders}
        wait_for(lambda: everybody <= buyer.sellers_known(stages.OPERATION), 40, yard.logs)
        yield buyer, lenders
        print(yard.logs())


def asked(buyer: Daemon, *words: str):
    return buyer.run(
        "submit", "inference.generate", PROMPT, "--model=random", "--max-tokens=24", "--json",
        *words, seconds=120,
    )  # fmt: skip


def test_it_is_split_over_those_that_have_the_same_weights_and_each_is_paid(village):
    buyer, (one, two, stray) = village
    folder = buyer.data_dir / "models" / "random"
    known = pulled(manifest.read(folder), folder)
    assert (known.layers, known.width) == (tiny_models.LAYERS, tiny_models.WIDTH)
    assert buyer.read("models", "info", "random")["layers"] == tiny_models.LAYERS
    done = asked(buyer, "--mesh")
    assert done.code == 0, done
    receipt = done.json["receipt"]
    assert set(receipt["sellers"]) == {one.peer, two.peer}
    assert receipt["identical"] == "guaranteed"
    assert "nobody offers random whole" in receipt["why"]
    here = asked(buyer, "--local")
    assert here.code == 0, here
    assert here.json["result"]["token_ids"] == done.json["result"]["token_ids"]
    settled([buyer, one, two, stray], 20)
    earned = {node.peer: node.ask("balance")["net"] for node in (one, two, stray)}
    assert sum(earned.values()) == receipt["price_micro_credits"] > 0
    assert earned[stray.peer] == 0
    assert min(earned[one.peer], earned[two.peer]) > 0


def test_where_those_with_the_weights_do_not_suffice_it_is_said(village):
    buyer, (one, two, stray) = village
    two.stop()
    done = asked(buyer, "--mesh", "--deadline=30")
    assert done.code != 0
    assert "random" in done.err + done.out, done
    two.start(*LENDS)
    settled([buyer, one, two, stray], 20)
