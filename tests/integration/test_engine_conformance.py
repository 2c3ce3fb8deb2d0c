"""What every engine promises, asked of each one that is installed, on the packaged model."""

import importlib
import math

import msgspec
import pytest

from aivillage.models.inference import catalogue, engine_choice
from aivillage.models.inference.fingerprint import DEVIATION_MAX, family
from aivillage.node.workers import WorkerSettings, open_workers
from aivillage.protocols.codec import pack
from aivillage.protocols.errors import (
    AivillageError,
    ConfigError,
    JobError,
    RefusedError,
    RequestError,
)
from aivillage.protocols.rechecking import Claim

try:
    WEIGHTS = catalogue.weights_path(catalogue.known(catalogue.DEFAULT))
except AivillageError as error:
    pytest.skip(str(error), allow_module_level=True)
if not engine_choice.installed():
    pytest.skip("the extra `models` is not installed", allow_module_level=True)

from aivillage.models.inference.generate import (
    MODULE,
    ChatMessage,
    GenerateRequest,
    GenerateResult,
    prompt_bytes,
    usage,
)
from tests.integration.asking_engines import PLENTY, alone, forget, packaged, together

pytestmark = pytest.mark.slow
SLOTS = 8
STORY = GenerateRequest(prompt="Tell me a story about a fox.", max_tokens=12)
SAMPLED = msgspec.structs.replace(STORY, temperature=0.9, top_p=0.95, seed=7)


@pytest.fixture(autouse=True)
def _nothing_is_kept(request):
    if "engine" in request.fixturenames:
        forget(request.getfixturevalue("engine"))


@pytest.fixture(scope="module", params=[*engine_choice.installed(), "torch on a GPU"])
def engine(request):
    if request.param != "torch on a GPU":
        return packaged(request.param)
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use is here")
    return packaged("torch", "cuda")


@pytest.fixture
def _same_bits(engine):
    if engine.info().device != "cpu":
        pytest.skip("on a GPU no bits are promised")


promises_bits = pytest.mark.usefixtures("_same_bits")


@promises_bits
def test_it_says_what_it_is_and_what_its_bits_depend_on(engine):
    info = engine.info()
    version = importlib.metadata.version(info.engine)
    assert info.kernel_class.startswith(info.engine)
    for part in (version, info.weights_sha256[:16], "float32", "cpu", "threads1"):
        assert part in info.kernel_class
    assert info.identical == "guaranteed"
    assert info.vocabulary == catalogue.known(info.model).vocabulary
    assert engine.load_seconds > 0


def test_classes_of_two_engines_differ():
    names = engine_choice.installed()
    assert len({packaged(name).info().kernel_class for name in names}) == len(names)


@promises_bits
@pytest.mark.parametrize("count", [2, 5, SLOTS])
def test_a_batch_is_what_each_is_alone(engine, count):
    requests = [
        GenerateRequest(prompt=f"Write about {topic}. " * (1 + n), max_tokens=6, seed=n)
        for n, topic in enumerate(("rain", "the number 12", "a very small house", "☃ snow", "why",
                                   "seven", "bread", "light")[:count])
    ]  # fmt: skip
    requests[1] = msgspec.structs.replace(requests[1], temperature=1.0)
    assert together(engine, requests) == [alone(engine, request) for request in requests]


@promises_bits
@pytest.mark.parametrize("request_", [STORY, SAMPLED], ids=["greedy", "sampled"])
def test_an_answer_goes_on_bit_for_bit_after_any_cut_and_in_company(engine, request_):
    ids, text, end = alone(engine, request_)
    assert len(ids) == request_.max_tokens
    for cut in (1, 2, len(ids) - 1):
        again, rest, end_again = alone(engine, request_, tuple(ids[:cut]))
        assert (again, end_again, text.endswith(rest)) == (ids, end, True)
    assert together(engine, [STORY, request_], [(), ids[:2]])[1][0] == ids


@promises_bits
def test_the_conversation_is_read_by_the_models_template(engine):
    """Roles matter, and a mark that a message spells is text."""
    plain = alone(engine, GenerateRequest(prompt="Say one word.", max_tokens=8))
    spoken = alone(
        engine, GenerateRequest(messages=(ChatMessage(content="Say one word."),), max_tokens=8)
    )
    assert spoken == plain
    answers = [
        alone(
            engine,
            GenerateRequest(
                messages=(
                    ChatMessage(content="I have a dog."),
                    ChatMessage(role=role, content="My dog is called Rex."),
                    ChatMessage(content="What did you just tell me?"),
                ),
                max_tokens=12,
            ),
        )
        for role in ("user", "assistant", "system")
    ]
    assert len({text for _, text, _ in answers}) > 1
    first = alone(engine, GenerateRequest(prompt="How many legs has a spider?", max_tokens=24))
    assert (first[2], "8" in first[1]) == ("eos", True)


