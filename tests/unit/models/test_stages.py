"""Stages of a tiny model: what they give together, what they hold, and what they are fed."""

import pytest

from aivillage.models.inference import catalogue
from aivillage.models.inference.stages import (
    INPUT_ROWS_MAX,
    MODULE,
    StageInput,
    StageOutput,
    StageRequest,
    StageResult,
    memory_bytes,
    output_fault,
    rows_of,
    used_by,
)
from aivillage.protocols.errors import JobError, RequestError
from aivillage.protocols.ports import Machine

MODEL = catalogue.known(catalogue.DEFAULT)
FIRST = StageRequest(first=0, last=10)
MIDDLE = StageRequest(first=10, last=20)
LAST = StageRequest(first=20, last=30, rows=100)
ROW = bytes(4 * MODEL.width)


def test_two_stages_are_the_model_bit_for_bit(tmp_path):
    pytest.importorskip("gguf")
    torch = pytest.importorskip("torch")
    from aivillage.models.inference import gguf_model, llama, sameness
    from aivillage.models.inference.stage import ProbedStage, Stage, bytes_of, spans_of, states_of
    from tests.unit.models import tiny_gguf

    path = tmp_path / "tiny.gguf"
    tiny_gguf.write(path)
    whole = llama.Llama(gguf_model.load(path), slots=3, context_tokens=512)
    first = Stage(path, 0, 1, slots=3, context_tokens=512)
    last = Stage(path, 1, 2, slots=3, context_tokens=512)
    assert (first.is_first, first.is_last, last.is_first, last.is_last) == (1, 0, 0, 1)
    for at, count in ((0, 30), (30, 9), (32, 1), (33, 8)):  # the third takes rows back
        spans = spans_of(1, at, [(at + n) % 299 for n in range(count)])
        wanted = whole.forward(spans)[:count]
        wire = bytes_of(first.read(spans, None)[:count])
        got = last.read(spans, states_of(wire, tiny_gguf.WIDTH))[:count]
        assert torch.equal(got.view(torch.int32), wanted.view(torch.int32))
        assert torch.equal(last.logits(got), whole.logits(wanted))
    digests = [
        sameness.probe(ProbedStage(stage), slots=3, context_tokens=512).digest
        for stage in (first, last, Stage(path, 1, 2, slots=3, context_tokens=512))
    ]
    assert digests[0] != digests[1] == digests[2]
    with pytest.raises(RequestError, match="layers 1 to 3 of a model of 2"):
        Stage(path, 1, 3, slots=1, context_tokens=512)


@pytest.mark.parametrize(
    ("fed", "request_", "rows"),
    [
        (StageInput(0, (1,) * INPUT_ROWS_MAX), FIRST, INPUT_ROWS_MAX),
        (StageInput(MODEL.context_tokens - 1, (MODEL.vocabulary - 1,)), FIRST, 1),
        (StageInput(0, (), ROW * 2), MIDDLE, 2),
        (StageInput(0, (), ROW * 2, 2), LAST, 2),
    ],
)
def test_an_input_within_the_limits_has_its_rows(fed, request_, rows):
    assert rows_of(fed, request_) == rows


@pytest.mark.parametrize(
    ("fed", "request_"),
    [
        (StageInput(0, (1,) * (INPUT_ROWS_MAX + 1)), FIRST),
        (StageInput(0), FIRST),
        (StageInput(MODEL.context_tokens, (1,)), FIRST),
        (StageInput(0, (MODEL.vocabulary,)), FIRST),
        (StageInput(0, (1,), ROW), FIRST),
        (StageInput(0, (1,), b"", 1), FIRST),
        (StageInput(0, (1,)), MIDDLE),
        (StageInput(0, (), ROW[:-1]), MIDDLE),
        (StageInput(0, (), ROW * (INPUT_ROWS_MAX + 1)), MIDDLE),
        (StageInput(0, (), ROW, 1), MIDDLE),
        (StageInput(0, (), ROW, 2), LAST),
    ],
)
def test_an_input_beyond_them_is_refused(fed, request_):
    with pytest.raises(RequestError):
        rows_of(fed, request_)


@pytest.mark.parametrize(
    ("out", "rows", "draws", "request_", "is_right"),
    [
        (StageOutput(ROW * 2), 2, 0, MIDDLE, True),
        (StageOutput(ROW), 2, 0, MIDDLE, False),
        (StageOutput(ROW, (1,)), 1, 0, MIDDLE, False),
        (StageOutput(b"", (1, 2)), 3, 2, LAST, True),
        (StageOutput(b"", (1,)), 3, 2, LAST, False),
        (StageOutput(ROW, (1, 2)), 3, 2, LAST, False),
        (StageOutput(b"", (1, MODEL.vocabulary)), 3, 2, LAST, False),
    ],
)
def test_an_output_is_held_against_its_input(out, rows, draws, request_, is_right):
    assert (output_fault(out, rows, draws, request_) == "") is is_right


def test_usage_is_rows_times_layers_and_the_price_is_that_of_its_arithmetic():
    assert used_by(7, 2, LAST) == (70, 2)
    most, seconds = MODULE.estimate(LAST, Machine())
    assert most == {"layer_tokens": 1000, "head_tokens": 100}
    assert seconds > 0
    assert MODULE.estimate(MIDDLE, Machine())[0]["head_tokens"] == 0
    assert MODULE.meter(LAST, StageResult(layer_tokens=30, head_tokens=3)) == {
        "layer_tokens": 30,
        "head_tokens": 3,
    }
    prices = MODULE.prices_micro_credits()
    whole = MODEL.layers * prices["layer_tokens"] + prices["head_tokens"]
    assert MODEL.price_micro_credits() <= whole < 1.2 * MODEL.price_micro_credits()


def test_a_stage_needs_less_memory_than_the_model():
    whole = memory_bytes(MODEL, 0, MODEL.layers)
    parts = [memory_bytes(MODEL, 0, 15), memory_bytes(MODEL, 15, 30), memory_bytes(MODEL, 5, 10)]
    assert max(parts) < whole
    assert parts[2] < parts[0] == parts[1]


def test_no_such_layers_are_refused_and_a_stage_is_no_job_of_its_own():
    with pytest.raises(RequestError, match="30 layers"):
        MODULE.estimate(StageRequest(first=20, last=31), Machine())
    with pytest.raises(ValueError, match="at least one layer"):
        StageRequest(first=5, last=5)
    with pytest.raises(JobError, match="part of an answer"):
        MODULE.run(LAST, None)
    assert MODULE.check(LAST, StageResult(layer_tokens=1000)).ok
    assert not MODULE.check(LAST, StageResult(layer_tokens=1001)).ok
