"""Several models: each has its price in offers, lists and quotes, and no quote serves another."""

import msgspec
import pytest

from aivillage.models.description import described
from aivillage.models.inference import catalogue, stages
from aivillage.models.inference.catalogue import DEFAULT, KnownModel
from aivillage.models.inference.generate import MODULE, GenerateRequest
from aivillage.node.discovery import OFFER_BYTES_MAX, Discovery
from aivillage.node.offers import does, price_offered
from aivillage.node.pricelist import PriceList, listed, listed_by, quote_hash, read_quote
from aivillage.node.shelf import Shelf, listed_with
from aivillage.protocols.codec import pack
from aivillage.protocols.envelope import unseal
from aivillage.protocols.errors import ConfigError, PeerError, RefusedError, RequestError
from aivillage.protocols.messages import Offer, OfferedOperation, Quote
from aivillage.protocols.pricing import MODELS_MAX, price, token_price
from tests.conftest import make_key, make_peer

GENERATE = described(MODULE, "inference.generate")


def model(name="large", active=3_500_000_000, memory=10, folder="/gone"):
    return KnownModel(
        name=name, active_parameters=active, vocabulary=9, context_tokens=64, end_token_id=2,
        sha256="a" * 64, parameters=active, memory_bytes=memory, folder=folder, file="x",
    )  # fmt: skip


SMALL, LARGE = model("small", 5_000_000), model()


def test_a_price_follows_from_the_weights_that_a_token_multiplies():
    assert [token_price(n) for n in (1, 500_000, 500_001, 3_500_000_000)] == [1, 1, 2, 7_000]
    assert token_price(catalogue.MODELS[DEFAULT].active_parameters) == 269


def test_each_model_is_listed_at_the_owners_price():
    told = PriceList(make_key(1), 150).priced(listed_with(GENERATE, [SMALL, LARGE]))
    assert {m.name: m.prices_micro_credits for m in told.models} == {
        "small": {"prompt_quads": 15, "output_tokens": 15},
        "large": {"prompt_quads": 10_500, "output_tokens": 10_500},
    }
    assert told.terms.prices_micro_credits == told.models[0].prices_micro_credits


def test_a_quote_for_one_model_is_none_for_another():
    prices = PriceList(make_key(1), 100)
    operation = listed_with(GENERATE, [SMALL])
    envelope = prices.quote(operation, prices.terms(operation), {}, 0.0)
    quote = read_quote(envelope, make_peer(1), "inference.generate", "small")
    name = quote_hash(envelope)
    assert prices.find(name, "inference.generate", "small") == quote
    for other in ("large", "", DEFAULT):
        with pytest.raises(RefusedError, match="QUOTE_EXPIRED"):
            prices.find(name, "inference.generate", other)
    for other in ("large", DEFAULT):
        with pytest.raises(PeerError):
            read_quote(envelope, make_peer(1), "inference.generate", other)


def test_a_quote_from_before_models_had_names_is_for_the_default_one():
    prices = PriceList(make_key(1), 100)
    envelope = prices.quote(GENERATE, listed(GENERATE), {}, 0.0)
    assert read_quote(envelope, make_peer(1), "inference.generate", DEFAULT).model == ""
    with pytest.raises(PeerError):
        read_quote(envelope, make_peer(1), "inference.generate", "small")


def test_a_buyer_computes_price_and_worth_without_the_model():
    prices = PriceList(make_key(1), 200)
    operation = listed_with(GENERATE, [LARGE])
    envelope = prices.quote(operation, prices.terms(operation), {}, 0.0)
    quote = read_quote(envelope, make_peer(1), "inference.generate", "large")
    request = GenerateRequest(prompt="abcde", model="large", max_tokens=3)
    usage, _ = MODULE.estimate(request, None)
    assert price(quote.terms, usage) == 2 * 7_000 * 5
    assert price(listed_by(quote, GENERATE), usage) == 7_000 * 5
    old = Quote(seller="s", operation="x", terms=quote.terms, not_after_unix_ms=0)
    assert listed_by(old, GENERATE) == listed(GENERATE)


def offer_of(models, first="", addresses=()):
    found = Discovery(make_key(1))
    listing = PriceList(make_key(1), 100).priced(listed_with(GENERATE, models))
    signer, offer = unseal(found.make_offer([listing], addresses, 1, 60.0), "offer", Offer)
    assert signer == make_peer(1)
    return offer


def test_an_offer_names_models_with_a_price_and_a_buyer_finds_who_has_his():
    (offered,) = offer_of([SMALL, LARGE]).operations
    assert offered.models == {"small": 10, "large": 7_000}
    usage = {"prompt_quads": 2, "output_tokens": 3}
    assert price_offered(offered, usage, "large") == 35_000
    assert price_offered(offered, usage, "small") == 50
    assert does(offered, "inference.generate", "large")
    assert does(offered, "inference.generate", "")
    assert not does(offered, "inference.generate", DEFAULT)
    assert not does(offered, "mesh.noop", "large")


def test_the_default_model_alone_is_offered_as_before():
    (offered,) = offer_of([catalogue.MODELS[DEFAULT]]).operations
    assert offered.models == {}
    assert does(offered, "inference.generate", DEFAULT)
    assert not does(offered, "inference.generate", "small")
    assert price_offered(offered, {"output_tokens": 2}, DEFAULT) == 538


