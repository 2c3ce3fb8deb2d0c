"""inference.embed and inference.rerank without a model: limits, prices, checks, comparisons."""

import math
import random

import msgspec
import pytest

from aivillage.models import registry
from aivillage.models.inference import catalogue, embed, rerank, vectors
from aivillage.models.inference.embed import EmbedRequest, EmbedResult, Encoded
from aivillage.models.inference.rerank import Ranked, RerankRequest, RerankResult
from aivillage.protocols.codec import pack, unpack
from aivillage.protocols.errors import RequestError
from aivillage.protocols.model_ports import ComparedModule, PaidByPartsModule
from aivillage.protocols.ports import Machine
from aivillage.protocols.pricing import Terms, price

WIDTH = 384
SHA = catalogue.MODELS[catalogue.EMBEDDER].sha256
KERNEL = "encoder1/x"


def unit(seed, width=WIDTH):
    draw = random.Random(seed)
    numbers = [draw.gauss(0, 1) for _ in range(width)]
    length = math.hypot(*numbers)
    return vectors.packed(n / length for n in numbers)


def embedded(request, **changes):
    found = tuple(unit(text) for text in request.text)
    result = EmbedResult(
        model=request.model, weights_sha256=SHA, kernel_class=KERNEL, dimension=WIDTH, vectors=found
    )
    return msgspec.structs.replace(result, **changes)


def reranked(request, scores, **changes):
    result = RerankResult(
        model=request.model, weights_sha256=SHA, kernel_class=KERNEL, method="cosine",
        ranking=rerank.ranked(tuple(vectors.packed([s]) for s in scores)),
    )  # fmt: skip
    return msgspec.structs.replace(result, **changes)


