"""The packaged model split over stages in one process: the same bits as unsplit."""

import msgspec
import pytest

from aivillage.models.inference import catalogue, logprobs
from aivillage.models.inference.formats import Format
from aivillage.protocols.errors import AivillageError, RefusedError, RequestError

try:
    catalogue.weights_path(catalogue.known(catalogue.DEFAULT))
except AivillageError as error:
    pytest.skip(str(error), allow_module_level=True)

torch = pytest.importorskip("torch", reason="the extra `models` is not installed")

from aivillage.models.inference.engine_stage import StageEngine  # noqa: E402
from aivillage.models.inference.engine_torch import SLOTS  # noqa: E402
from aivillage.models.inference.generate import GenerateRequest  # noqa: E402
from aivillage.models.inference.llama import Span  # noqa: E402
from aivillage.models.inference.stage import spans_of  # noqa: E402
from aivillage.models.inference.stages import StageInput, StageRequest  # noqa: E402
from aivillage.protocols.codec import pack  # noqa: E402
from tests.integration.asking_engines import results, together, torch_engine  # noqa: E402
from tests.integration.split_chain import MODEL, Chain  # noqa: E402

pytestmark = pytest.mark.slow
COPY = "The quick brown fox jumps over the lazy dog. " * 10
REQUESTS = [
    GenerateRequest(prompt="What is the capital of France?", max_tokens=20),
    GenerateRequest(prompt=COPY, max_tokens=32),
    GenerateRequest(prompt="Tell me a story.", max_tokens=20, temperature=0.9, top_p=0.9, seed=7),
    GenerateRequest(prompt="The quick brown fox jumps. " * 45, max_tokens=12),
    GenerateRequest(prompt="Count from 1 to 20.", max_tokens=30, stop=(" 7",)),
]


@pytest.fixture(scope="module")
def unsplit():
    return torch_engine()


@pytest.fixture(scope="module")
def wanted(unsplit):
    return together(unsplit, REQUESTS)


@pytest.fixture(scope="module")
def halves():
    """For whatever is open one after the other."""
    return Chain(2)


@pytest.mark.parametrize("parts", [3])  # 2, 3 and 5: test_split_processes.py, with fifty prompts
def test_split_is_unsplit_for_several_answers_in_flight(wanted, parts):
    chain = Chain(parts)
    assert all(engine.info().identical == "guaranteed" for engine in chain.engines)
    got = chain.together(REQUESTS)
    assert [answer[:3] for answer in got] == wanted
    assert len(got[1][0]) > 1.5 * got[1][3], "no guess was right where the prompt is copied"
    plain = chain.together(REQUESTS[:2], drafts_max=0)
    assert [answer[:3] for answer in plain] == wanted[:2]
    assert plain[0][3] == len(plain[0][0]), "one round a token without guesses"


def test_a_split_answer_in_a_format_is_the_unsplit_one_whatever_was_guessed(unsplit, halves):
    pytest.importorskip("llguidance")
    words = {"type": "array", "items": {"enum": ["fox", "hen", "dog"]}, "minItems": 8}
    asked = [
        GenerateRequest(
            prompt='Repeat this: ["fox", "hen", "fox", "hen", "fox", "hen", "fox", "hen"]. ' * 3,
            max_tokens=40, logprobs=2, format=Format(schema=words),
        ),
        GenerateRequest(
            prompt="Name three animals.", max_tokens=30, temperature=0.9, seed=5,
            format=Format(regex="[a-z]{3,8}(, [a-z]{3,8}){2}"),
        ),
        REQUESTS[1],
    ]  # fmt: skip
    whole = results(unsplit, asked)
    assert whole[0].text.startswith('["')
    for drafts_max in (15, 0):
        got = halves.together(asked, drafts_max=drafts_max)
        for split, wanted in zip(got, whole, strict=True):
            assert (tuple(split[0]), *split[1:3]) == (
                wanted.token_ids, wanted.text, wanted.finish_reason,
            )  # fmt: skip
            assert split[4] == logprobs.packed_all(wanted.logprobs)
        if drafts_max:
            assert len(got[0][0]) > got[0][3], "no guess was right where the prompt is copied"


def test_the_states_are_the_same_bits_also_after_a_rejected_draft(unsplit, halves):
    """Through the border at 256 keys, in slices of other sizes, with rows that are taken back."""
    ids = [(7919 * n + 11) % 40_000 for n in range(300)]
    model = unsplit._model  # the probe of the engine looks at the same states
    whole = [model.forward(spans_of(0, at, ids[at : at + 32]))[: len(ids[at : at + 32])]
             for at in range(0, 300, 32)]  # fmt: skip
    first, last = (engine.stage for engine in halves.engines)
    got, at = {}, 0
    for size, kept in ((30, 30), (5, 2), (32, 32), (30, 30), (32, 1)) * 6:
        part = ids[at : at + kept] + [1] * (size - kept)
        spans = spans_of(3, at, part)
        states = first.read(spans, None)[: len(part)]
        states = last.read(spans, states)
        got |= {at + n: states[n].clone() for n in range(kept) if at + n < 300}
        at += kept
        if at >= 300 - 32:
            break
    reference = torch.cat(whole)
    for position, state in got.items():
        assert torch.equal(state.view(torch.int32), reference[position].view(torch.int32))
    assert max(got) > 256


def test_a_stage_holds_its_own_layers_and_no_more():
    middle = StageEngine(MODEL, 10, 13, slots=1)
    assert len(middle.stage._layers._blocks) == 3
    assert not middle.stage.is_first
    assert not middle.stage.is_last
    assert middle.info().active_parameters == 3 * MODEL.layer_parameters


def test_what_does_not_fit_ends_its_session_and_no_other():
    engine = StageEngine(MODEL, 0, 1, slots=2)
    engine.add(1, StageRequest(first=0, last=1, rows=3), ())
    engine.add(2, StageRequest(first=0, last=1), ())
    with pytest.raises(RefusedError, match="slot"):
        engine.add(3, StageRequest(first=0, last=1), ())
    with pytest.raises(RequestError, match="layers"):
        engine.add(4, StageRequest(first=1, last=2), ())
    engine.feed(1, pack(StageInput(0, (5, 6))))
    engine.feed(2, pack(StageInput(1, (5, 6))))  # a gap
    ends = {frame.session: frame.error for frame in engine.step()}
    assert ends[1] == ""
    assert "position 1 where 0 was read" in ends[2]
    engine.feed(1, pack(StageInput(2, (7, 8))))  # a row more than it may have
    (frame,) = engine.step()
    assert "3 rows" in frame.error
    engine.add(5, msgspec.structs.replace(StageRequest(first=0, last=1), rows=1), ())
    assert engine.step() == []


def test_spans_are_cut_at_the_border_of_keys():
    assert spans_of(0, 250, range(10)) == [
        Span(0, 250, tuple(range(6))),
        Span(0, 256, tuple(range(6, 10))),
    ]
    assert SLOTS == 8
