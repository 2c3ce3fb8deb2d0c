"""Answers that went on from kept keys have every bit, and the bill, of those that read it all.

Asked of each engine that is installed, on the packaged model. Bits are those of the logits that
each token was drawn from.
"""

import hashlib
import itertools
import random
from collections import defaultdict

import msgspec
import pytest

from aivillage.models.inference import catalogue, engine_choice
from aivillage.node.engines import OWN_SCOPE, Scopes
from aivillage.node.workers import WorkerSettings, open_workers
from aivillage.protocols.codec import pack
from aivillage.protocols.errors import AivillageError
from aivillage.protocols.rechecking import Claim

try:
    WEIGHTS = catalogue.weights_path(catalogue.known(catalogue.DEFAULT))
except AivillageError as error:
    pytest.skip(str(error), allow_module_level=True)
if not engine_choice.installed():
    pytest.skip("the extra `models` is not installed", allow_module_level=True)

from aivillage.models.inference.generate import (
    ChatMessage,
    GenerateRequest,
    conversation,
    prompt_bytes,
    usage,
)
from aivillage.models.inference.session import Session
from tests.integration.asking_engines import PLENTY, forget

pytestmark = pytest.mark.slow
SLOTS = 4
ANN, BOB, CID = b"ann", b"bob", b"cid"
QUESTIONS = ("Tell me a story about a fox.", "Why?", "What did the fox eat?", "Say it in one word.")


@pytest.fixture(scope="module", params=engine_choice.installed())
def engine(request):
    return engine_choice.engine_of(
        catalogue.known(catalogue.DEFAULT), slots=SLOTS, engine=request.param
    )


@pytest.fixture(autouse=True)
def drawn_from(monkeypatch, engine):
    """By session: the digests of the logits that its tokens were drawn from."""
    found, draw = defaultdict(list), Session.draw

    def noted(session, logits):
        found[session.number].append(hashlib.sha256(logits.contiguous().numpy().tobytes()).digest())
        draw(session, logits)

    monkeypatch.setattr(Session, "draw", noted)
    forget(engine)
    return found


class Asked:
    """One session of an engine, while its neighbours go on too."""

    def __init__(self, engine, number, request, *, delivered=(), scope=ANN):
        self.ids, self.text, self.end, self.marks = list(delivered), "", "", []
        self.read_bytes = prompt_bytes(request) if delivered else 0
        engine.add(number, request, delivered, scope)

    def take(self, frame):
        self.ids += frame.token_ids
        self.text += frame.text
        self.end = frame.finished
        self.marks += [frame.fingerprint] if frame.fingerprint else []
        self.read_bytes = frame.read_bytes


def answer(engine, drawn_from, request, *, units=PLENTY, **how):
    """(ids, text, end, fingerprints, bytes read, logits) of a session that is alone."""
    drawn_from.pop(0, None)
    one = Asked(engine, 0, request, **how)
    engine.allow(0, units)
    while frames := engine.step():
        one.take(frames[0])
    engine.cancel(0)
    return one.ids, one.text, one.end, one.marks, one.read_bytes, drawn_from.pop(0, [])


def reused_by(engine, work):
    before = engine.prefix_tokens.reused
    return work(), engine.prefix_tokens.reused - before


def tokens_of(engine, request):
    return len(engine.tokenizer.prompt(conversation(request)).token_ids)


def turns(engine, drawn_from, questions=QUESTIONS, **how):
    """(request, answer, reused tokens) of each turn, every answer in the next one's prompt."""
    messages, found = (), []
    for question in questions:
        messages += (ChatMessage(content=question),)
        request = GenerateRequest(messages=messages, max_tokens=12)
        got, reused = reused_by(engine, lambda r=request: answer(engine, drawn_from, r, **how))
        found.append((request, got, reused))
        messages += (ChatMessage(role="assistant", content=got[1]),)
    return found


