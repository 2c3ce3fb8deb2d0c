"""One pass over a claimed answer: what is honest leaves nothing, what is not shows where."""

from __future__ import annotations

import msgspec
import pytest

pytest.importorskip("gguf")
torch = pytest.importorskip("torch")

from aivillage.models import worker  # noqa: E402
from aivillage.models import worker_messages as say  # noqa: E402
from aivillage.models.inference import gguf_model, logprobs, sampling  # noqa: E402
from aivillage.models.inference.fingerprint import (  # noqa: E402
    DEVIATION_MAX,
    DRAW_MARGIN_MAX,
    LOGIT_MARGIN,
    LOGPROB_MARGIN,
    packed,
    read,
)
from aivillage.models.inference.generate import GenerateRequest  # noqa: E402
from aivillage.models.inference.llama import Llama, Span  # noqa: E402
from aivillage.models.inference.logprobs import packed as packed_token  # noqa: E402
from aivillage.models.inference.marks import Recorder, marks  # noqa: E402
from aivillage.models.inference.recheck import ODD_MAX, Recheck, is_near  # noqa: E402
from aivillage.protocols.errors import RequestError  # noqa: E402
from aivillage.protocols.ports import Claim  # noqa: E402
from tests.unit.models import tiny_gguf  # noqa: E402

