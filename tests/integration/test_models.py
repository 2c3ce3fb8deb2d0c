"""Several models in real daemons: pulled, listed, verified, priced, sold, put away, removed."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

from aivillage.models.inference import catalogue
from aivillage.protocols.errors import AivillageError
from aivillage.protocols.pricing import token_price
from tests.integration.daemons import Daemon, Yard, settled, wait_for
from tests.integration.hub_server import COMMIT, Hub

pytestmark = pytest.mark.slow

pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")
from tests.unit.models import tiny_models  # noqa: E402

try:
    catalogue.weights_path(catalogue.known(catalogue.DEFAULT))
    MISSING = ""
except AivillageError as error:
    MISSING = str(error)
needs_model = pytest.mark.skipif(bool(MISSING), reason=MISSING or "present")

PACKAGED = {m.name for m in catalogue.MODELS.values() if catalogue.is_here(m)}
PROMPT = "Say hello."
QUADS = 3
WIDE = 512
"""A model wide enough that a token of it costs more than the least price."""


@pytest.fixture
def yard(tmp_path: pathlib.Path) -> Iterator[Yard]:
    with Yard(tmp_path) as made:
        yield made
        print(made.logs())


def pull(daemon: Daemon, source: str, *words: str) -> Any:
    done = daemon.run("models", "pull", source, *words, "--json")
    assert done.code == 0, done
    return done.json


def listed(daemon: Daemon) -> dict[str, Any]:
    return {row["name"]: row for row in daemon.read("models", "list")["models"]}


def buy(buyer: Daemon, model: str, tokens: int, *words: str) -> Any:
    return buyer.run(
        "submit", "inference.generate", PROMPT, f"--model={model}", f"--max-tokens={tokens}",
        "--mesh", "--json", *words, seconds=90,
    )  # fmt: skip


@needs_model
@pytest.mark.timeout(300)
def test_two_models_are_sold_each_at_its_price_and_neither_outlives_its_files(yard, tmp_path):
    """The packaged one and a random one that the buyer never had."""
    tiny_models.write_gguf(tmp_path / "tiny.gguf", inner=64 * WIDE)
    ann = yard.daemon("ann")
    assert ann.run("init").code == 0
    told = pull(ann, f"file:{tmp_path}/tiny.gguf")
    price = token_price(told["facts"]["active_parameters"])
    assert price > 1
    ann.start("--set", "models_memory_mb=1300")
    bob = yard.daemon("bob").start("--join", ann.run("invite").out.strip())
    rows = listed(ann)
    assert set(rows) == {*PACKAGED, "tiny"}
    assert rows["tiny"]["price_micro_credits"] == price
    assert {row["state"] for row in rows.values()} == {"offered"}
    assert {model["name"] for model in bob.ask("models")} == PACKAGED

    first = buy(bob, "tiny", 8)
    assert first.code == 0, first
    receipt = first.json["receipt"]
    assert receipt["usage"]["prompt_quads"] == QUADS
    assert receipt["price_micro_credits"] == price * (QUADS + receipt["usage"]["output_tokens"])
    explained = bob.read("explain", first.json["job"])
    assert explained["sum_micro_credits"] == receipt["price_micro_credits"], explained
    assert loaded(ann) == {"tiny"}

    second = buy(bob, catalogue.DEFAULT, 4)
    assert second.code == 0, second
    paid = second.json["receipt"]["price_micro_credits"]
    assert paid == 269 * (QUADS + second.json["receipt"]["usage"]["output_tokens"])
    assert loaded(ann) == {catalogue.DEFAULT}, "both do not fit, and the one that was idle went"
    _what_is_damaged_or_removed_is_not_sold(ann, bob)
    settled([ann, bob], 10)


def loaded(daemon: Daemon) -> set[str]:
    return {model["name"] for model in daemon.ask("models") if model["is_loaded"]}


def why_not(daemon: Daemon, name: str) -> str:
    return {model["name"]: str(model["why_not"]) for model in daemon.ask("models")}[name]


def _what_is_damaged_or_removed_is_not_sold(ann: Daemon, bob: Daemon) -> None:
    assert ann.run("models", "verify", "tiny").code == 0
    damage(ann.data_dir / "models" / "tiny" / "tiny.gguf")
    found = ann.run("models", "verify", "tiny")
    assert found.code == 1, found
    assert "was changed" in found.out
    refused = buy(bob, "tiny", 8, "--deadline=20")
    assert refused.code != 0, refused
    assert "damaged" in why_not(ann, "tiny")

    assert ann.run("models", "remove", "tiny", "--dry-run").code == 0
    assert "damaged" in why_not(ann, "tiny"), "a dry run removes nothing"
    assert ann.run("models", "remove", "tiny").code == 0
    assert {model["name"] for model in ann.ask("models")} == PACKAGED
    assert not (ann.data_dir / "models" / "tiny").exists()
    for _ in range(2):
        again = buy(bob, catalogue.DEFAULT, 2)
        assert again.code == 0, again
    told = listed(ann)[catalogue.DEFAULT]
    assert told["load_seconds"] > 0
    assert told["prefix_tokens_reused"] == told["prefix_tokens_read"] - 2, (
        "the same was asked twice"
    )


def damage(path: pathlib.Path) -> None:
    """One bit of the last tensor."""
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(-2, 2)
        byte = file.read(1)
        file.seek(-2, 2)
        file.write(bytes([byte[0] ^ 1]))


def test_a_safetensors_model_is_pulled_beside_a_running_node_and_sold(yard, tmp_path):
    pytest.importorskip("transformers")
    folder = tmp_path / "tiny-qwen"
    folder.mkdir()
    tiny_models.write_safetensors(folder, "qwen2")
    ann = yard.daemon("ann").start()
    bob = yard.daemon("bob").start("--join", ann.run("invite").out.strip())
    told = pull(ann, f"file:{folder}", "--name", "tiny-q")
    assert (told["facts"]["format"], told["facts"]["architecture"]) == ("safetensors", "qwen2")
    done = buy(bob, "tiny-q", 6)
    assert done.code == 0, done
    receipt = done.json["receipt"]
    assert receipt["price_micro_credits"] == QUADS + receipt["usage"]["output_tokens"]
    assert receipt["identical"] == "best effort"
    local = ann.run(
        "submit", "inference.generate", PROMPT, "--model=tiny-q", "--max-tokens=6", "--local",
        "--json",
    )  # fmt: skip
    assert local.json["result"]["token_ids"] == done.json["result"]["token_ids"]


def test_a_pull_that_was_killed_half_way_goes_on_where_it_stopped(yard, tmp_path):
    source = tmp_path / "repository"
    source.mkdir()
    tiny_models.write_gguf(source / "tiny.gguf", inner=64 * WIDE)
    size = (source / "tiny.gguf").stat().st_size
    ann = yard.daemon("ann")
    assert ann.run("init").code == 0
    with Hub(source) as hub:
        ann._environment["HF_ENDPOINT"] = hub.url
        plan = ann.run("models", "pull", "hf:owner/name", "--dry-run", "--json")
        assert (plan.code, plan.json["size_bytes"], plan.json["licence"]) == (0, size, "mit"), plan
        assert not (ann.data_dir / "models").exists(), "a dry run leaves nothing"
        hub.stop_after = size // 2
        first = ann.spawn("models", "pull", "hf:owner/name", "--name", "halved")
        part = wait_for(lambda: parts(ann), 20, "half of it is here")
        wait_for(lambda: part.stat().st_size >= size // 2 - (1 << 20), 20, "half of it is here")
        first.kill()
        first.communicate()
        hub.let_go.set()
        hub.stop_after, held = None, part.stat().st_size
        assert listed(ann).keys() <= PACKAGED
        (draft,) = ann.read("models", "list")["drafts"]
        assert draft["source"] == f"hf:owner/name@{COMMIT}"
        told = pull(ann, "hf:owner/name", "--name", "halved")
    assert hub.asked == [("tiny.gguf", ""), ("tiny.gguf", f"bytes={held}-")] or held == 0
    assert told["files"][0]["size_bytes"] == size
    assert told["facts"]["licence"] == "mit"
    assert ann.run("models", "verify", "halved").code == 0
    assert ann.read("models", "list")["drafts"] == []


def parts(daemon: Daemon) -> pathlib.Path | None:
    """The file that is on its way, once something of it is here."""
    found = list((daemon.data_dir / "models").glob(".draft-*/*.part"))
    return found[0] if found and found[0].stat().st_size else None


def test_a_model_goes_from_one_node_to_another_by_its_blobs(yard, tmp_path):
    tiny_models.write_gguf(tmp_path / "tiny.gguf")
    ann, bob = yard.village("ann", "bob")
    yard.know_each_other(ann, bob)
    pull(ann, f"file:{tmp_path}/tiny.gguf")
    name = ann.run("models", "push", "tiny").out.strip()
    told = pull(bob, name)
    assert told["source"] == name
    assert told["sha256"] == listed(ann)["tiny"]["sha256"]
    assert bob.run("models", "verify", "tiny").code == 0
    settled([ann, bob], 10)
    assert ann.ask("balance")["net"] == -bob.ask("balance")["net"] > 0
    bob.stop()
    assert bob.run("models", "remove", "tiny").code == 0
    for blob in (bob.data_dir / "blobs").glob("??/" + "?" * 64):
        assert bob.run("blobs", "remove", blob.name).code == 0
    missing = bob.run("models", "pull", name)
    assert missing.code != 0
    assert "aivillage-node start" in missing.err, "it is fetched by the node, which does not run"


def test_what_fits_is_recommended_with_its_reason(yard):
    ann = yard.daemon("ann")
    assert ann.run("init").code == 0
    told = ann.read("models", "recommend")
    assert sum(each["recommended"] for each in told["models"]) <= 1
    assert all(each["reason"] for each in told["models"])
    (ann.data_dir / "config.toml").write_text("models_memory_mb = 256\n")
    assert not any(each["fits"] for each in ann.read("models", "recommend")["models"])