def test_every_turn_of_a_conversation_has_the_bits_of_a_cold_one(engine, drawn_from):
    """What was drawn is prompt in the next turn: only where a drawn row has a prompt row's bits."""
    found = turns(engine, drawn_from)
    drawn_too = engine.info().engine == "torch"
    for (former, before, _), (request, got, reused) in itertools.pairwise(found):
        read = tokens_of(engine, former)
        assert reused == read + (len(before[0]) - 1 if drawn_too else 0)
        forget(engine)
        assert answer(engine, drawn_from, request) == got


def test_it_is_the_same_over_every_border_of_keys_and_pages(engine, drawn_from):
    words = ["one", "red", "fox", "and", "two", "old", "dogs", "met", "near", "a", "river"]
    said = " ".join(random.Random(1).choices(words, k=300))
    template = engine.tokenizer.prompt([ChatMessage(content="x")]).content_bytes.count(0)
    for border in (31, 32, 33, 255, 256, 257):
        answer(engine, drawn_from, GenerateRequest(prompt=said, max_tokens=1))
        kept = border - template
        request = GenerateRequest(
            prompt=" ".join([*said.split()[:kept], "Write about bread."]), max_tokens=2
        )
        warm, reused = reused_by(engine, lambda r=request: answer(engine, drawn_from, r))
        assert reused == border
        assert warm == answer(engine, drawn_from, request, scope=b"%d" % kept), kept


def test_any_mixture_of_sessions_has_the_bits_of_cold_ones(engine, drawn_from):
    """Two buyers; prompts that go on, fall short or turn away; sessions cut off and resumed."""
    draw = random.Random(3)
    words = ["alpha", "beta", "gamma", "delta"]
    said, reused = {ANN: ["alpha"], BOB: ["alpha"]}, engine.prefix_tokens.reused
    for _ in range(7):
        requests, pair = [], []
        for scope, spoken in said.items():
            del spoken[draw.randrange(1, len(spoken) + 1) :]
            spoken.extend(draw.choices(words, k=draw.randrange(1, 40)))
            request = GenerateRequest(
                prompt=" ".join(spoken), max_tokens=4, seed=draw.randrange(9), temperature=0.7
            )
            cold = answer(engine, drawn_from, request, scope=draw.randbytes(8))
            requests.append((scope, request, cold))
        for number, (scope, request, cold) in enumerate(requests):
            cut = draw.randrange(len(cold[0]))
            one = Asked(engine, number, request, delivered=tuple(cold[0][:cut]), scope=scope)
            engine.allow(number, PLENTY if draw.random() < 0.7 else draw.randrange(1, 30))
            pair.append((one, cold, cut))
        steps = draw.choice([1, 2, 100])
        while (frames := engine.step()) and (steps := steps - 1):
            for frame in frames:
                pair[frame.session][0].take(frame)
        for number, (one, cold, cut) in enumerate(pair):
            engine.cancel(number)
            assert one.ids == cold[0][: len(one.ids)]
            made = drawn_from.pop(number, [])
            assert made == cold[5][cut:][: len(made)]
    assert engine.prefix_tokens.reused - reused > 150


def test_conversations_that_begin_alike_live_side_by_side(engine, drawn_from):
    """The common part is copied: the second does not put the first out."""
    begin = "You are a fox that speaks of the river and of the hills. " * 3
    first = GenerateRequest(prompt=begin + "Speak of the moon. " * 8, max_tokens=2)
    other = GenerateRequest(prompt=begin + "Now say why. " * 8, max_tokens=2)
    answer(engine, drawn_from, first)
    got, shared = reused_by(engine, lambda: answer(engine, drawn_from, other))
    assert shared > 40
    again, reused = reused_by(engine, lambda: answer(engine, drawn_from, first))
    assert reused == tokens_of(engine, first) - 1
    forget(engine)
    assert got == answer(engine, drawn_from, other)
    assert again == answer(engine, drawn_from, first)


