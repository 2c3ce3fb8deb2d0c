"""The torch engine on the real model: the same bits however it is asked."""

import itertools
import math

import msgspec
import pytest

from aivillage.models.inference import catalogue
from aivillage.models.inference.fingerprint import DEVIATION_MAX
from aivillage.protocols.errors import AivillageError, RequestError
from aivillage.protocols.rechecking import Claim

try:
    WEIGHTS = catalogue.weights_path(catalogue.known(catalogue.DEFAULT))
except AivillageError as error:
    pytest.skip(str(error), allow_module_level=True)

torch = pytest.importorskip("torch", reason="the extra `models` is not installed")

from aivillage.models.inference.engine_torch import SLOTS  # noqa: E402
from aivillage.models.inference.generate import (  # noqa: E402
    MODULE,
    ChatMessage,
    GenerateRequest,
    GenerateResult,
    Piece,
    prompt_bytes,
)
from aivillage.models.inference.llama import Span  # noqa: E402
from aivillage.models.inference.session_engine import STEP_ROWS  # noqa: E402
from tests.integration.asking_engines import (  # noqa: E402
    PLENTY,
    alone,
    forget,
    together,
    torch_engine,
)

pytestmark = pytest.mark.slow
PARIS = GenerateRequest(prompt="What is the capital of France?", max_tokens=40)
STORY = GenerateRequest(prompt="Tell me a story about a fox.", max_tokens=40)
SAMPLED = msgspec.structs.replace(STORY, temperature=0.9, top_p=0.95, seed=7)
LONG = GenerateRequest(prompt="The quick brown fox jumps over the lazy dog. " * 30, max_tokens=5)


@pytest.fixture
def engine():
    """Read by others before, but nothing is kept."""
    forget(torch_engine())
    return torch_engine()


def test_it_knows_the_capital_of_france(engine):
    ids, text, end = alone(engine, PARIS)
    assert (text, end, ids[-1]) == ("The capital of France is Paris.", "eos", 2)


def test_a_finished_answer_is_finished_at_once(engine):
    ids, _, _ = alone(engine, PARIS)
    engine.add(0, PARIS, ids)
    (frame,) = engine.step()
    assert (frame.finished, frame.token_ids, frame.text) == ("eos", (), "")
    assert frame.read_bytes == prompt_bytes(PARIS)
    assert engine.free_slots == SLOTS


def test_a_stop_string_across_tokens_ends_the_answer(engine):
    ids, text, end = alone(engine, msgspec.structs.replace(PARIS, stop=("ance is P",)))
    assert (text, end) == ("The capital of Fr", "stop")
    assert len(ids) < 8
    assert alone(engine, msgspec.structs.replace(PARIS, stop=("ance is P",)), ids[:4])[0] == ids


def test_a_long_prompt_does_not_stall_the_others(engine):
    engine.add(0, PARIS, ())
    engine.allow(0, PLENTY)
    while not engine.step()[0].token_ids:
        pass
    engine.add(1, LONG, ())
    engine.allow(1, PLENTY)
    read = [0]
    for _ in range(5):
        frames = {frame.session: frame for frame in engine.step()}
        assert len(frames[0].token_ids) == 1
        read.append(frames[1].read_bytes)
    assert read[-1] > read[2] > 0
    assert all(after - before <= 6 * STEP_ROWS for before, after in itertools.pairwise(read))
    engine.cancel(0)
    engine.cancel(1)


def test_a_used_slot_leaves_no_trace(engine):
    before = alone(engine, STORY)
    alone(engine, LONG)
    assert alone(engine, STORY) == before


@pytest.mark.parametrize(
    ("request_", "delivered", "why"),
    [
        (GenerateRequest(prompt="word " * 3_000), (), "context"),
        (PARIS, (49_152,), "vocabulary"),
        (PARIS, (2, 5), "after the end"),
        (msgspec.structs.replace(PARIS, model="other"), (), "answers requests to"),
        ("no request", (), "answers requests to"),
    ],
)
def test_a_bad_request_is_typed_and_takes_no_slot(engine, request_, delivered, why):
    with pytest.raises(RequestError, match=why):
        engine.add(0, request_, delivered)
    assert engine.free_slots == SLOTS


def test_keys_beyond_the_first_border_do_not_change_the_bits(engine):
    ids, _, _ = alone(engine, LONG)
    assert alone(engine, LONG, tuple(ids[:2]))[0] == ids
    assert together(engine, [STORY, LONG])[1][0] == ids


class Local:
    """A context for a run in this very process."""

    def __init__(self, delivered=()):
        self.delivered, self.deadline_seconds, self.seed, self.scratch = delivered, 0.0, 0, ""

    def cancelled(self):
        return False