PROMPT = tuple(range(5, 25))
TOKENS = 40
GREEDY = GenerateRequest(prompt="x", max_tokens=TOKENS)
SAMPLED = msgspec.structs.replace(GREEDY, temperature=0.8, top_p=0.9, seed=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    tiny_gguf.write(path)
    return Llama(gguf_model.load(path), slots=1, context_tokens=256)


def drawn(model, request, prompt=PROMPT, before=()):
    """The answer token by token, as an engine gives it after `before`."""
    ids, recorder, bodies, said = list(prompt + before), Recorder(len(before)), [], b""
    state = model.forward([Span(0, 0, tuple(ids))])[len(ids) - 1]
    for at in range(len(before), TOKENS):
        recorder.add(state)
        u = sampling.uniform(request.seed, at)
        line = model.logits(state.unsqueeze(0))[0]
        ids.append(sampling.choose(line, temperature=request.temperature, top_p=request.top_p, u=u))
        if request.logprobs:
            said += packed_token(sampling.log_probabilities(line, ids[-1], request.logprobs))
        if body := recorder.taken(ended=at == TOKENS - 1):
            bodies.append(body)
        state = model.forward([Span(0, len(ids) - 1, (ids[-1],))])[0]
    return Claim(tuple(ids[len(prompt) :]), tuple(bodies), said)


def looked_at(model, request, claim, prompt=PROMPT, rows=40):
    """The finding, reading so many rows at once."""
    recheck = Recheck(1, 0, request, prompt, claim)
    while span := recheck.next_span(rows):
        states = model.forward([span])[: len(span.token_ids)]
        recheck.read(len(span.token_ids))
        if count := recheck.rows_due:
            recheck.take(states[-count:], model.logits(states[-count:]))
    return recheck.report()


@pytest.mark.parametrize("request_", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_an_honest_answer_leaves_nothing_however_it_is_read(model, request_):
    claim = drawn(model, request_)
    assert [read(body).end for body in claim.fingerprints] == [32, 40]
    for rows in (40, 32, 7):
        frame = looked_at(model, request_, claim, rows=rows)
        assert (frame.finished, frame.error, frame.finding.tokens) == ("rechecked", "", TOKENS)
        assert frame.finding.odd == ()
        assert all(span.relative < 1e-6 for span in frame.finding.spans)


def test_what_another_one_goes_on_with_is_fingerprinted_from_there(model):
    whole = drawn(model, GREEDY)
    rest = drawn(model, GREEDY, before=whole.token_ids[:10])
    assert [(read(b).first, read(b).end) for b in rest.fingerprints] == [(10, 40)]
    joined = Claim(whole.token_ids, rest.fingerprints)
    assert looked_at(model, GREEDY, joined).finding.spans[0].relative < 1e-6


@pytest.mark.parametrize("request_", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_an_altered_token_is_odd_where_it_stands(model, request_):
    claim = drawn(model, request_)
    ids = list(claim.token_ids)
    ids[17] = (ids[17] + tiny_gguf.WORDS // 2) % tiny_gguf.WORDS
    odd = looked_at(model, request_, Claim(tuple(ids), claim.fingerprints)).finding.odd
    assert (odd[0].position, odd[0].near) == (17, False)


ASKED = msgspec.structs.replace(SAMPLED, logprobs=3)


def altered(claim, position, **fields):
    said = list(logprobs.read(claim.logprobs, TOKENS, ASKED.logprobs))
    said[position] = msgspec.structs.replace(said[position], **fields)
    return msgspec.structs.replace(claim, logprobs=logprobs.packed_all(said))


def values_of(model, claim):
    found = looked_at(model, ASKED, claim).finding.values
    return [(value.position, value.near) for value in found]


def test_honest_log_probabilities_leave_nothing_however_they_are_read(model):
    claim = drawn(model, ASKED)
    assert len(claim.logprobs) == TOKENS * logprobs.token_size(ASKED.logprobs)
    for rows in (40, 7):
        finding = looked_at(model, ASKED, claim, rows=rows).finding
        assert (finding.values, finding.odd) == ((), ())
    unasked = msgspec.structs.replace(claim, logprobs=b"")
    assert values_of(model, unasked) == [], "an older answer kept none"


def test_an_altered_log_probability_is_told_where_it_stands_and_how_far(model):
    claim = drawn(model, ASKED)
    (own, *_), at = logprobs.read(claim.logprobs[5 * 28 : 6 * 28], 1, 3), 5
    just, more = (altered(claim, at, logprob=own.logprob - by) for by in (1e-4, 0.1))
    assert values_of(model, just) == [(at, True)]
    assert values_of(model, more) == [(at, False)]
    limit = altered(claim, at, logprob=own.logprob - 2 * LOGPROB_MARGIN)
    assert values_of(model, limit) == [(at, False)]
    assert looked_at(model, ASKED, more).finding.odd == ()


def test_others_than_the_likeliest_are_told_too(model):
    claim = drawn(model, ASKED)
    (own,) = logprobs.read(claim.logprobs[7 * 28 : 8 * 28], 1, 3)
    four = drawn(model, msgspec.structs.replace(ASKED, logprobs=4)).logprobs
    (ours,) = logprobs.read(four[7 * 36 : 8 * 36], 1, 4)
    later = altered(claim, 7, top_ids=ours.top_ids[1:], top_logprobs=ours.top_logprobs[1:])
    assert values_of(model, later) == [(7, False)], "true values, of others than the likeliest"
    unlikely = next(i for i in range(tiny_gguf.WORDS) if i not in own.top_ids)
    swapped = altered(claim, 7, top_ids=(unlikely, *own.top_ids[1:]))
    assert values_of(model, swapped) == [(7, False)]
    outside = altered(claim, 7, top_ids=(tiny_gguf.WORDS, *own.top_ids[1:]))
    assert values_of(model, outside) == [(7, False)]


def test_what_is_within_rounding_hides_nothing_that_is_not(model):
    said = logprobs.read(drawn(model, ASKED).logprobs, TOKENS, 3)
    claim = drawn(model, ASKED)
    for at in range(TOKENS - 1):
        claim = altered(claim, at, logprob=said[at].logprob - 1e-4)
    claim = altered(claim, TOKENS - 1, logprob=said[-1].logprob - 0.5)
    assert values_of(model, claim) == [(0, True), (TOKENS - 1, False)]


def test_log_probabilities_of_another_number_of_tokens_are_refused(model):
    claim = drawn(model, ASKED)
    for body in (claim.logprobs[:-1], claim.logprobs + bytes(28)):
        with pytest.raises(RequestError, match="log-probabilities"):
            looked_at(model, ASKED, msgspec.structs.replace(claim, logprobs=body))


def test_the_prompt_is_part_of_it(model):
    claim = drawn(model, GREEDY)
    other = (PROMPT[0] + 1, *PROMPT[1:])
    spans = looked_at(model, GREEDY, claim, prompt=other).finding.spans
    assert all(span.relative > 100 * DEVIATION_MAX for span in spans)


def test_another_sampler_is_odd(model):
    for mine, yours in ((SAMPLED, GREEDY), (GREEDY, SAMPLED)):
        assert looked_at(model, yours, drawn(model, mine)).finding.odd


def test_a_fingerprint_that_is_moved_is_another_ones(model):
    claim = drawn(model, GREEDY)
    moved = packed(msgspec.structs.replace(read(claim.fingerprints[0]), first=1))
    (span,) = looked_at(model, GREEDY, Claim(claim.token_ids, (moved,))).finding.spans
    assert span.relative > 100 * DEVIATION_MAX
    beyond = packed(msgspec.structs.replace(read(claim.fingerprints[0]), first=9))
    with pytest.raises(RequestError, match="wrong span"):
        looked_at(model, GREEDY, Claim(claim.token_ids, (beyond,)))


def test_a_rounded_weight_shows(model, tmp_path):
    claim = drawn(model, GREEDY)
    tiny_gguf.write(tmp_path / "tiny.gguf")
    weights = gguf_model.load(tmp_path / "tiny.gguf")
    rounded = (
        msgspec.structs.replace(layer, down=layer.down.half().float()) for layer in weights.layers
    )
    other = Llama(msgspec.structs.replace(weights, layers=rounded), slots=1, context_tokens=256)
    assert all(s.relative > DEVIATION_MAX for s in looked_at(other, GREEDY, claim).finding.spans)


def test_no_answer_is_looked_at_that_is_none(model):
    with pytest.raises(RequestError, match="without tokens"):
        looked_at(model, GREEDY, Claim(()))
    with pytest.raises(RequestError, match="more tokens"):
        looked_at(model, GREEDY, Claim((1,) * (TOKENS + 1)))


def test_marks_do_not_know_their_neighbours():
    states = torch.randn(40, 576)
    alone = [marks(state.unsqueeze(0), at)[0] for at, state in enumerate(states, 3)]
    assert marks(states, 3) == alone
    assert marks(states, 4) != alone


def test_two_tokens_within_rounding_are_near_and_no_others():
    line = torch.tensor([1.0, 1.0 - LOGIT_MARGIN / 2, 1.0 - 2 * LOGIT_MARGIN])
    assert [is_near(line, GREEDY, 0.0, token) for token in range(3)] == [True, True, False]


def test_a_draw_beside_an_edge_is_near_and_no_other():
    line = torch.zeros(4)  # edges at 0.25, 0.5, 0.75
    warm = GenerateRequest(prompt="x", temperature=1.0)
    for u, tokens in ((0.251, {0, 1}), (0.3, {1}), (0.999, {3})):
        assert {token for token in range(4) if is_near(line, warm, u, token)} == tokens


def test_an_unlikely_token_at_the_edge_is_near_too():
    line = torch.tensor([0.0, -12.0, 0.0])  # edges at 0.5 and 3 millionths further
    warm = GenerateRequest(prompt="x", temperature=1.0)
    near = [is_near(line, warm, 0.5 - LOGIT_MARGIN / 2, token) for token in range(3)]
    assert near == [True, True, True]
    assert not is_near(line, warm, 0.5 - 2 * LOGIT_MARGIN, 1)
    narrow = GenerateRequest(prompt="x", temperature=1.0, top_p=0.9)
    assert not is_near(line, narrow, 0.5, 1)  # never drawn


def test_at_most_64_odd_draws_are_told(model):
    asked = msgspec.structs.replace(GREEDY, max_tokens=ODD_MAX + 20)
    right = [odd.position for odd in looked_at(model, asked, junk(ODD_MAX)).finding.odd]
    assert right == sorted(set(right))
    assert ODD_MAX - 4 <= len(right) <= ODD_MAX  # a wrong guess may hit
    assert len(looked_at(model, asked, junk(ODD_MAX + 20)).finding.odd) == ODD_MAX


def junk(count):
    return Claim(tuple((7 * n + 3) % tiny_gguf.WORDS for n in range(count)))


def test_a_cold_draw_is_forgiven_a_twentieth_and_no_more():
    line = torch.tensor([0.0, 0.0])  # an edge at 0.5
    cold = GenerateRequest(prompt="x", temperature=2 * LOGIT_MARGIN)
    assert is_near(line, cold, 0.5 + DRAW_MARGIN_MAX - 0.001, 0)
    assert not is_near(line, cold, 0.5 + DRAW_MARGIN_MAX + 0.001, 0)


def test_an_engine_that_looks_at_nothing_says_so():
    class Plain:
        """Has no `recheck`."""

    with pytest.raises(RequestError) as refused:
        worker._add(Plain(), GREEDY, say.Add(session=1, request=b"", claim=Claim((1,))))
    assert refused.value.code == "NOT_OFFERED"