# ------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    ("fits", "does_not"),
    [
        (("x",) * embed.TEXTS_MAX, ("x",) * (embed.TEXTS_MAX + 1)),
        (("x" * embed.TEXT_BYTES_MAX,), ("x" * (embed.TEXT_BYTES_MAX + 1),)),
        (("é" * (embed.TEXT_BYTES_MAX // 2),), ("é" * (embed.TEXT_BYTES_MAX // 2) + "x",)),
        (("x" * embed.TEXT_BYTES_MAX,) * 8, ("x" * embed.TEXT_BYTES_MAX,) * 8 + ("x",)),
        (("x",), ("",)),
        (("x",), ()),
    ],
)
def test_texts_at_their_limits(fits, does_not):
    assert embed.TEXT_BYTES_MAX * 8 == embed.TEXTS_BYTES_MAX
    unpack(EmbedRequest, msgspec.msgpack.encode({"text": fits}))
    with pytest.raises(RequestError):
        unpack(EmbedRequest, msgspec.msgpack.encode({"text": does_not}))


def test_a_query_counts_among_the_bytes_of_its_documents():
    full = ("x" * embed.TEXT_BYTES_MAX,) * 7 + ("x" * (embed.TEXT_BYTES_MAX - 1),)
    RerankRequest(query="q", document=full)
    with pytest.raises(ValueError, match="together"):
        RerankRequest(query="qq", document=full)
    with pytest.raises(ValueError, match="query"):
        RerankRequest(query="é" * (embed.TEXT_BYTES_MAX // 2) + "x", document=("x",))
    RerankRequest(query="q", document=("x",) * embed.TEXTS_MAX)
    with pytest.raises(RequestError):
        body = {"query": "q", "document": ("x",) * (embed.TEXTS_MAX + 1)}
        unpack(RerankRequest, msgspec.msgpack.encode(body))


def test_the_largest_request_with_its_parts_and_the_largest_result_fit_a_frame():
    request = EmbedRequest(text=("x" * 1024,) * embed.TEXTS_MAX)
    parts = pack(Encoded(tuple(bytes(vectors.FLOAT_BYTES * 512) for _ in request.text), ()))
    assert len(pack(request)) + len(parts) < 1 << 20
    assert len(parts) == pytest.approx(embed.VECTORS_BYTES_MAX, rel=0.01)


# ------------------------------------------------------------------ price


def test_texts_are_paid_by_quads_of_their_bytes_each_rounded_up():
    request = EmbedRequest(text=("abcd", "é", "abcde"))
    usage, seconds = embed.MODULE.estimate(request, Machine())
    assert usage == {"text_quads": 1 + 1 + 2} == embed.MODULE.meter(request, embedded(request))
    terms = Terms(prices_micro_credits=embed.MODULE.prices_micro_credits())
    assert price(terms, usage) == 4 * 22
    assert 0 < seconds < 10
    half = embedded(request, vectors=embedded(request).vectors[:1])
    assert embed.MODULE.meter(request, half) == {"text_quads": 1}


def test_each_document_is_paid_with_the_query():
    request = RerankRequest(query="abcdef", document=("ab", "abc"))
    usage, _ = rerank.MODULE.estimate(request, Machine())
    assert usage == {"pair_quads": 2 + 3}
    assert rerank.MODULE.meter(request, reranked(request, (0.1, 0.2))) == usage
    assert rerank.MODULE.meter(request, reranked(request, (0.1,))) == {"pair_quads": 2}


def test_a_price_follows_from_the_weights():
    model = catalogue.MODELS[catalogue.EMBEDDER]
    assert embed.MODULE.prices_of(model.active_parameters) == {"text_quads": 22}
    assert rerank.MODULE.prices_of(1_000_001) == {"pair_quads": 3}
    assert model.active_parameters == 6 * (4 * 384 * 384 + 2 * 384 * 1536)


# ------------------------------------------------------------------ check

EMBED = EmbedRequest(text=("one", "two", "three"))


def test_an_honest_result_passes():
    verdict = embed.MODULE.check(EMBED, embedded(EMBED, cut=(0, 2)))
    assert verdict.ok, verdict.reason


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vectors": (unit(1), unit(2))}, "2 vectors of 3"),
        ({"vectors": tuple(map(unit, range(4)))}, "4 vectors of 3"),
        ({"dimension": 192, "vectors": tuple(unit(n, 192) for n in range(3))}, "of 192 numbers"),
        ({"dimension": 0, "vectors": (b"",) * 3}, "of 0 numbers"),
        ({"vectors": (unit(1), unit(2), unit(3)[:-4])}, "vector 2"),
        ({"vectors": (vectors.packed([0.1] * WIDTH), unit(2), unit(3))}, "vector 0: its length"),
        ({"vectors": (unit(1), vectors.packed([math.nan] * WIDTH), unit(3))}, "length is nan"),
        ({"vectors": (unit(1), vectors.packed([math.inf] * WIDTH), unit(3))}, "length is inf"),
        ({"vectors": (unit(1), bytes(4 * WIDTH), unit(3))}, "length is 0"),
        ({"weights_sha256": "0" * 64}, "weights"),
        ({"model": "another"}, "another model"),
        ({"cut": (3,)}, "texts that are none"),
        ({"cut": (1, 1)}, "texts that are none"),
        ({"cut": (-1,)}, "texts that are none"),
    ],
)
def test_what_is_wrong_with_vectors_is_told(changes, said):
    verdict = embed.MODULE.check(EMBED, embedded(EMBED, **changes))
    assert not verdict.ok
    assert said in verdict.reason


def test_a_length_may_miss_by_rounding_and_no_more():
    one = vectors.numbers(unit(1))
    near = vectors.packed(n * (1 + 0.9e-4) for n in one)
    far = vectors.packed(n * (1 + 1.2e-4) for n in one)
    assert not vectors.fault(near, WIDTH)
    assert vectors.fault(far, WIDTH)


RERANK = RerankRequest(query="q", document=("a", "b", "c"))


def test_an_honest_order_passes_and_equal_ones_keep_theirs():
    result = reranked(RERANK, (0.5, 0.75, 0.5))
    assert [one.index for one in result.ranking] == [1, 0, 2]
    assert rerank.MODULE.check(RERANK, result).ok


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ranking": (Ranked(index=0, score=0.5), Ranked(index=1, score=0.1))}, "3 documents"),
        ({"ranking": tuple(Ranked(index=n % 2, score=0.1) for n in range(3))}, "3 documents"),
        ({"ranking": tuple(Ranked(index=n, score=0.1 * n) for n in range(3))}, "not first"),
        ({"ranking": tuple(Ranked(index=n, score=math.nan) for n in range(3))}, "score"),
        ({"ranking": tuple(Ranked(index=n, score=1.1) for n in range(3))}, "score"),
        ({"method": "cross", "ranking": tuple(Ranked(index=n, score=-0.5) for n in range(3))},
         "score"),
        ({"weights_sha256": "0" * 64}, "weights"),
        ({"model": "another"}, "another model"),
        ({"cut": (3,)}, "texts that are none"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_order_is_told(changes, said):
    verdict = rerank.MODULE.check(RERANK, reranked(RERANK, (0.3, 0.2, 0.1), **changes))
    assert not verdict.ok
    assert said in verdict.reason


# ------------------------------------------------------------------ comparing


def moved(vector, by):
    """The same vector, turned a little: its distance from itself is about `by`."""
    numbers = list(vectors.numbers(vector))
    numbers[0] += by
    length = math.hypot(*numbers)
    return vectors.packed(n / length for n in numbers)


@pytest.mark.parametrize(("by", "place"), [(0, None), (1e-6, None), (5e-5, None), (3e-4, 1)])
def test_vectors_agree_up_to_rounding(by, place):
    one = embedded(EMBED)
    first, second, third = one.vectors
    other = msgspec.structs.replace(one, vectors=(first, moved(second, by), third))
    assert embed.MODULE.parting(EMBED, one, other) == place


def test_a_shorter_list_parts_where_it_ends():
    one = embedded(EMBED)
    other = msgspec.structs.replace(one, vectors=one.vectors[:2])
    assert embed.MODULE.parting(EMBED, one, other) == 2


def test_scores_agree_up_to_rounding_whatever_the_order_of_near_ones():
    one = reranked(RERANK, (0.5, 0.50001, 0.1))
    other = reranked(RERANK, (0.50001, 0.5, 0.1))
    assert rerank.MODULE.parting(RERANK, one, other) is None
    wrong = reranked(RERANK, (0.5, 0.5, 0.1005))
    assert rerank.MODULE.parting(RERANK, one, wrong) == 2


def test_a_part_is_found_in_the_result_that_has_it_unchanged():
    one = embedded(EMBED)
    part = pack(Encoded(one.vectors[1:], ()))
    assert embed.MODULE.items_of(one, part, 1) == 2
    assert embed.MODULE.items_of(one, part, 0) == 0
    scores = tuple(vectors.packed([s]) for s in (0.3, 0.2, 0.1))
    order = reranked(RERANK, (0.3, 0.2, 0.1))
    assert rerank.MODULE.items_of(order, pack(Encoded(scores[1:], ())), 1) == 2
    assert rerank.MODULE.items_of(order, pack(Encoded(scores[1:], ())), 0) == 0
    assert rerank.MODULE.items_of(order, pack(Encoded((b"no",), ())), 0) == 0


# ------------------------------------------------------------------ going on


class Had:
    def __init__(self, *bodies):
        self.delivered = bodies


def fault(value):
    return vectors.fault(value, WIDTH)


FOUR = EmbedRequest(text=("a", "bcdef", "c", "d"))


def test_what_was_delivered_is_gone_on_from():
    bodies = [pack(Encoded((unit(1), unit(2)), (1,))), pack(Encoded((unit(3),), (2,)))]
    found = embed.had_before(Had(*bodies), 4, fault)
    assert found == Encoded((unit(1), unit(2), unit(3)), (1, 2))
    assert embed.MODULE.count_part(FOUR, bodies[0], 0) == 2
    assert embed.MODULE.count_part(FOUR, bodies[1], 2) == 1
    assert embed.MODULE.usage_of(FOUR, 2) == {"text_quads": 1 + 2}
    assert embed.MODULE.dearest_item(FOUR) == {"text_quads": 2}


@pytest.mark.parametrize(
    "body",
    [
        b"garbage",
        pack(Encoded((), ())),
        pack(Encoded((unit(1, 12),), ())),
        pack(Encoded((bytes(4 * WIDTH),), ())),
        pack(Encoded((unit(1),), (7,))),
        pack(Encoded(tuple(map(unit, range(5))), ())),
    ],
    ids=["garbage", "nothing", "dimension", "no length", "cut", "too many"],
)
def test_a_part_that_is_none_is_neither_taken_nor_gone_on_from(body):
    with pytest.raises(RequestError):
        embed.MODULE.count_part(FOUR, body, 0)
    with pytest.raises(RequestError):
        embed.had_before(Had(body), 4, fault)


def test_scores_come_in_parts_too():
    request = RerankRequest(query="abc", document=("a", "bcdef"))
    part = pack(Encoded((vectors.packed([0.5]),), ()))
    assert rerank.MODULE.count_part(request, part, 1) == 1
    assert rerank.MODULE.dearest_item(request) == {"pair_quads": 2}
    assert rerank.MODULE.usage_of(request, 1) == {"pair_quads": 1}
    for wrong in (vectors.packed([1.1]), vectors.packed([math.nan]), vectors.packed([0.1, 0.1])):
        with pytest.raises(RequestError):
            rerank.MODULE.count_part(request, pack(Encoded((wrong,), ())), 0)
    with pytest.raises(RequestError):
        rerank.MODULE.count_part(request, part, 2)


def test_a_part_costs_no_more_than_may_be_lent_unless_one_text_does():
    costs = [4_000, 4_000, 4_000, 30_000, *([1] * 40)]
    ends, at = [], 0
    while at < len(costs):
        at = embed._end_of_part(costs, at)
        ends.append(at)
    assert ends == [2, 3, 4, 20, 36, 44]
    assert embed._end_of_part([5_000, 5_000], 0) == 2
    assert embed._end_of_part([5_000, 5_001], 0) == 1


# ------------------------------------------------------------------ the table


def test_operations_of_models_say_which_and_compare_their_results():
    assert registry.formats("inference.embed") == ("encoder",)
    assert registry.operation_of("ranker") == "inference.rerank"
    assert registry.operation_of("gguf") == "inference.generate"
    assert registry.formats("mesh.noop") == () == registry.formats("text.unknown")
    for name in ("inference.embed", "inference.rerank"):
        assert isinstance(registry.compared(name), ComparedModule)
        assert isinstance(registry.paid_by_parts(name), PaidByPartsModule)
    assert registry.compared("inference.generate") is None
    assert registry.paid_by_parts("mesh.noop") is None
    assert registry.compared("mesh.noop") is None
