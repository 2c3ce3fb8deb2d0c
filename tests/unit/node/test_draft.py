"""The model that guesses, as the buyer's node holds it: an engine in scripted hands."""

from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
import trio

from aivillage.models.inference import catalogue
from aivillage.models.inference.generate import GenerateRequest
from aivillage.models.inference.pace import Pace
from aivillage.models.inference.split import Rounds
from aivillage.node import draft
from aivillage.node.draft import Draft, engine_of, require_possible
from aivillage.node.shelf import Shelf
from aivillage.protocols.codec import pack, unpack
from aivillage.protocols.errors import AivillageError, JobError, RefusedError, RequestError
from aivillage.protocols.messages import Submit
from aivillage.protocols.ports import EngineInfo, SessionFrame

MODEL = catalogue.DEFAULT
ROUND, GUESS = 0.3, 0.01
PROMPT = (1,)
ANSWER = [n // 2 % 7 if n % 2 else n % 5 for n in range(40)]
"""Repeats little."""


def info_of(name="small", *, words="same", weights=1):
    return EngineInfo(
        engine="scripted", model=name, kernel_class="", identical="best effort",
        active_parameters=weights, context_tokens=64, vocabulary=9, weights_sha256="",
        vocabulary_sha256=words,
    )  # fmt: skip


class Engine:
    """Says `answer` after what it was given; `trouble` is raised, or slept."""

    def __init__(self, answer=ANSWER, **info):
        self.info = info_of(**info)
        self.answer = answer
        self.trouble = None
        self.asked = []

    @asynccontextmanager
    async def open_session(self, request, delivered):
        if isinstance(self.trouble, AivillageError):
            raise self.trouble
        yield self._session(unpack(GenerateRequest, request), delivered)

    def _session(self, request, delivered):
        self.asked.append((request, delivered))
        engine = self

        class Session:
            def allow(self, _units):
                pass

            async def __aiter__(self):
                for token in engine.answer[len(delivered) : request.max_tokens]:
                    await trio.sleep(engine.trouble or GUESS)
                    yield SessionFrame(1, (token,), "", 0)

        return Session()


def request(**fields):
    return GenerateRequest(prompt="x", max_tokens=len(ANSWER), **fields)


async def guesser(engine, *, row_price=0, **fields):
    """It has read the prompt, and rounds were measured."""
    pace = Pace(row_price=row_price, second_price=10_000)
    for _ in range(2):
        pace.round_took(ROUND, 0)
    made = Draft(engine, request(**fields), pace)
    await made.read()
    return made


async def driven(made, answer=ANSWER, *, spare=1_000, before=lambda _rounds: None):
    """An answer whose stages say `answer`; how many rounds it took."""
    rounds = Rounds(PROMPT, max_tokens=len(answer), end_token_ids=())
    while not rounds.ended:
        before(rounds)
        own = await made.guesses(rounds, spare)
        inputs = rounds.inputs(own)
        made.round_begins(inputs, own=bool(own))
        await trio.sleep(ROUND)
        at, draws = len(rounds.token_ids), inputs[-1].draws
        new = rounds.take([*answer[at : at + draws], *[0] * draws][:draws])
        made.round_ended(len(new) - 1)
    assert rounds.token_ids == answer
    return rounds.count


async def test_right_guesses_save_rounds_and_are_counted(autojump_clock):
    made = await guesser(Engine())
    assert await driven(made) < len(ANSWER) / 2
    assert made.right == made.made > 0
    assert made.told() == f"{made.right} of {made.made} guesses of small were right"


async def test_wrong_guesses_change_nothing_and_end(autojump_clock):
    engine = Engine([8] * len(ANSWER))
    made = await guesser(engine)
    assert await driven(made) <= len(ANSWER)
    assert (made.right, made.made > 0) == (0, True)
    assert made.made < 20


async def test_it_draws_as_the_answer_does_and_stops_at_no_word(autojump_clock):
    engine = Engine()
    await driven(await guesser(engine, temperature=0.7, seed=5, stop=("end",), logprobs=2))
    for asked, delivered in engine.asked:
        assert (asked.model, asked.temperature, asked.seed) == ("small", 0.7, 5)
        assert (asked.stop, asked.logprobs) == ((), 0)
        assert list(delivered) == ANSWER[: len(delivered)]


async def test_a_guesser_that_dies_is_no_error(autojump_clock):
    engine = Engine()
    made = await guesser(engine)

    def die(rounds):
        if len(rounds.token_ids) > 6:
            engine.trouble = JobError("its worker died")

    await driven(made, before=die)
    assert made.lost == "its worker died"
    assert "small guessed no more: its worker died" in made.told()


async def test_a_guesser_that_hangs_costs_a_round_once(autojump_clock):
    engine = Engine()
    made = await guesser(engine)
    engine.trouble = 60.0
    begun = trio.current_time()
    rounds = await driven(made)
    assert trio.current_time() - begun < (rounds + 1.5) * ROUND
    assert "nothing came" in made.lost


async def test_a_guesser_whose_slots_are_taken_is_asked_again(autojump_clock):
    engine = Engine()
    made = await guesser(engine)

    def busy(rounds):
        engine.trouble = RefusedError("full") if len(rounds.token_ids) < 9 else None

    await driven(made, before=busy)
    assert (made.lost, made.made > 0) == ("", True)


async def test_a_guesser_that_cannot_read_the_prompt_guesses_nothing(autojump_clock):
    engine = Engine()
    engine.trouble = RequestError("too long")
    made = await guesser(engine)
    assert await driven(made) <= len(ANSWER)
    assert (made.lost, made.made) == ("too long", 0)


async def test_nothing_is_guessed_that_the_ceiling_has_no_room_for(autojump_clock):
    made = await guesser(Engine())
    await driven(made, spare=0)
    assert made.made == 0
    assert "would not have paid" in made.told()


async def test_no_more_is_wrong_than_stages_were_told_to_expect(autojump_clock):
    made = await guesser(Engine([8] * len(ANSWER)))
    made.made = draft.WRONG_PER_TOKEN_MAX * len(ANSWER)
    before = made.made
    await driven(made)
    assert made.made == before


# --------------------------------------------------------------------------- which model


def workers_of(*engines, split_weights=100):
    class Held:
        shelf = SimpleNamespace(
            require_divisible=lambda _name: SimpleNamespace(active_parameters=split_weights)
        )

        def loaded(self):
            return list(engines)

        async def engine(self, name):
            await trio.lowlevel.checkpoint()
            return next(one for one in engines if one.info.model == name)

    return Held()


DRIVER = info_of("large")


async def test_of_those_that_are_loaded_the_smallest_of_the_same_words_guesses_unasked():
    engines = [
        Engine(name="alien", words="others", weights=1),
        Engine(name="larger", weights=9),
        Engine(name="small", weights=5),
        Engine(name="unknown", words="", weights=1),
    ]
    found = await engine_of("", DRIVER, workers_of(*engines))
    assert found is engines[2]
    assert await engine_of("", DRIVER, workers_of(*engines, split_weights=16)) is None
    assert await engine_of("none", DRIVER, workers_of(*engines)) is None


async def test_one_that_means_other_words_by_its_ids_is_refused():
    for words in ("others", ""):
        alien = Engine(name="alien", words=words)
        with pytest.raises(RequestError, match="do not mean the same") as refused:
            await engine_of("alien", DRIVER, workers_of(alien))
        assert "--draft none" in refused.value.next_step


async def test_the_one_that_was_said_need_not_be_small():
    same = Engine(name="large", weights=100)
    assert await engine_of("large", DRIVER, workers_of(same)) is same


def submit(draft_said, **fields):
    body = pack(GenerateRequest(prompt="x"))
    said = {"operation": "inference.generate", "request": body} | fields
    return Submit(id=1, draft=draft_said, **said)


@pytest.fixture
def shelf():
    made = Shelf(None, 8 << 30)
    made.is_here = lambda _model: True
    return made


def test_what_can_be_told_at_once_is_told_at_once(shelf):
    for said in ("", "none", MODEL):
        require_possible(submit(said), shelf)
    with pytest.raises(RequestError, match="only an answer that peers compute"):
        require_possible(submit(MODEL, local=True), shelf)
    with pytest.raises(RequestError, match="only an answer that peers compute"):
        require_possible(submit(MODEL, operation="mesh.noop"), shelf)
    with pytest.raises(RefusedError, match="is here"):
        require_possible(submit("nobody"), shelf)
    with pytest.raises(RefusedError, match="is no model for"):
        require_possible(submit(catalogue.EMBEDDER), shelf)
