"""A model that fits no node, split over real daemons: identical, paid, and outliving a stage."""

from __future__ import annotations

import random
import re
from typing import Any

import psutil
import pytest

from aivillage.models.inference import catalogue
from aivillage.protocols import messages
from aivillage.protocols.errors import AivillageError
from tests.integration.daemons import Daemon, Yard, settled, wait_for

try:
    catalogue.weights_path(catalogue.known(catalogue.DEFAULT))
except AivillageError as error:
    pytest.skip(str(error), allow_module_level=True)

pytest.importorskip("torch", reason="the extra `models` is not installed")

from aivillage.models.inference.generate import GenerateRequest
from tests.integration.asking_engines import alone, torch_engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
STAGE = "inference.stage"
TOO_LITTLE_MB = 800
"""For the whole model, which needs 1,021; 15 layers and an end need 710."""
PROMPT = "Explain in a few sentences why the sky is blue, and why the evening sky is red."
REQUEST: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 32}


@pytest.fixture(scope="module")
def village(tmp_path_factory):
    """One for all tests: starting it and loading stages costs more than asking. Warm is first."""
    with Yard(tmp_path_factory.mktemp("split")) as yard:
        yard.environment["AIVILLAGE_WORKER_MEMORY_MB"] = str(TOO_LITTLE_MB)
        yard.environment["AIVILLAGE_ENABLE"] = STAGE
        yard.environment["AIVILLAGE_OFFER_SECONDS"] = "2"
        nodes = yard.village("buyer", "one", "two", "three")
        buyer, *sellers = nodes
        wait_for(
            lambda: {seller.peer for seller in sellers} <= buyer.sellers_known(STAGE),
            40,
            f"the buyer heard of stages\n{yard.logs()}",
        )
        yield nodes


def unheard(_job: str, _count: int) -> None:
    """Nobody waits for a piece of text."""


def answered(buyer: Daemon, on_text=unheard, **changed: Any) -> dict[str, Any]:
    """The job at its end; `on_text` hears its id, and how many pieces of text have come."""
    job, pieces, said = "", 0, []
    for frame in buyer.follow("inference.generate", **(REQUEST | changed)):
        if isinstance(frame, messages.Progress):
            said.append(frame.note)
            job = frame.note.removeprefix("job ") if frame.note.startswith("job ") else job
        if isinstance(frame, messages.Text):
            pieces += 1
            on_text(job, pieces)
        if isinstance(frame, messages.Failure):
            raise AssertionError((frame, said, buyer.log_end()))
    return buyer.job_ended(job, 30) | {"said": said}


def packed() -> bytes:
    import msgspec

    return msgspec.msgpack.encode(REQUEST)


def events(buyer: Daemon, name: str) -> list[dict[str, Any]]:
    return [event for event in buyer.ask("events")["recent"] if event["event"] == name]


def stood_by(buyer: Daemon) -> None:
    """Returns once others have the layers that the next answer's stages will have, as this one."""
    sought = len(events(buyer, "stand_ins_sought"))
    answered(buyer, max_tokens=1)
    wait_for(
        lambda: (
            [event["ready"] for event in events(buyer, "stand_ins_sought")[sought:]][-1:] == [2]
        ),
        60,
        f"somebody stands by for both stages\n{buyer.log_end()}",
    )


def kill_workers(victim: Daemon) -> None:
    for worker in psutil.Process(victim.pid).children():
        worker.kill()


def test_a_stage_killed_at_a_random_token_goes_on_where_its_layers_are_loaded(village):
    """Its workers alone; its whole machine: the next test, and seeds of benchmarks/split.py."""
    buyer, *sellers = village
    stood_by(buyer)
    draw = random.Random(2)
    victim, at = sellers[0], draw.randrange(3, 10)
    earlier = len(events(buyer, "stage_replaced"))

    def now(job: str, count: int) -> None:
        nonlocal victim
        if count == at:
            attempts = buyer.ask("job", job=job)["attempts"]
            peer = draw.choice([one["seller"] for one in attempts])
            (victim,) = [seller for seller in sellers if seller.peer == peer]
            kill_workers(victim)

    found = answered(buyer, now)
    ids, *_ = alone(torch_engine(), GenerateRequest(**REQUEST))
    assert found["result"]["token_ids"] == ids
    assert found["receipt"]["identical"] == "guaranteed"
    (replaced,) = events(buyer, "stage_replaced")[earlier:]
    assert (replaced["peer"], replaced["was_ready"]) == (victim.peer, True)
    assert replaced["by"] in found["receipt"]["sellers"]
    assert any("its layers go on at" in note for note in found["said"])
    handed = events(buyer, "split_ended")[-1]["handed_on"]
    assert 0 < handed < REQUEST["max_tokens"], "until one of the two was lost; then we fed it"
    settled(village, 40)


def test_a_split_answer_is_the_unsplit_one_and_all_stages_are_paid(village):
    buyer, *sellers = village
    choice = buyer.ask("choose", operation="inference.generate", request=packed())
    assert "nobody offers SmolLM2-135M-Instruct whole" in choice["why"]
    assert "tokens/s expected" in choice["why"]
    before = earned(sellers)
    found = answered(buyer)
    ids, text, finished = alone(torch_engine(), GenerateRequest(**REQUEST))
    assert found["result"]["token_ids"] == ids
    assert (found["result"]["text"], found["result"]["finish_reason"]) == (text, finished)
    receipt = found["receipt"]
    handed = events(buyer, "split_ended")[-1]["handed_on"]
    assert handed > REQUEST["max_tokens"] / 4, "stages handed their states to each other"
    assert len(receipt["sellers"]) == 2
    assert receipt["identical"] == "guaranteed"
    settled(village, 20)
    paid = {peer: amount - before[peer] for peer, amount in earned(sellers).items()}
    assert sum(paid.values()) == receipt["price_micro_credits"]
    assert {peer for peer, amount in paid.items() if amount} == set(receipt["sellers"])


def earned(sellers: list[Daemon]) -> dict[str, int]:
    return {seller.peer: seller.ask("balance")["earned"] for seller in sellers}


WORDS = "([a-z]{2,9} ){14}the end"


def test_a_stand_in_for_the_last_stage_goes_on_in_the_answers_format(village):
    """It never drew what came before, so it is told; log-probabilities are the same bits too."""
    pytest.importorskip("llguidance")
    changed = {"max_tokens": 80, "format": {"regex": WORDS}, "logprobs": 2}
    buyer, *sellers = village
    wanted = answered(buyer, **changed)
    assert re.fullmatch(WORDS, wanted["result"]["text"])
    assert len(wanted["result"]["logprobs"]) == len(wanted["result"]["token_ids"])
    killed: list[Daemon] = []

    def kill_the_last(job: str, count: int) -> None:
        if count == 6:
            # The plan is laid open with the first stage's attempt.
            attempts = buyer.ask("job", job=job)["attempts"]
            (last,) = [one["seller"] for one in attempts if not one["choice"]]
            killed.append(next(seller for seller in sellers if seller.peer == last))
            killed[0].kill()

    found = answered(buyer, kill_the_last, **changed)
    (victim,) = killed
    assert found["result"] == wanted["result"]
    assert found["receipt"]["identical"] == "guaranteed"
    lost = f"{victim.peer[-8:]} is lost; its layers go on at"
    assert any(lost in note for note in found["said"]), found["said"]
    victim.restart()
    settled(village, 40)
