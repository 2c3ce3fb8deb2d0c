"""Log-probabilities: on the wire and back, and what cannot be true of them."""

import math
import struct

import msgspec
import pytest

from aivillage.models.inference import logprobs
from aivillage.models.inference.generate import MODULE, GenerateRequest, GenerateResult
from aivillage.models.inference.logprobs import ALTERNATIVES_MAX, TokenLogprobs
from aivillage.protocols.codec import unpack
from aivillage.protocols.errors import RequestError


def single(value):
    return struct.unpack(">f", struct.pack(">f", value))[0]


SAID = tuple(
    TokenLogprobs(single(-1.5), (5, 9), (single(-0.5), single(-1.5 - n))) for n in range(2)
)
IDS = (9, 7)
RIGHT = (msgspec.structs.replace(SAID[0]), msgspec.structs.replace(SAID[1], logprob=-8.0))


def test_what_was_packed_is_read_again_bit_for_bit():
    body = logprobs.packed_all(RIGHT)
    assert len(body) == 2 * logprobs.token_size(2) == 40
    assert logprobs.read(body, 2, 2) == RIGHT
    assert logprobs.read(b"", 5, 0) == ()
    assert logprobs.token_size(ALTERNATIVES_MAX) == 164


@pytest.mark.parametrize(
    ("size", "tokens", "count"), [(39, 2, 2), (41, 2, 2), (40, 1, 2), (1, 0, 0)]
)
def test_a_wrong_size_is_refused(size, tokens, count):
    with pytest.raises(RequestError, match="log-probabilities"):
        logprobs.read(bytes(size), tokens, count)


def test_what_no_float_holds_is_refused():
    for bad in (TokenLogprobs(1e300, (), ()), TokenLogprobs(-1.0, (-1,), (-1.0,)),
                TokenLogprobs(-1.0, (1,), ())):  # fmt: skip
        with pytest.raises(RequestError, match="no log-probabilities"):
            logprobs.packed_all([bad])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"logprob": math.nan}, "no logarithms"),
        ({"logprob": -math.inf}, "no logarithms"),
        ({"logprob": 0.1}, "no logarithms"),
        ({"top_logprobs": (-0.5, -math.inf)}, "no logarithms"),
        ({"top_logprobs": (-1.5, -0.5)}, "order"),
        ({"top_logprobs": (-0.1, -0.2), "logprob": -0.2}, "more than 1"),
        ({"top_ids": (5, 5)}, "2 others"),
        ({"top_ids": (5,), "top_logprobs": (-0.5,)}, "2 others"),
        ({"top_ids": (5, 49_152)}, "vocabulary"),
        ({"top_ids": (9, 5)}, "two things"),
        ({"top_ids": (5, 6), "logprob": -1.0}, "leave it out"),
    ],
)
def test_what_cannot_be_true_is_told_without_the_model(changes, why):
    said = (msgspec.structs.replace(RIGHT[0], **changes), RIGHT[1])
    assert why in logprobs.fault(said, IDS, 2, 49_152)


def test_what_may_be_true_passes():
    assert logprobs.fault(RIGHT, IDS, 2, 49_152) == ""
    assert logprobs.fault((), IDS, 0, 49_152) == ""
    assert "number of tokens" in logprobs.fault((), IDS, 2, 49_152)
    assert "number of tokens" in logprobs.fault(RIGHT, IDS, 0, 49_152)
    assert "number of tokens" in logprobs.fault(RIGHT[:1], IDS, 2, 49_152)


def test_the_check_of_a_result_looks_at_them_whoever_has_the_model():
    request = GenerateRequest(prompt="abcde", model="none", max_tokens=2, logprobs=2)
    good = GenerateResult(
        text="?", token_ids=IDS, finish_reason="length", prompt_bytes=5, logprobs=RIGHT
    )
    assert MODULE.check(request, good).ok
    for bad in ((), RIGHT[:1], (RIGHT[0], msgspec.structs.replace(RIGHT[1], logprob=-0.1))):
        verdict = MODULE.check(request, msgspec.structs.replace(good, logprobs=bad))
        assert not verdict.ok
        assert "log-probabilities" in verdict.reason


def test_so_many_and_no_more_may_be_asked_for():
    fields = {"prompt": "a", "logprobs": ALTERNATIVES_MAX}
    assert unpack(GenerateRequest, msgspec.msgpack.encode(fields)).logprobs == 20
    with pytest.raises(RequestError, match="logprobs"):
        unpack(GenerateRequest, msgspec.msgpack.encode(fields | {"logprobs": 21}))
    with pytest.raises(RequestError, match="logprobs"):
        unpack(GenerateRequest, msgspec.msgpack.encode(fields | {"logprobs": -1}))


def test_values_are_those_of_a_direct_computation_ties_to_the_lowest_id():
    torch = pytest.importorskip("torch")
    from aivillage.models.inference import sampling

    logits = torch.randn(49_152, generator=torch.Generator().manual_seed(1)) * 5
    logits[[7, 11, 40_000]] = logits.max() + 1
    said = sampling.log_probabilities(logits, 17, 2)
    assert said.top_ids == (7, 11)
    said = sampling.log_probabilities(logits, 17, 5)
    assert said.top_ids[:3] == (7, 11, 40_000)
    direct = torch.log_softmax(logits.double(), dim=0).float()
    assert said.logprob == float(direct[17])
    assert list(said.top_logprobs) == direct[list(said.top_ids)].tolist()
    assert logprobs.fault((said,), (17,), 5, 49_152) == ""
    assert torch.allclose(torch.log_softmax(logits, dim=0), direct, atol=1e-5)