@promises_bits
def test_a_draw_is_keyed_by_seed_and_position_alone(engine):
    first, second = (msgspec.structs.replace(SAMPLED, seed=seed) for seed in (1, 2))
    assert alone(engine, first) == alone(engine, first)
    assert alone(engine, first)[0] != alone(engine, second)[0]


@promises_bits
def test_a_stop_string_ends_the_answer_before_it(engine):
    ids, text, _ = alone(engine, STORY)
    stop = text[5:9]
    stopped = msgspec.structs.replace(STORY, stop=(stop,))
    got, before, end = alone(engine, stopped)
    assert (before, end, got) == (text[: text.index(stop)], "stop", ids[: len(got)])
    assert len(got) < len(ids)
    assert alone(engine, stopped, got[:1])[0] == got


@promises_bits
@pytest.mark.parametrize("request_", [STORY, SAMPLED], ids=["greedy", "sampled"])
def test_an_honest_answer_is_read_again_without_a_difference(engine, request_):
    claim = claimed(engine, request_)
    finding = found_by(engine, request_, claim)
    assert (finding.tokens, finding.odd) == (len(claim.token_ids), ())
    assert max(span.relative for span in finding.spans) < 1e-6


def claimed(engine, request_):
    """An answer, as its seller would show it."""
    engine.add(0, request_, ())
    engine.allow(0, PLENTY)
    ids, marks = [], []
    while frames := engine.step():
        ids += frames[0].token_ids
        marks += [frames[0].fingerprint] if frames[0].fingerprint else []
    return Claim(token_ids=tuple(ids), fingerprints=tuple(marks))


def found_by(engine, request_, claim):
    engine.recheck(0, request_, claim)
    finding = None
    while finding is None:
        (frame,) = engine.step()
        finding = frame.finding
    return finding


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_it_makes_as_many_tokens_as_were_asked_for(engine, tokens):
    ids, text, end = alone(engine, msgspec.structs.replace(STORY, max_tokens=tokens))
    assert (len(ids), end) == (tokens, "length")
    request = msgspec.structs.replace(STORY, max_tokens=tokens)
    result = GenerateResult(
        text=text, token_ids=tuple(ids), finish_reason=end, prompt_bytes=prompt_bytes(request)
    )
    assert MODULE.check(request, result).ok


@promises_bits
def test_nothing_moves_without_allowance_and_no_further_than_it(engine):
    whole = alone(engine, STORY)[0]
    engine.add(0, STORY, ())
    assert engine.step() == []
    quads = usage(prompt_bytes(STORY), 0)["prompt_quads"]
    seen = []
    for allowed in range(1, quads + 4):
        engine.allow(0, allowed)
        while frames := engine.step():
            seen += frames[0].token_ids
            assert sum(usage(frames[0].read_bytes, len(seen)).values()) <= allowed
    assert seen == whole[:3], "a prompt read bit by bit gives other bits"
    engine.cancel(0)


@promises_bits
def test_cancel_frees_the_slot_before_the_next_step(engine):
    for number in range(SLOTS):
        engine.add(number, STORY, ())
        engine.allow(number, PLENTY)
    with pytest.raises(RefusedError) as caught:
        engine.add(SLOTS, STORY, ())
    assert caught.value.code == "BUSY"
    engine.step()
    for _ in range(2 * SLOTS):
        engine.cancel(3)
        engine.add(3, STORY, ())
        engine.allow(3, PLENTY)
        assert 3 in {frame.session for frame in engine.step()}
    engine.cancel(99)
    for number in range(SLOTS):
        engine.cancel(number)
    assert engine.step() == []
    wanted = alone(engine, STORY)
    assert together(engine, [STORY] * SLOTS) == [wanted] * SLOTS


@pytest.mark.parametrize(
    ("request_", "delivered", "why"),
    [
        (GenerateRequest(prompt="word " * 3_000), (), "context"),
        (STORY, (49_152,), "vocabulary"),
        (STORY, (2, 5), "after the end"),
        (msgspec.structs.replace(STORY, model="other"), (), "answers requests to"),
        ("no request", (), "answers requests to"),
    ],
)
def test_a_bad_request_is_typed_and_takes_no_slot(engine, request_, delivered, why):
    with pytest.raises(RequestError, match=why):
        engine.add(0, request_, delivered)
    assert together(engine, [msgspec.structs.replace(STORY, max_tokens=1)] * SLOTS)


