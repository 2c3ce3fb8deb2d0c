"""Answers split over real stage processes, many in flight, against the unsplit engine's.

    python -m tests.integration.split_processes --prompts 200 --stages 2 3 5

The stages are the product's: worker processes that hold some layers each, loaded as a daemon loads
them, and the chain that feeds them, whose rows of several answers meet in one batch. Only the
network is left out: `test_split.py` has the whole path over daemons.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import trio

from aivillage.models.inference import tokenizer
from aivillage.models.inference.generate import ChatMessage, GenerateRequest
from aivillage.models.inference.split import DRAFT_TOKENS_MAX, SplitAnswer
from aivillage.models.inference.stages import StageInput, StageOutput, StageRequest
from aivillage.node.chain import Chain, Hop, row_bytes
from aivillage.node.engines import EngineClient, EngineSession
from aivillage.node.parts import Parts
from aivillage.node.split_plan import Placed
from aivillage.node.worker_process import WorkerLimits, start_worker
from aivillage.protocols.codec import pack, unpack
from aivillage.protocols.passing import Passing
from tests.integration.asking_engines import together, torch_engine
from tests.integration.split_chain import MODEL, cuts

FLIGHT = 8
"""A stage has as many slots."""
TOKENS = 6
TOPICS = ("rain", "a fox", "the number 12", "bread", "cats", "a small house", "Mars", "eggs",
          "snow", "tea")  # fmt: skip
FORMS = ("Tell me about {0}.", "List three facts about {0}.", "A title for a story about {0}?",
         "Translate to French: {0}.", "Repeat this: {0}, {0}, {0}, {0}, {0}, {0}.",
         "Why is {0} good?", "Is {0} older than you?", "Write a poem on {0}.",
         "Spell {0} backwards.", "{0}: yes or no?", "What rhymes with {0}?",
         "Complete: '{0} is {0} is {0} is'", "How heavy is {0}?", "Describe {0} to a child.",
         "What is the opposite of {0}?", "Who invented {0}?", "Three words for {0}, please.",
         "Is there {0} in Paris?", "Count: one {0}, two {0}, three {0}, four",
         "Say hello to {0}.")  # fmt: skip


class Stages(NamedTuple):
    """A model in so many processes."""

    clients: tuple[EngineClient, ...]
    seconds: float
    """That they took to load."""

    def kernels(self) -> set[str]:
        """The kernel classes, without what each says of its own layers."""
        return {client.info.kernel_class.rpartition("/")[0] for client in self.clients}


def questions(count: int) -> list[GenerateRequest]:
    """Different ones; every fifth answer is drawn, and none of these can be guessed greedily."""
    asked = [form.format(topic) for form, topic in itertools.product(FORMS, TOPICS)]
    order = [asked[7 * n % len(asked)] for n in range(len(asked))]  # all forms, also in few
    made = []
    for number, prompt in enumerate(order[:count]):
        heat = {"temperature": 0.8, "top_p": 0.9, "seed": number} if number % 5 == 4 else {}
        said = ChatMessage(role="system", content=""), ChatMessage(content=prompt)  # short to read
        made.append(GenerateRequest(messages=said, max_tokens=TOKENS, **heat))
    assert len(made) == count, f"there are {len(asked)} questions"
    return made


class Answered(NamedTuple):
    """What came, and how: `decode_seconds` from its first token to its last, in `rounds` - 1."""

    token_ids: list[int]
    text: str
    finished: str
    rounds: int
    decode_seconds: float

    @property
    def said(self) -> tuple[list[int], str, str]:
        return self.token_ids, self.text, self.finished


class Pipe:
    """Where a `StageCall` would be: fed and read over a worker's pipes instead of a link."""

    passing, seller, is_alone, has_passed = Passing(), "nobody", True, False

    def __init__(self, session: EngineSession, away_seconds: float) -> None:
        self._session = session
        self._away_seconds = away_seconds

    def feed(self, fed: StageInput, hops: int = 0, draws: int = 0) -> None:
        assert (hops, draws) == (0, 0), "none of them hands anything on"
        self._session.feed(pack(fed))

    async def next(self) -> StageOutput:
        frame = await anext(self._session)
        await trio.sleep(self._away_seconds)
        return unpack(StageOutput, frame.body)


@asynccontextmanager
async def stages(parts: int, folder: Path) -> AsyncIterator[Stages]:
    """The model's layers in `parts` processes, loaded one beside the other."""
    async with trio.open_nursery() as nursery:
        limits = WorkerLimits(nice=0)
        nodes = [
            Parts(nursery, lambda _: start_worker(nursery, limits, folder), limits.memory_bytes_max)
            for _ in range(parts)
        ]
        clients: dict[int, EngineClient] = {}
        began = time.monotonic()

        async def load(at: int, first: int, last: int) -> None:
            clients[at] = await nodes[at].stage(StageRequest(first=first, last=last), MODEL, FLIGHT)

        async with trio.open_nursery() as loading:
            for at, cut in enumerate(cuts(parts)):
                loading.start_soon(load, at, *cut)
        try:
            yield Stages(tuple(clients[at] for at in range(parts)), time.monotonic() - began)
        finally:
            with trio.CancelScope(shield=True):
                for node in nodes:
                    await node.stop()
            nursery.cancel_scope.cancel()