def test_another_buyers_words_are_read_anew_and_only_the_template_is_shared(engine, drawn_from):
    request = GenerateRequest(prompt="The code word is heron. " * 5, max_tokens=2)
    said = engine.tokenizer.prompt(conversation(request))
    template = said.content_bytes.count(0)
    _, own = reused_by(engine, lambda: answer(engine, drawn_from, request, scope=ANN))
    _, others = reused_by(engine, lambda: answer(engine, drawn_from, request, scope=BOB))
    _, again = reused_by(engine, lambda: answer(engine, drawn_from, request, scope=ANN))
    assert (own, others, again) == (0, template, len(said.token_ids) - 1)
    system = GenerateRequest(
        messages=(ChatMessage(role="system", content="You are a heron."), ChatMessage(content="Hi"))
    )
    one = msgspec.structs.replace(system, max_tokens=1)
    answer(engine, drawn_from, one, scope=ANN)
    _, shared = reused_by(engine, lambda: answer(engine, drawn_from, one, scope=CID))
    assert shared == engine.tokenizer.prompt(conversation(one)).content_bytes.count(0) < 5


def test_a_warm_session_is_billed_token_for_token_as_a_cold_one(engine, drawn_from):
    request = GenerateRequest(prompt="Tell me a story about a fox and a dog.", max_tokens=3)

    def bill(scope):
        one, seen = Asked(engine, 0, request, scope=scope), []
        for units in range(1, sum(usage(prompt_bytes(request), 3).values()) + 1):
            engine.allow(0, units)
            while frames := engine.step():
                one.take(frames[0])
                assert sum(usage(one.read_bytes, len(one.ids)).values()) <= units
            seen.append((one.read_bytes, tuple(one.ids)))
        return seen, one.end

    cold = bill(ANN)
    warm, reused = reused_by(engine, lambda: bill(ANN))
    assert reused == tokens_of(engine, request) - 1
    assert warm == cold
    assert warm[1] == "length"


def test_a_recheck_of_a_warm_answer_reads_everything_and_finds_nothing(engine, drawn_from):
    request, got, reused = turns(engine, drawn_from)[-1]
    assert reused
    told = engine.prefix_tokens
    engine.recheck(1, request, Claim(token_ids=tuple(got[0]), fingerprints=tuple(got[3])))
    rows, forward = [], engine._model.forward
    engine._model.forward = lambda spans: (
        rows.extend(len(span.token_ids) for span in spans) or forward(spans)
    )
    try:
        finding = None
        while finding is None:
            finding = engine.step()[-1].finding
    finally:
        del engine._model.forward
    assert sum(rows) == tokens_of(engine, request) + len(got[0]) - 1
    assert (finding.odd, engine.prefix_tokens) == ((), told)
    assert max(span.relative for span in finding.spans) < 1e-6


async def test_a_workers_daemon_names_its_buyers_and_hears_what_was_reused(tmp_path, engine):
    name, scopes = engine.info().engine, Scopes()
    request = pack(GenerateRequest(prompt="The code word is heron. " * 5, max_tokens=2))
    async with open_workers(
        WorkerSettings(engine=name), cache_folder=tmp_path / "c", scratch_folder=tmp_path / "s"
    ) as workers:
        client, reused = await workers.engine("inference.generate"), []
        for scope in (scopes.of("ann"), scopes.of("bob"), OWN_SCOPE, scopes.of("ann")):
            before = client.prefix_tokens.reused
            async with client.open_session(request, scope=scope) as session:
                session.allow(PLENTY)
                assert [frame async for frame in session][-1].finished
            reused.append(client.prefix_tokens.reused - before)
        assert reused[0] == 0
        assert 0 < reused[1] == reused[2] < reused[3]
        (warm,) = workers.warm()
        assert warm.prefix_tokens == client.prefix_tokens
        assert warm.prefix_tokens.read > 3 * 20