def test_english_has_the_perplexity_of_the_files_weights(engine):
    """A wrong rotation, order, scale or offset would ruin it; 8-bit inputs cost a little."""
    torch = pytest.importorskip("torch")
    from aivillage.models.inference.llama import Span

    text = (
        "The village lies at the foot of a mountain. In the morning the farmers walk to their "
        "fields, and in the evening they come home, tired and hungry, to eat soup and bread."
    )
    ids = tuple(engine.tokenizer.encode(text))[:40]
    states = engine._model.forward([Span(0, 0, ids)])[: len(ids)]
    logits = torch.cat([engine._model.logits(part) for part in states.split(8)])
    said = logits[:-1].clone().float().cpu()
    losses = torch.nn.functional.cross_entropy(said, torch.tensor(ids[1:]))
    assert math.exp(float(losses)) == pytest.approx(15.3215, rel=0.02)


NEAR = 0.002
"""Nats: logits of float32 engines differ by 1e-4 here, of one that rounds its inputs by 1."""


@promises_bits
def test_the_fast_engine_answers_as_the_reference_does(engine):
    """Whichever engine an owner has, a question gets the same answer; rounding flips near-ties."""
    torch = pytest.importorskip("torch")
    from aivillage.models.inference.llama import Span
    from tests.integration.asking_engines import torch_engine

    reference = torch_engine()
    ids = tuple(engine.tokenizer.encode("The fox said that " * 10))[:40]
    ours, theirs = (
        one._model.logits(one._model.forward([Span(0, 0, ids)])[: len(ids)][-8:])
        for one in (engine, reference)
    )
    assert torch.allclose(ours, theirs, rtol=0, atol=NEAR)
    for question in ("What is the capital of France?", "What is water made of?", "Say hello."):
        request = GenerateRequest(prompt=question, max_tokens=8)
        assert alone(engine, request) == alone(reference, request)


@promises_bits
@pytest.mark.parametrize("request_", [STORY, SAMPLED], ids=["greedy", "sampled"])
def test_engines_find_each_others_answers_honest(engine, request_):
    """Their classes are of one family: what is said there is held against nobody wrongly."""
    from tests.integration.asking_engines import torch_engine

    reference = torch_engine()
    assert family(engine.info().kernel_class) == family(reference.info().kernel_class) != ""
    for maker, reader in ((engine, reference), (reference, engine)):
        finding = found_by(reader, request_, claimed(maker, request_))
        assert all(odd.near for odd in finding.odd)
        assert max(span.relative for span in finding.spans) < DEVIATION_MAX / 3


def test_no_such_model_and_no_such_engine_are_typed():
    with pytest.raises(RequestError, match="no model here is called"):
        catalogue.known("nothing")
    with pytest.raises(ConfigError, match="no engine is called"):
        engine_choice.engine_of(catalogue.known(catalogue.DEFAULT), slots=1, engine="abacus")


def test_what_does_not_fit_in_memory_is_typed(monkeypatch):
    def full(*_, **__):
        raise MemoryError("no room for 1 TB")

    for name in engine_choice.installed():
        module = importlib.import_module(f"aivillage.models.inference.engine_{name}")
        monkeypatch.setattr(module, f"{name.title()}Engine", full)
        with pytest.raises(JobError, match=f"{name} could not load .*no room"):
            engine_choice.engine_of(catalogue.known(catalogue.DEFAULT), slots=1, engine=name)


@pytest.mark.parametrize("name", engine_choice.installed())
async def test_the_owners_engine_answers_in_a_fenced_worker(tmp_path, name):
    settings = WorkerSettings(engine=name)
    async with open_workers(
        settings, cache_folder=tmp_path / "c", scratch_folder=tmp_path / "s"
    ) as workers:
        engine = await workers.engine("inference.generate")
        assert engine.info.engine == name
        assert engine.info.identical == "guaranteed"
        request = msgspec.structs.replace(STORY, max_tokens=2)
        async with engine.open_session(pack(request)) as session:
            session.allow(PLENTY)
            frames = [frame async for frame in session]
        assert sum(len(frame.token_ids) for frame in frames) == 2
        assert workers.fences.sandboxed