async def answer(
    found: Stages,
    request: GenerateRequest,
    *,
    drafts_max: int = DRAFT_TOKENS_MAX,
    away_seconds: Sequence[float] = (),
) -> Answered:
    """One answer through all stages; `away_seconds`: what each round spends on the way to each."""
    driver = SplitAnswer(request, tokenizer.of_model(MODEL), drafts_max=drafts_max)
    away = away_seconds or [0.0] * len(found.clients)
    async with AsyncExitStack() as stack:
        hops = []
        for client, cut, seconds in zip(found.clients, cuts(len(found.clients)), away, strict=True):
            asked = _stage_request(request, driver, cut)
            session = await stack.enter_async_context(client.open_session(pack(asked)))
            call: Any = Pipe(session, seconds)
            placed = Placed(peer=str(cut), first=cut[0], last=cut[1])
            hops.append(Hop(placed, call, row_bytes(MODEL.width), _nobody))
        chain, text, began = Chain(hops), "", 0.0
        while not driver.finished:
            draws = await chain.round(driver.inputs())
            text += driver.take(draws.token_ids, draws.logprobs).text
            began = began or trio.current_time()
        seconds = trio.current_time() - began
    return Answered(driver.token_ids, text, driver.finished, driver.rounds, seconds)


def _stage_request(
    request: GenerateRequest, driver: SplitAnswer, cut: tuple[int, int]
) -> StageRequest:
    return StageRequest(
        first=cut[0],
        last=cut[1],
        prompt_tokens=len(driver.prompt.token_ids),
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
    )


async def _nobody(_hop: Hop, error: Exception) -> Any:
    raise error


async def answers(
    found: Stages, requests: Sequence[GenerateRequest], **options: Any
) -> list[Answered]:
    """All of them, `FLIGHT` at a time: whoever is done makes room for the next."""
    done: dict[int, Answered] = {}
    waiting = iter(enumerate(requests))

    async def fly() -> None:
        for number, request in waiting:
            done[number] = await answer(found, request, **options)

    async with trio.open_nursery() as nursery:
        for _ in range(FLIGHT):
            nursery.start_soon(fly)
    return [done[number] for number in range(len(requests))]


def unsplit(requests: Sequence[GenerateRequest]) -> list[tuple[list[int], str, str]]:
    """What the whole model says, in this process."""
    engine, said = torch_engine(), []
    for at in range(0, len(requests), FLIGHT):
        said += together(engine, requests[at : at + FLIGHT])
    return said


class Compared(NamedTuple):
    """`different`: questions whose answers are not the unsplit ones."""

    parts: int
    count: int
    different: list[str]
    is_one_class: bool
    tokens: int
    rounds: int
    load_seconds: float
    seconds: float


async def compared(
    parts: int, requests: Sequence[GenerateRequest], wanted: Sequence[tuple[list[int], str, str]]
) -> Compared:
    """All `requests` over `parts` processes, against what the whole model says."""
    with tempfile.TemporaryDirectory() as folder:
        async with stages(parts, Path(folder)) as found:
            began = time.monotonic()
            got = await answers(found, requests)
            seconds = time.monotonic() - began
    whole = torch_engine().info().kernel_class.rpartition("/")[0]
    pairs = zip(requests, got, wanted, strict=True)
    return Compared(
        parts=parts,
        count=len(got),
        different=[
            r.messages[-1].content for r, mine, theirs in pairs if mine.said != tuple(theirs)
        ],
        is_one_class=found.kernels() == {whole},
        tokens=sum(len(one.token_ids) for one in got),
        rounds=sum(one.rounds for one in got),
        load_seconds=found.seconds,
        seconds=seconds,
    )


def main() -> int:
    """Exit 1 where an answer differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3, 5])
    args = parser.parse_args()
    requests = questions(args.prompts)
    wanted, ok = unsplit(requests), True
    for parts in args.stages:
        one = trio.run(compared, parts, requests, wanted)
        ok = ok and one.is_one_class and not one.different
        print(
            f"{parts} stages: {one.count - len(one.different)} of {one.count} answers identical, "
            f"{one.tokens} tokens in {one.rounds} rounds, {one.seconds:.0f} s "
            f"after {one.load_seconds:.0f} s of loading"
        )
        for prompt in one.different:
            print(f"  differs: {prompt}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
