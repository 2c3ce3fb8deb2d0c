"""What our engine's finding says of those who made an answer."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest

from aivillage.models.inference.fingerprint import DEVIATION_MAX, Fingerprint, packed
from aivillage.models.inference.generate import GenerateRequest
from aivillage.node.recheck import RecheckJob, judgeable, judged, relation
from aivillage.node.verifier import Answer
from aivillage.protocols.errors import JobError
from aivillage.protocols.ports import EngineInfo
from aivillage.protocols.rechecking import Claim, Deviation, Finding, OddDraw, OddValue
from tests.unit.node.test_verifier import share

NAME = "torch1/2.13/w/float32/cpu/{}/threads1/rows/0"
OURS, NEAR, OTHER = NAME.format("AVX512"), NAME.format("AVX2"), "openvino/1"
OWN = EngineInfo(
    engine="torch", model="m", kernel_class=OURS, identical="guaranteed", active_parameters=1,
    context_tokens=1, vocabulary=1, weights_sha256="", rechecks=True,
)  # fmt: skip


def of(first, count):
    return packed(Fingerprint(first, (1.0,) * count))


def answer(*shares, fingerprints=()):
    count = sum(part.count for part in shares)
    return Answer(token_ids=tuple(range(count)), shares=shares, fingerprints=fingerprints)


@pytest.mark.parametrize(
    ("kernel", "identical", "kind"),
    [
        (OURS, "guaranteed", "same"),
        (OURS, "best effort", "near"),
        (NEAR, "guaranteed", "near"),
        (NAME.replace("/w/", "/v/"), "guaranteed", "other"),
        (NAME.replace("float32", "bfloat16"), "guaranteed", "other"),
        (OTHER, "guaranteed", "other"),
        (NAME.replace("torch1", "openvino2"), "guaranteed", "near"),
        (NAME.replace("torch1", "openvino1"), "guaranteed", "other"),
        ("", "", "other"),
    ],
)
def test_how_a_class_lies_to_ours(kernel, identical, kind):
    assert relation(share("a", 0, 1, kernel, identical), OWN) == kind
    lax = msgspec.structs.replace(OWN, identical="best effort")
    assert relation(share("a", 0, 1, kernel, identical), lax) == kind.replace("same", "near")


def test_another_grammar_library_is_another_family_for_answers_in_a_format_only():
    ours, older = (OURS + f"/llguidance{version}/digest" for version in ("2", "1"))
    own = msgspec.structs.replace(OWN, kernel_class=ours)
    marks = (of(0, 8),)
    for kernel, judged_in_format in ((older, False), (OURS, False), (ours, True)):
        one = share("a", 0, 8, kernel)
        assert judgeable(answer(one, fingerprints=marks), own)
        asked = msgspec.structs.replace(answer(one, fingerprints=marks), in_format=True)
        assert bool(judgeable(asked, own)) == judged_in_format


def test_in_our_class_tokens_are_enough_and_elsewhere_fingerprints_of_all():
    assert judgeable(answer(share("a", 0, 40, OURS)), OWN)
    near = share("a", 0, 40, NEAR)
    assert judgeable(answer(near, fingerprints=(of(0, 32), of(32, 8))), OWN) == (near,)
    for marks in ((), (of(0, 32),), (of(0, 32), of(33, 7)), (of(32, 8),), (b"none",)):
        assert judgeable(answer(near, fingerprints=marks), OWN) == ()


def test_a_lost_seller_owes_the_fingerprint_of_31_tokens_and_of_no_32():
    for count, is_judged in ((31, True), (32, False)):
        lost, rest = share("a", 0, count, NEAR), share("b", count, 8, NEAR)
        found = judgeable(answer(lost, rest, fingerprints=(of(count, 8),)), OWN)
        assert found == ((lost, rest) if is_judged else (rest,))


def test_what_is_right_is_right():
    found = judged(answer(share("a", 0, 8, OURS)), OWN, Finding(8))
    assert (found.wrong, [part.seller for part in found.judged]) == (None, ["a"])


def test_a_token_that_rounding_explains_is_wrong_in_our_class_and_right_in_another():
    finding = Finding(8, (OddDraw(3, near=True),), (Deviation(0, 8, 1e-6),))
    strict = judged(answer(share("a", 0, 8, OURS), fingerprints=(of(0, 8),)), OWN, finding)
    assert strict.wrong is not None
    assert "token 3 is not what" in strict.reason
    lax = judged(answer(share("a", 0, 8, NEAR), fingerprints=(of(0, 8),)), OWN, finding)
    assert lax.wrong is None
    far = Finding(8, (OddDraw(3, near=False),))
    assert judged(answer(share("a", 0, 8, NEAR), fingerprints=(of(0, 8),)), OWN, far).wrong


@pytest.mark.parametrize(
    ("kernel", "near", "wrong"),
    [(OURS, True, True), (OURS, False, True), (NEAR, True, False), (NEAR, False, True)],
)
def test_log_probabilities_are_ours_in_our_class_and_near_in_another(kernel, near, wrong):
    made = answer(share("a", 0, 8, kernel), fingerprints=(of(0, 8),))
    found = judged(made, OWN, Finding(8, values=(OddValue(5, near),)))
    assert (found.wrong is not None) == wrong
    assert found.reason == ("log-probabilities of token 5 are not what this node computed" * wrong)


@pytest.mark.parametrize("kernel", [OURS, NEAR])
def test_another_precision_is_wrong_from_its_first_span_on(kernel):
    made = answer(share("a", 0, 40, kernel), fingerprints=(of(0, 32), of(32, 8)))
    just = (Deviation(0, 32, DEVIATION_MAX), Deviation(32, 8, DEVIATION_MAX))
    assert judged(made, OWN, Finding(40, (), just)).wrong is None
    over = (Deviation(0, 32, DEVIATION_MAX), Deviation(32, 8, 2 * DEVIATION_MAX))
    found = judged(made, OWN, Finding(40, (), over))
    assert found.reason.startswith("tokens 32 to 39 were computed otherwise")
    nothing = (Deviation(0, 32, float("nan")),)
    assert judged(made, OWN, Finding(40, (), nothing)).wrong is not None


def test_the_maker_of_the_first_wrong_token_is_accused_and_nobody_of_another_class():
    parts = share("a", 0, 4, OURS), share("b", 4, 4, OTHER), share("c", 8, 4, OURS)
    finding = Finding(12, (OddDraw(5, near=False), OddDraw(9, near=False)))
    found = judged(answer(*parts), OWN, finding)
    assert found.wrong is parts[2]
    assert found.judged == (parts[0], parts[2])


class Looking:
    """An engine, and the workers that it is asked of: keeps what it is shown."""

    def __init__(self):
        self.shown = []

    async def engine(self, _model):
        return self

    async def recheck(self, _request, claim):
        self.shown.append(claim)
        return Finding(len(claim.token_ids))


async def test_the_engine_is_shown_all_that_was_said():
    looking = Looking()
    body = msgspec.msgpack.encode(GenerateRequest(prompt="x", logprobs=1))
    said = answer(share("a", 0, 8, OURS), fingerprints=(of(0, 8),))
    said = msgspec.structs.replace(said, logprobs=bytes(96))
    job = RecheckJob(SimpleNamespace(request=body), SimpleNamespace(workers=looking), said)
    await job._work()
    assert looking.shown == [Claim(said.token_ids, said.fingerprints, said.logprobs)]
    assert job.finding == Finding(8)


def test_a_finding_about_another_answer_is_a_failure():
    with pytest.raises(JobError, match="another answer"):
        judged(answer(share("a", 0, 8, OURS)), OWN, Finding(7))