def test_the_module_runs_by_itself_and_goes_on_from_pieces():
    request = GenerateRequest(messages=(ChatMessage(content="Say hello."),), max_tokens=6)
    events = list(MODULE.run(request, Local()))
    result = msgspec.msgpack.decode(events[-1].body, type=GenerateResult)
    assert MODULE.check(request, result).ok
    bodies = [event.body for event in events[:-1]]
    tokens = [len(msgspec.msgpack.decode(body, type=Piece).token_ids) for body in bodies]
    cut = tokens.index(1) + 2
    assert list(MODULE.run(request, Local(bodies[:cut])))[-1] == events[-1]
    assert MODULE.meter(request, result) == {"prompt_quads": 3, "output_tokens": 6}


def test_plain_english_has_the_perplexity_first_measured(engine):
    """A wrong rotation, order or scale would ruin it."""
    text = (
        "The village lies at the foot of a mountain. In the morning the farmers walk to their "
        "fields, and in the evening they come home, tired and hungry, to eat soup and bread."
    )
    ids = tuple(engine.tokenizer.encode(text))[:40]
    states = engine._model.forward([Span(0, 0, ids)])[: len(ids)]
    logits = torch.cat([engine._model.logits(part) for part in states.split(8)])
    losses = torch.nn.functional.cross_entropy(
        logits[:-1].clone(), torch.tensor(ids[1:]), reduction="mean"
    )
    assert math.exp(float(losses)) == pytest.approx(15.3215, rel=1e-3)


def claimed(engine, requests):
    """Each request's answer with its fingerprints, all made in one batch."""
    ids, marks = {}, {}
    for number, request in enumerate(requests):
        engine.add(number, request, ())
        engine.allow(number, PLENTY)
        ids[number], marks[number] = [], []
    while frames := engine.step():
        for frame in frames:
            ids[frame.session] += frame.token_ids
            marks[frame.session] += [frame.fingerprint] if frame.fingerprint else []
    return [Claim(tuple(ids[n]), tuple(marks[n])) for n in ids]


def rechecked(engine, requests, claims):
    """What one pass over each finds, all in one batch beside a session that decodes."""
    for number, (request, claim) in enumerate(zip(requests, claims, strict=True)):
        engine.recheck(number, request, claim)
    engine.add(99, PARIS, ())
    engine.allow(99, PLENTY)
    found = {}
    while frames := engine.step():
        found |= {f.session: f.finding for f in frames if f.finding is not None}
    return [found[number] for number in range(len(requests))]


def test_what_was_made_together_is_found_bit_for_bit_in_one_pass(engine):
    requests = [STORY, SAMPLED, PARIS, LONG]
    claims = claimed(engine, requests)
    assert [sum(map(len, claim.fingerprints)) for claim in claims[:2]] == [170, 170]
    for finding, claim in zip(rechecked(engine, requests, claims), claims, strict=True):
        assert (finding.tokens, finding.odd) == (len(claim.token_ids), ())
        assert {span.relative for span in finding.spans} == {0.0}
    assert engine.free_slots == SLOTS


def test_a_lie_shows_where_it_is(engine):
    (story,) = claimed(engine, [STORY])
    ids = list(story.token_ids)
    ids[20] += 1
    cut = (*story.token_ids[:10], 2)
    moved = (story.fingerprints[1],)
    claims = [
        Claim(tuple(ids), story.fingerprints), Claim(cut), Claim(story.token_ids, moved),
    ]  # fmt: skip
    altered, truncated, honest = rechecked(engine, [STORY] * 3, claims)
    assert altered.odd[0].position == 20
    assert altered.spans[0].relative > DEVIATION_MAX  # of the tokens after the altered one
    assert [(odd.position, odd.near) for odd in truncated.odd] == [(10, False)]
    assert (honest.odd, honest.spans[0].relative) == ((), 0.0)
    other = msgspec.structs.replace(STORY, prompt="Tell me a story about a box.")
    (finding,) = rechecked(engine, [other], [story])
    assert finding.spans[0].relative > 100 * DEVIATION_MAX


def test_what_cannot_be_looked_at_is_refused_and_takes_no_slot(engine):
    (story,) = claimed(engine, [STORY])
    with pytest.raises(RequestError, match="wrong span"):
        engine.recheck(0, STORY, Claim(story.token_ids[:39], story.fingerprints))
    with pytest.raises(RequestError, match="without tokens"):
        engine.recheck(0, STORY, Claim(()))
    with pytest.raises(RequestError, match="vocabulary"):
        engine.recheck(0, STORY, Claim((49_152,)))
    assert engine.free_slots == SLOTS
