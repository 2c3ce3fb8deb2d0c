"""Masks without a model: letters are tokens."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("llguidance")

from aivillage.models.inference import constraint, logprobs  # noqa: E402
from aivillage.models.inference.formats import Format  # noqa: E402
from aivillage.models.inference.generate import GenerateRequest  # noqa: E402
from aivillage.models.inference.recheck import Recheck  # noqa: E402
from aivillage.models.inference.session import Session  # noqa: E402
from aivillage.models.inference.stage_draws import StageDraws  # noqa: E402
from aivillage.models.inference.stages import StageRequest  # noqa: E402
from aivillage.models.inference.tokenizer import Prompt  # noqa: E402
from aivillage.protocols.errors import RequestError  # noqa: E402
from aivillage.protocols.rechecking import Claim  # noqa: E402

VOCABULARY = 300
END = 299
WORD = Format(regex="ab[cd]{2}e?")


class Bytes:
    """A token for each byte, and one for all three of `abc`; 257 and on are marks."""

    end_token_ids = frozenset((END,))

    def token_bytes(self, token):
        return bytes((token,)) if token < 256 else b"abc" if token == 256 else b""

    def encode(self, text):
        return list(text.encode())


SPEAKER = Bytes()


def of(wanted):
    return constraint.of_format(wanted, SPEAKER, VOCABULARY)


def liking(*tokens):
    """Logits that like these best, the first most."""
    logits = torch.zeros(VOCABULARY)
    for n, token in enumerate(tokens):
        logits[token] = 10.0 - n
    return logits


def may_follow(one):
    return set(torch.nonzero(one.masked(torch.zeros(VOCABULARY)) == 0).squeeze(1).tolist())


def session(wanted=WORD, delivered=(), **fields):
    request = GenerateRequest(prompt="x", max_tokens=9, format=wanted, **fields)
    made = Session(1, 0, request, Prompt((1,), (1,)), SPEAKER, of(wanted))
    made.replay(delivered)
    return made


def drawn(made, lines):
    ids, said = [], b""
    for line in lines:
        made.draw(line)
        frame = made.report()
        ids += frame.token_ids
        said += frame.logprobs
        if frame.finished:
            return ids, frame.finished, said, frame.error
    return ids, "", said, ""


def test_only_what_the_format_lets_follow_is_left():
    one = of(WORD)
    assert may_follow(one) == {ord("a"), 256}
    one.advance(256)
    assert may_follow(one) == {ord("c"), ord("d")}
    one.advance(ord("d"))
    assert may_follow(one) == {ord("e"), END}
    other = one.copy()
    one.advance(ord("e"))
    assert may_follow(one) == {END}
    assert may_follow(other) == {ord("e"), END}


def test_logits_of_more_tokens_than_the_tokenizer_knows_are_forbidden():
    masked = of(WORD).masked(torch.zeros(VOCABULARY + 20))
    assert bool((masked[VOCABULARY:] == -torch.inf).all())


def test_a_model_without_an_end_cannot_answer_in_a_format():
    class Endless(Bytes):
        end_token_ids = frozenset()

    with pytest.raises(RequestError, match="no end token"):
        constraint.of_format(WORD, Endless(), VOCABULARY)
    assert constraint.of_format(None, Endless(), VOCABULARY) is None


LINES = [liking(ord("z"), ord("a")), liking(ord("b")), liking(ord("d"), ord("c")),
         liking(ord("e"), ord("c")), liking(END), liking(END)]  # fmt: skip
RIGHT = [ord(letter) for letter in "abdc"] + [END]


def test_the_draw_is_among_what_is_left_and_ends_where_the_format_does():
    assert drawn(session(), LINES)[:2] == (RIGHT, "eos")


@pytest.mark.parametrize("cut", range(1, 5))
def test_replayed_tokens_move_the_format_on(cut):
    asked = {"logprobs": 2}
    whole = drawn(session(**asked), LINES)
    rest = drawn(session(delivered=RIGHT[:cut], **asked), LINES[cut:])
    assert rest[0] == RIGHT[cut:]
    assert rest[2] == whole[2][cut * logprobs.token_size(2) :]


def test_tokens_that_leave_the_format_are_not_gone_on_from():
    with pytest.raises(RequestError, match="leaves the format"):
        session(delivered=[ord("a"), ord("c")])


def test_log_probabilities_are_of_what_the_model_wanted():
    _, _, said, _ = drawn(session(logprobs=1), LINES[:1])
    (its,) = logprobs.read(said, 1, 1)
    assert its.top_ids == (ord("z"),)
    assert its.logprob == float(torch.log_softmax(LINES[0].double(), 0).float()[ord("a")])


def test_a_format_that_becomes_too_much_ends_the_session_and_raises_nothing():
    made = session(Format(lark='start: a\na: "x" a'))
    ids, finished, _, error = drawn(made, [liking(ord("x"))] * 9)
    assert finished == "error"
    assert "format" in error
    assert len(ids) < 9


def rechecked(ids, wanted=WORD):
    request = GenerateRequest(prompt="x", max_tokens=9, format=wanted)
    look = Recheck(1, 0, request, (1,), Claim(tuple(ids)), of(wanted))
    lines = torch.stack(LINES[: len(ids)])
    look.read(len(ids))
    look.take(torch.zeros(len(ids), 4), lines)
    return look.report().finding


def test_reading_an_answer_again_draws_under_the_same_mask():
    assert rechecked(RIGHT).odd == ()
    odd = rechecked([ord("a"), ord("b"), ord("c"), ord("c"), END]).odd
    assert [one.position for one in odd] == [2]
    odd = rechecked([ord("a"), ord("b"), ord("z"), ord("c"), END]).odd
    assert [(one.position, one.near) for one in odd] == [(2, False)]


# ------------------------------------------------------------------ stages


def stage(drawn=(), count=0, wanted=WORD):
    request = StageRequest(first=29, last=30, format=wanted, drawn=drawn, logprobs=count)
    return StageDraws(request, of(wanted))


def test_a_stage_draws_after_guesses_that_it_never_sees():
    draws = stage()
    assert draws.draw(torch.stack(LINES[:1]), 0)[0] == (ord("a"),)
    # Two guesses behind the next token: the second one was wrong, so its draw means nothing.
    assert draws.draw(torch.stack(LINES[1:4]), 1)[0][:2] == (ord("b"), ord("d"))
    assert draws.draw(torch.stack(LINES[3:5]), 3)[0] == (ord("c"), END)


def test_a_stand_in_goes_on_in_the_format():
    ids, said = stage(tuple(RIGHT[:3]), count=2).draw(torch.stack(LINES[3:5]), 3)
    assert ids == (ord("c"), END)
    assert len(said) == 2 * logprobs.token_size(2)
    with pytest.raises(RequestError, match="3 known tokens"):
        stage(tuple(RIGHT[:3])).draw(torch.stack(LINES[4:5]), 4)


def test_a_guess_that_goes_nowhere_fails_only_once_it_counts():
    draws = stage(wanted=Format(lark='start: a\na: "x" a'), count=1)
    lines = torch.stack([liking(ord("x"))] * 9)
    ids, said = draws.draw(lines, 0)
    assert len(ids) == 9
    assert len(said) == 9 * logprobs.token_size(1)
    good = ids.index(0)
    assert set(ids[:good]) == {ord("x")}
    with pytest.raises(RequestError, match="known tokens"):
        draws.draw(lines[:1], good + 1)


def test_a_stage_without_a_format_draws_as_ever():
    draws = stage(wanted=None)
    assert draws.draw(torch.stack(LINES[:2]), 0)[0] == (ord("z"), ord("b"))
    assert draws.draw(torch.stack(LINES[:1]), 7)[0] == (ord("z"),)