def test_an_offer_that_would_be_too_large_leaves_out_its_last_models():
    many = [model(f"{'m' * 60}{n:02}", 5_000_000) for n in range(MODELS_MAX)]
    offer = offer_of(many, addresses=["/ip4/10.0.0.1/tcp/4051/p2p/" + "x" * 52] * 4)
    assert len(pack(offer)) <= OFFER_BYTES_MAX
    (offered,) = offer.operations
    kept = list(offered.models)
    assert 1 < len(kept) < MODELS_MAX
    assert kept == [each.name for each in many[: len(kept)]]


def test_lists_of_models_have_a_bound_at_one_more():
    names = {f"m{n}": 1 for n in range(MODELS_MAX)}
    good = OfferedOperation(name="x", models=names)
    assert msgspec.convert(msgspec.to_builtins(good), OfferedOperation) == good
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"name": "x", "models": names | {"more": 1}}, OfferedOperation)


# ------------------------------------------------------------------ the shelf


def shelf_of(tmp_path, most=100):
    found = Shelf(tmp_path / "models", most)
    found.is_here = lambda _model: False
    return found


def test_an_empty_shelf_sells_nothing_and_says_so(tmp_path):
    assert shelf_of(tmp_path).sold() == []
    with pytest.raises(RefusedError, match="NOT_OFFERED"):
        shelf_of(tmp_path).require(DEFAULT)


def test_a_model_that_is_too_large_is_not_sold_and_one_that_just_fits_is(tmp_path):
    for most, sold in ((10, True), (9, False)):
        found = shelf_of(tmp_path, most)
        found._look()
        found._models = {"large": LARGE}
        assert bool(found.sold()) == sold
    with pytest.raises(RefusedError, match="OWNER_LIMIT"):
        found.require("large")


def test_a_model_that_did_not_load_is_not_sold_until_something_changes(tmp_path):
    (tmp_path / "models").mkdir()
    found = shelf_of(tmp_path)
    found._look()
    found._models = {"large": LARGE}
    found.spoil("large", ConfigError("damaged"))
    assert found.sold() == []
    with pytest.raises(ConfigError, match="damaged"):
        found.require("large")
    (tmp_path / "models" / ".draft-x").mkdir()
    found._look()
    assert found._spoiled == {}


# ------------------------------------------------------------------ layers of models

STAGE = described(stages.MODULE, stages.OPERATION)


def layered(name="deep", **changed):
    return msgspec.structs.replace(
        model(name, 6_500), layers=4, width=64, layer_parameters=1_500_000,
        head_parameters=500_000, **changed,
    )  # fmt: skip


def stage_of(known, **changed):
    shape = stages.shape_said(known)
    request = stages.StageRequest(first=0, last=2, model=known.name, shape=shape)
    return msgspec.structs.replace(request, **changed)


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """One model that can be split, which no worker may hold whole, and one that cannot."""
    found = shelf_of(tmp_path, most=5)
    everything = {each.name: each for each in (layered(), model("flat"))}
    monkeypatch.setattr(found, "_look", lambda: None)
    monkeypatch.setattr(found, "_models", everything)
    return found


def test_layers_are_sold_of_a_model_that_is_too_large_to_be_sold_whole(shelf):
    assert shelf.sold() == []
    assert [each.name for each in shelf.divisible()] == ["deep"]
    assert shelf.divided(stage_of(layered())) == layered()
    assert shelf.divided(stages.StageRequest(first=0, last=2)) == catalogue.MODELS[DEFAULT]
    shelf.spoil("deep", ConfigError("damaged"))
    assert shelf.divisible() == []


@pytest.mark.parametrize(
    "other",
    [
        layered("gone"), layered(sha256="b" * 64), layered(vocabulary=10),
        layered(context_tokens=65), model("flat"),
    ],
)  # fmt: skip
def test_nobody_computes_layers_of_other_weights_than_the_buyers(shelf, other):
    meant = msgspec.structs.replace(other, layers=4, width=64)
    with pytest.raises(RefusedError, match="NOT_OFFERED"):
        shelf.divided(stage_of(meant))


def test_a_buyer_splits_what_it_has_the_tables_of(shelf):
    assert shelf.require_divisible("deep") == layered()
    assert shelf.require_divisible(DEFAULT) == catalogue.MODELS[DEFAULT]
    for name in ("flat", "gone"):
        assert shelf.find_divisible(name) is None
        with pytest.raises(RequestError, match="cannot be split from here"):
            shelf.require_divisible(name)


def test_layers_of_each_model_have_a_price_of_their_own_in_lists_offers_and_quotes():
    prices = PriceList(make_key(1), 200)
    listing = prices.priced(listed_with(STAGE, [catalogue.MODELS[DEFAULT], layered()]))
    assert {m.name: m.prices_micro_credits for m in listing.models} == {
        DEFAULT: {"layer_tokens": 16, "head_tokens": 114},
        "deep": {"layer_tokens": 6, "head_tokens": 2},
    }
    _, offer = unseal(Discovery(make_key(1)).make_offer([listing], (), 1, 60.0), "offer", Offer)
    (offered,) = offer.operations
    assert all(does(offered, stages.OPERATION, name) for name in (DEFAULT, "deep"))
    assert not does(offered, stages.OPERATION, "flat")
    operation = listed_with(STAGE, [layered()])
    envelope = prices.quote(operation, prices.terms(operation), {}, 0.0)
    quote = read_quote(envelope, make_peer(1), stages.OPERATION, "deep")
    assert quote.terms.prices_micro_credits == {"layer_tokens": 6, "head_tokens": 2}
    with pytest.raises(PeerError):
        read_quote(envelope, make_peer(1), stages.OPERATION, DEFAULT)
