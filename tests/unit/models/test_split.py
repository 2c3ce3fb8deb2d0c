"""The driver of a split answer, without a model: rounds, guesses, and what is accepted of them."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aivillage.models.inference.generate import GenerateRequest
from aivillage.models.inference.split import (
    DRAFT_TOKENS_MAX,
    Begun,
    Draws,
    PromptLookup,
    Rounds,
    SplitAnswer,
    SplitDriver,
)
from aivillage.models.inference.stages import INPUT_ROWS_MAX
from aivillage.models.inference.tokenizer import Prompt
from aivillage.protocols.codec import pack, unpack
from aivillage.protocols.errors import RefusedError, RequestError

END = 9


class Letters:
    """Token n says the n-th letter; every prompt is the tokens given."""

    end_token_ids = frozenset({END})

    def __init__(self, ids):
        self._ids = tuple(ids)

    def token_bytes(self, token):
        return b"" if token == END else bytes([(ord("a") + token) % 256])

    def prompt(self, _messages):
        return Prompt(self._ids, tuple(range(1, len(self._ids) + 1)))


def answered(prompt, answer, *, drafts_max=DRAFT_TOKENS_MAX, **fields):
    """Drives an answer whose model says `answer`, whatever was read; the driver, and its rounds."""
    request = GenerateRequest(prompt="x", **{"max_tokens": len(answer)} | fields)
    driver = SplitAnswer(request, Letters(prompt), drafts_max=drafts_max)
    rounds, text = [], ""
    while not driver.finished:
        inputs = driver.inputs()
        rounds.append(inputs)
        last = inputs[-1]
        end = last.position + len(last.token_ids)
        places = range(end - last.draws, end)
        drawn = [
            answer[min(place + 1 - len(prompt), len(answer) - 1)]
            if [*prompt, *answer][: place + 1] == _read(rounds)[: place + 1]
            else 8  # what a model says after a wrong guess is not what it says in the answer
            for place in places
        ]
        text += driver.take(drawn).text
    return driver, rounds, text


def _read(rounds):
    """What a stage has read, position by position: later inputs overwrite."""
    ids = []
    for one in (one for inputs in rounds for one in inputs):
        assert one.position <= len(ids)
        ids[one.position :] = one.token_ids
    return ids


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=90),
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.integers(0, DRAFT_TOKENS_MAX),
)
def test_guesses_change_no_answer_and_never_cost_a_round(prompt, answer, drafts_max):
    driver, rounds, text = answered(prompt, answer, drafts_max=drafts_max)
    assert driver.token_ids == answer
    assert text == "".join(chr(ord("a") + token) for token in answer)
    assert len(rounds) <= len(answer)
    if not drafts_max:
        assert len(rounds) == len(answer)
    assert all(1 <= len(one.token_ids) <= INPUT_ROWS_MAX for r in rounds for one in r)
    assert all(one.draws == 0 for r in rounds for one in r[:-1])


def test_a_guess_that_was_wrong_is_no_part_of_the_answer():
    answer = [0, 1, 3, 0, 1, 3]
    driver, rounds, _ = answered([0, 1, 2, 0, 1, 2], answer)
    assert any(len(inputs[-1].token_ids) > 1 for inputs in rounds), "nothing was guessed"
    assert driver.token_ids == answer


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.sets(st.integers(0, 60)),
)
def test_guesses_of_somebody_else_change_no_answer_and_come_after_those_of_lookup(
    prompt, answer, wrong
):
    rounds = Rounds(prompt, max_tokens=len(answer), end_token_ids=())
    while not rounds.ended:
        at, places = len(rounds.token_ids), rounds.places
        own = len(rounds.inputs()[-1].token_ids) - 1 if rounds.count else 0
        offered = [(token + (n in wrong)) % 4 for n, token in enumerate(answer)][at:]
        inputs = rounds.inputs(offered)
        draws = inputs[-1].draws
        assert not (own and places), "lookup is free"
        assert draws - 1 == (own or min(places, len(offered)))
        guessed = inputs[-1].token_ids[len(inputs[-1].token_ids) - draws + 1 :]
        read = [guess == token for guess, token in zip(guessed, answer[at:], strict=False)]
        drawn = [token if all(read[:n]) else 8 for n, token in enumerate(answer[at : at + draws])]
        rounds.take([*drawn, *[8] * draws][:draws])
    assert rounds.token_ids == answer


def test_all_right_guesses_of_somebody_else_take_few_rounds():
    answer = [n // 2 % 7 if n % 2 else n % 5 for n in range(40)]
    rounds = Rounds([8], max_tokens=len(answer), end_token_ids=())
    while not rounds.ended:
        at = len(rounds.token_ids)
        draws = rounds.inputs(answer[at:])[-1].draws
        rounds.take(answer[at : at + draws])
    assert rounds.token_ids == answer
    assert rounds.count <= 8


def test_nothing_is_read_of_a_guess_that_the_answer_ends():
    rounds = Rounds([8], max_tokens=9, end_token_ids={END})
    assert rounds.inputs([1, END, 2])[-1].token_ids == (8, 1)


def test_a_copied_prompt_takes_few_rounds():
    prompt = [0, 1, 2, 3, 4, 5, 6, 7] * 4
    driver, rounds, _ = answered(prompt, prompt)
    assert driver.token_ids == prompt
    assert len(rounds) < len(prompt) / 4


def test_no_round_reads_beyond_the_tokens_asked_for():
    prompt = [0, 1] * 20
    _, rounds, _ = answered(prompt, [0, 1] * 3)
    assert max(one.position + len(one.token_ids) for r in rounds for one in r) <= 40 + 6


@pytest.mark.parametrize(
    ("answer", "fields", "finished", "text"),
    [
        ([0, END], {"max_tokens": 9}, "eos", "a"),
        ([0, 1, 2], {"stop": ("bc",)}, "stop", "a"),
        ([0, 1, 2, 3], {"stop": ("d!",)}, "length", "abcd"),
    ],
)
def test_an_answer_ends_for_one_reason(answer, fields, finished, text):
    driver, _, said = answered([4], answer, **fields)
    assert (driver.finished, said, driver.token_ids) == (finished, text, answer)


def test_what_ends_within_a_guess_ends_there():
    prompt = [0, 1, 2, 3, 4, 5, 6, 7] * 3
    driver, _, said = answered(prompt, prompt, stop=("fg",))
    assert (driver.finished, said) == ("stop", "abcde")


def test_other_draws_than_the_rounds_are_refused():
    driver = SplitAnswer(GenerateRequest(prompt="x"), Letters([1, 2]))
    driver.inputs()
    with pytest.raises(RequestError, match="2 draws where 1"):
        driver.take([1, 2])


def test_a_prompt_that_leaves_the_context_is_refused():
    request = GenerateRequest(prompt="x", max_tokens=48)
    SplitAnswer(request, Letters([1] * 2000))
    with pytest.raises(RequestError, match="leaves the context"):
        SplitAnswer(request, Letters([1] * 2001))


def test_lookup_guesses_nothing_new_and_goes_on_in_a_repetition():
    lookup = PromptLookup()
    for token in (1, 2, 3, 4):
        lookup.append(token)
    assert lookup.guess(3) == []
    for token in (1, 2):
        lookup.append(token)
    assert lookup.guess(3) == [3, 4, 1]
    assert lookup.guess(6) == [3, 4, 1, 2, 3, 4]


def test_a_driver_serves_sessions_as_an_engine(monkeypatch):
    from aivillage.models.inference import catalogue, tokenizer

    monkeypatch.setattr(tokenizer, "of_model", lambda _name: Letters([1, 2, 3]))
    driver = SplitDriver(catalogue.known(catalogue.DEFAULT), slots=2)
    request = GenerateRequest(prompt="x", max_tokens=2)
    driver.add(1, request, ())
    driver.add(2, request, ())
    (first, second) = driver.step()
    assert unpack(Begun, first.body) == Begun((1, 2, 3), (END,))
    driver.feed(1, pack(Draws((5,))))
    (frame,) = driver.step()
    assert (frame.session, frame.token_ids, frame.text, frame.read_bytes) == (1, (5,), "f", 3)
    driver.feed(1, pack(Draws((6,))))
    (frame,) = driver.step()
    assert (frame.finished, frame.body) == ("length", b"")
    driver.feed(2, pack(Draws(())))
    (frame,) = driver.step()
    assert frame.finished == "error"
    driver.cancel(1)
    driver.feed(1, pack(Draws((6,))))
    assert driver.step() == []
    driver.add(5, request, ())
    driver.add(3, request, ())
    with pytest.raises(RefusedError, match="slot"):
        driver.add(4, request, ())
    with pytest.raises(RequestError):
        driver.add(3, msgspec.structs.replace(request, max_tokens=1), (1,))
    assert second.session == 2
