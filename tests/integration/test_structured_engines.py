"""Formats and log-probabilities, asked of every engine that is installed."""

import json
import re

import msgspec
import pytest

from aivillage.models.inference import catalogue, engine_choice
from aivillage.node.workers import WorkerSettings, open_workers
from aivillage.protocols.codec import pack
from aivillage.protocols.errors import AivillageError, JobError, RequestError
from aivillage.protocols.rechecking import Claim

try:
    catalogue.weights_path(catalogue.known(catalogue.DEFAULT))
except AivillageError as error:
    pytest.skip(str(error), allow_module_level=True)
if not engine_choice.installed():
    pytest.skip("the extra `models` is not installed", allow_module_level=True)
pytest.importorskip("llguidance")

from aivillage.models.inference.formats import Format
from aivillage.models.inference.generate import MODULE, GenerateRequest
from tests.integration.asking_engines import PLENTY, alone, cut, forget, packaged, results, together

pytestmark = pytest.mark.slow
SLOTS = 8
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"enum": ["tea", "rain", "☃"]}, "maxItems": 3},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
PROMPT = "Describe a person named Anna as JSON, with her name, her age and what she likes."
SCHEMA = GenerateRequest(prompt=PROMPT, max_tokens=90, format=Format(schema=PERSON))
CHOICE = GenerateRequest(
    prompt="Is the sky blue?",
    max_tokens=12,
    format=Format(choice=("yes", "no", "maybe, who knows")),
)
REGEX = GenerateRequest(
    prompt="Say a word and a number.", max_tokens=20, logprobs=4,
    temperature=1.0, top_p=0.95, seed=3, format=Format(regex=r"[A-Z][a-z]{2,9} [0-9]{3}"),
)  # fmt: skip
LARK = GenerateRequest(
    prompt="Add some numbers.", max_tokens=24, temperature=0.8, seed=11,
    format=Format(lark='start: NUMBER ("+" NUMBER){1,3}\nNUMBER: /[1-9][0-9]{0,2}/'),
)  # fmt: skip
ASKED = {"choice": CHOICE, "schema": SCHEMA, "regex": REGEX, "lark": LARK}
PLAIN = GenerateRequest(prompt="Tell me a story about a fox.", max_tokens=12)
WARM = msgspec.structs.replace(PLAIN, temperature=0.9, top_p=0.95, seed=7)


@pytest.fixture(scope="module", params=engine_choice.installed())
def engine(request):
    forget(packaged(request.param))
    return packaged(request.param)


@pytest.fixture(scope="module")
def wanted(engine):
    """What each of `ASKED` gets alone."""
    return {name: results(engine, [request])[0] for name, request in ASKED.items()}


def test_an_answer_is_in_its_format_and_passes_the_check(wanted):
    for name, request in ASKED.items():
        assert MODULE.check(request, wanted[name]).ok, name
        assert wanted[name].finish_reason == "eos"
    assert wanted["choice"].text in CHOICE.format.choice
    assert re.fullmatch(REGEX.format.regex, wanted["regex"].text)
    assert re.fullmatch(r"[1-9]\d{0,2}(\+[1-9]\d{0,2}){1,3}", wanted["lark"].text)


def test_json_parses_and_is_what_the_schema_says(engine):
    for seed in range(2):
        asked = msgspec.structs.replace(SCHEMA, temperature=1.2, seed=seed, max_tokens=90)
        (found,) = results(engine, [asked])
        assert MODULE.check(asked, found).ok
        said = json.loads(found.text)
        assert list(said) == ["name", "age", "likes"]
        assert len(said["name"]) <= 12
        assert 0 <= said["age"] <= 150
        assert set(said["likes"]) <= {"tea", "rain", "☃"}
        assert len(said["likes"]) <= 3


def test_it_was_the_format_and_not_the_model_that_wanted_it_so(engine):
    for request in ASKED.values():
        free = msgspec.structs.replace(request, format=None, logprobs=0)
        (found,) = results(engine, [free])
        assert not MODULE.check(msgspec.structs.replace(request, logprobs=0), found).ok


