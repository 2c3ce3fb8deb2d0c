"""Stages of a tiny model: what they give together, what they hold, and what they are fed."""

import hashlib

import msgspec
import pytest

from aivillage.models.inference import catalogue
from aivillage.models.inference.stages import (
    CONTEXT_BYTES_INCLUDED,
    INPUT_ROWS_MAX,
    MODULE,
    RUNTIME_BYTES,
    StageInput,
    StageOutput,
    StageRequest,
    StageResult,
    memory_bytes,
    output_fault,
    prices_of,
    rows_of,
    shape_said,
    used_by,
)
from aivillage.protocols.codec import pack, unpack
from aivillage.protocols.errors import ConfigError, JobError, RequestError
from aivillage.protocols.ports import Machine

MODEL = catalogue.known(catalogue.DEFAULT)
FIRST = StageRequest(first=0, last=10)
MIDDLE = StageRequest(first=10, last=20)
LAST = StageRequest(first=20, last=30, rows=100)
ROW = bytes(4 * MODEL.width)
PULLED = catalogue.KnownModel(
    name="pulled", active_parameters=9, parameters=9, vocabulary=300, context_tokens=512,
    end_token_id=2, sha256="a" * 64, memory_bytes=9, folder="/gone", file="x.gguf",
    layers=4, width=64, layer_parameters=5_000_000, head_parameters=1_500_000,
)  # fmt: skip
TWO_OF_IT = StageRequest(first=2, last=4, model="pulled", shape=shape_said(PULLED))


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


# ------------------------------------------------------------------ a model that was pulled


def test_a_request_says_what_a_pulled_model_is_like_and_of_the_packaged_one_nothing():
    assert shape_said(MODEL) is None
    assert b"shape" not in pack(FIRST)
    assert unpack(StageRequest, pack(TWO_OF_IT)) == TWO_OF_IT
    unsaid = StageRequest(first=2, last=4, model="pulled")
    with pytest.raises(RequestError, match="what that model is like"):
        MODULE.estimate(unsaid, Machine())
    with pytest.raises(RequestError, match="pulled has 4 layers"):
        MODULE.estimate(msgspec.structs.replace(TWO_OF_IT, last=5), Machine())


@pytest.mark.parametrize(
    ("fed", "rows"),
    [
        (StageInput(510, (), bytes(4 * 64 * 2), 2), 2),
        (StageInput(511, (), bytes(4 * 64 * 2), 2), 0),
        (StageInput(0, (), ROW), 9),
        (StageInput(0, (), bytes(4 * 64 - 4)), 0),
    ],
)
def test_its_rows_and_its_limits_are_its_own(fed, rows):
    if rows:
        assert rows_of(fed, TWO_OF_IT) == rows
    else:
        with pytest.raises(RequestError):
            rows_of(fed, TWO_OF_IT)
    beyond = StageOutput(b"", (300,) * fed.draws)
    assert output_fault(beyond, 2, 2, TWO_OF_IT)
    assert not output_fault(StageOutput(b"", (299, 0)), 2, 2, TWO_OF_IT)


def test_its_price_and_its_memory_follow_from_its_own_layers():
    assert prices_of(PULLED) == {"layer_tokens": 10, "head_tokens": 3}
    assert prices_of(MODEL) == MODULE.prices_micro_credits()
    one, two = memory_bytes(PULLED, 1, 2), memory_bytes(PULLED, 1, 3)
    assert two - one == 4 * PULLED.layer_parameters
    assert memory_bytes(PULLED, 0, 1) - one == 4 * PULLED.head_parameters
    included, more = (
        msgspec.structs.replace(PULLED, context_bytes=CONTEXT_BYTES_INCLUDED + beyond)
        for beyond in (0, 4_000)
    )
    assert memory_bytes(included, 1, 3) == two
    assert memory_bytes(more, 1, 3) == two + 2 * 1_000


def test_what_packing_takes_for_a_moment_is_counted():
    """Of a layer twice, as it is read and as it is joined; or of the head."""
    small = memory_bytes(PULLED, 1, 2)
    for changed, more in (
        ({"layer_parameters": 15_000_000}, 0),
        ({"layer_parameters": 15_000_001}, 8),
        ({"head_parameters": 30_000_000}, 0),
        ({"head_parameters": 30_000_001}, 4),
    ):
        model = msgspec.structs.replace(PULLED, **changed)
        layers = 4 * (model.layer_parameters - PULLED.layer_parameters)
        assert memory_bytes(model, 1, 2) == small + layers + more
    assert memory_bytes(MODEL, 5, 6) == RUNTIME_BYTES + 4 * MODEL.layer_parameters


def test_an_engine_of_a_stage_serves_the_weights_that_are_meant_and_no_others(tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("torch")
    from aivillage.models.inference.engine_stage import StageEngine
    from tests.unit.models import tiny_models

    path = tiny_models.write_gguf(tmp_path / "x.gguf")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    here = msgspec.structs.replace(
        PULLED, folder=str(tmp_path), sha256=sha256, layers=2, vocabulary=260
    )
    with pytest.raises(ConfigError, match="sha-256"):
        StageEngine(msgspec.structs.replace(here, sha256="b" * 64), 0, 1, slots=1)
    engine = StageEngine(here, 0, 1, slots=1)
    meant = StageRequest(first=0, last=1, model="pulled", shape=shape_said(here))
    engine.add(1, meant, ())
    engine.cancel(1)
    other = msgspec.structs.replace(here, sha256="b" * 64)
    with pytest.raises(RequestError, match="other weights"):
        engine.add(2, msgspec.structs.replace(meant, shape=shape_said(other)), ())