@pytest.mark.parametrize("name", ASKED)
def test_an_answer_goes_on_in_its_format_bit_for_bit_after_any_cut(engine, wanted, name):
    whole = wanted[name]
    for at in sorted({1, 2, len(whole.token_ids) // 2, len(whole.token_ids) - 1}):
        (again,) = results(engine, [ASKED[name]], [cut(whole, at)])
        assert again.token_ids == whole.token_ids, at
        assert again.logprobs == whole.logprobs
        assert whole.text.endswith(again.text)


def test_company_changes_nothing_for_those_with_a_format_and_those_without(engine, wanted):
    free = together(engine, [PLAIN, WARM])
    mixed = [PLAIN, *ASKED.values(), WARM]
    found = results(engine, mixed)
    assert found[1:-1] == list(wanted.values())
    assert [list(found[n].token_ids) for n in (0, -1)] == [ids for ids, _, _ in free]
    assert [found[n].text for n in (0, -1)] == [text for _, text, _ in free]


def test_an_answer_that_is_cut_says_so_and_is_a_beginning(engine, wanted):
    for tokens in (1, 5):
        asked = msgspec.structs.replace(SCHEMA, max_tokens=tokens)
        (found,) = results(engine, [asked])
        assert found.finish_reason == "length"
        assert wanted["schema"].text.startswith(found.text)
        assert MODULE.check(asked, found).ok
        lie = msgspec.structs.replace(found, finish_reason="eos")
        assert not MODULE.check(asked, lie).ok


def test_a_lie_about_the_format_fails_the_check(engine):
    """A whole answer of the model's own, well-formed in every other way."""
    (free,) = results(engine, [msgspec.structs.replace(PLAIN, max_tokens=12)])
    for wanted in (Format(choice=("yes",)), Format(schema=PERSON), Format(regex="[0-9]+")):
        verdict = MODULE.check(msgspec.structs.replace(PLAIN, format=wanted), free)
        assert not verdict.ok
        assert "answer" in verdict.reason


def test_log_probabilities_are_those_of_the_models_own_logits(engine):
    """Not of those that the format left, nor at the request's temperature."""
    torch = pytest.importorskip("torch")
    from aivillage.models.inference.session import Session

    rows = []

    def listening(session, logits, draw=Session.draw):
        rows.append(logits.clone())
        draw(session, logits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "draw", listening)
        (found,) = results(engine, [REGEX])
    assert len(rows) == len(found.token_ids) == len(found.logprobs)
    for row, token, said in zip(rows, found.token_ids, found.logprobs, strict=True):
        direct = torch.log_softmax(row.double(), dim=0).float()
        assert said.logprob == float(direct[token])
        assert list(said.top_logprobs) == direct.topk(4).values.tolist()
        assert direct[list(said.top_ids)].tolist() == list(said.top_logprobs)
    assert any(
        t not in said.top_ids for t, said in zip(found.token_ids, found.logprobs, strict=True)
    )


def test_log_probabilities_change_no_token_and_are_the_same_alone_and_in_company(engine):
    asked = msgspec.structs.replace(WARM, logprobs=20)
    (by_itself,) = results(engine, [asked])
    assert list(by_itself.token_ids) == alone(engine, WARM)[0]
    assert results(engine, [PLAIN, asked, SCHEMA])[1] == by_itself
    assert MODULE.check(asked, by_itself).ok


@pytest.mark.parametrize("name", ASKED)
def test_an_honest_answer_in_a_format_is_read_again_without_a_difference(engine, name):
    asked = msgspec.structs.replace(ASKED[name], logprobs=4)
    claim = made(engine, asked)
    assert claim.logprobs
    finding = looked_at(engine, asked, claim)
    assert (finding.odd, finding.values) == ((), ())
    assert max(span.relative for span in finding.spans) < 1e-6


def test_a_token_that_the_format_forbids_is_found_where_it_is(engine):
    claim = made(engine, SCHEMA)
    free = alone(engine, msgspec.structs.replace(SCHEMA, format=None, max_tokens=8))[0]
    finding = looked_at(engine, SCHEMA, Claim(tuple(free)))
    assert (finding.odd[0].position, finding.odd[0].near) == (0, False)
    ids = (*claim.token_ids[:3], 2)
    finding = looked_at(engine, SCHEMA, Claim(ids))
    assert [(odd.position, odd.near) for odd in finding.odd] == [(3, False)]


def made(engine, request):
    engine.add(0, request, ())
    engine.allow(0, PLENTY)
    ids, marks, said = [], [], b""
    while frames := engine.step():
        said += frames[0].logprobs
        ids += frames[0].token_ids
        marks += [frames[0].fingerprint] if frames[0].fingerprint else []
    return Claim(tuple(ids), tuple(marks), said)


def looked_at(engine, request, claim):
    engine.recheck(0, request, claim)
    while True:
        (frame,) = engine.step()
        assert not frame.error
        if frame.finding is not None:
            return frame.finding


def test_cancel_frees_the_slot_of_an_answer_in_a_format(engine, wanted):
    for number in range(SLOTS):
        engine.add(number, SCHEMA, ())
        engine.allow(number, PLENTY)
    for _ in range(4):
        engine.step()
    for number in range(SLOTS):
        engine.cancel(number)
    assert engine.step() == []
    assert results(engine, [SCHEMA] * SLOTS) == [wanted["schema"]] * SLOTS


@pytest.mark.parametrize(
    ("request_", "delivered", "why"),
    [
        (msgspec.structs.replace(PLAIN, format=Format(regex="(a")), (), "cannot be taken"),
        (msgspec.structs.replace(PLAIN, format=Format(schema={"enum": []})), (), "cannot be taken"),
        (CHOICE, (57, 58, 59), "leaves the format"),
    ],
)
def test_what_no_answer_can_match_is_typed_and_takes_no_slot(engine, request_, delivered, why):
    with pytest.raises(RequestError, match=why):
        engine.add(0, request_, delivered)
    assert together(engine, [msgspec.structs.replace(PLAIN, max_tokens=1)] * SLOTS)


def test_a_format_that_takes_too_much_ends_its_own_session_and_no_other(engine):
    hostile = msgspec.structs.replace(PLAIN, format=Format(lark='start: a\na: "x" a'))
    engine.add(0, hostile, ())
    engine.add(1, PLAIN, ())
    for number in (0, 1):
        engine.allow(number, PLENTY)
    errors, ids = {}, []
    while frames := engine.step():
        for frame in frames:
            if frame.error:
                errors[frame.session] = frame.error
            if frame.session == 1:
                ids += frame.token_ids
    assert list(errors) == [0]
    assert "format" in errors[0]
    assert ids == alone(engine, PLAIN)[0]


async def test_a_worker_serves_on_beside_formats_that_fail(tmp_path):
    """Refused, too much in the middle, and right: three sessions of one process."""
    fastest = engine_choice.installed()[0]
    async with open_workers(
        WorkerSettings(engine=fastest), cache_folder=tmp_path / "c", scratch_folder=tmp_path / "s"
    ) as workers:
        engine = await workers.engine("inference.generate")

        async def answered(wanted):
            request = msgspec.structs.replace(PLAIN, format=wanted)
            async with engine.open_session(pack(request)) as session:
                session.allow(PLENTY)
                return "".join([frame.text async for frame in session])

        with pytest.raises(RequestError, match="cannot be taken"):
            await answered(Format(schema={"not": {}}))
        with pytest.raises(JobError, match="format"):
            await answered(Format(lark='start: a\na: "x" a'))
        assert await answered(Format(choice=("yes", "no"))) in ("yes", "no")
        with pytest.raises(RequestError, match="cannot be taken"):
            await workers.validate("inference.generate", pack(
                msgspec.structs.replace(PLAIN, format=Format(regex="(a"))
            ))  # fmt: skip
