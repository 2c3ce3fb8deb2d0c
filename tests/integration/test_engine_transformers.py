"""Several architectures by transformers: the same tokens as the library, whatever the slices."""

from __future__ import annotations

import re

import msgspec
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")

from aivillage.models.inference import catalogue, safetensors_model  # noqa: E402
from aivillage.models.inference.engine_choice import engine_of  # noqa: E402
from aivillage.models.inference.engine_transformers import TransformersEngine  # noqa: E402
from aivillage.models.inference.formats import Format  # noqa: E402
from aivillage.models.inference.generate import MODULE, GenerateRequest  # noqa: E402
from aivillage.models.inference.placement import HOST, Placement  # noqa: E402
from aivillage.models.library import inspection, pull, sources  # noqa: E402
from aivillage.models.library.store import Library  # noqa: E402
from aivillage.protocols.errors import ConfigError, RefusedError, RequestError  # noqa: E402
from tests.integration.asking_engines import cut, results  # noqa: E402
from tests.unit.models import tiny_models  # noqa: E402

pytestmark = pytest.mark.slow
PROMPT = "the hen and the fox went to the market one fine morning, and " * 3
TOKENS = 12


def held(tmp_path, kind="qwen2", **changes):
    folder = tmp_path / kind
    folder.mkdir()
    model = tiny_models.write_safetensors(folder, kind, **changes)
    library = Library(tmp_path / "models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pull.inspection, "look", inspection.facts_of)
        source = sources.parse(f"file:{folder}", None)
        told = pull.Pull(
            library, source, name="", bytes_max=1 << 30, progress=lambda *_: None
        ).run()
    return catalogue.pulled(told, library.place(told.name)), model


def answers(engine, *requests):
    for number, request in enumerate(requests):
        engine.add(number, request, ())
        engine.allow(number, 10_000)
    ids = {number: [] for number in range(len(requests))}
    while frames := engine.step():
        for frame in frames:
            assert not frame.error
            ids[frame.session] += frame.token_ids
    return list(ids.values())


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("qwen2", {}),
        ("gemma2", {"head_dim": 16, "sliding_window": 32, "tie_word_embeddings": False}),
        ("mixtral", {"num_local_experts": 4}),
    ],
)
def test_greedy_answers_are_the_librarys(tmp_path, kind, changes):
    """Against one pass over the whole text for each token, without a cache."""
    known, model = held(tmp_path, kind, initializer_range=0.4, **changes)
    engine = engine_of(known, slots=2)
    assert isinstance(engine, TransformersEngine)
    request = GenerateRequest(prompt=PROMPT, model=kind, max_tokens=TOKENS)
    ids = list(engine.tokenizer.prompt([request_message(request)]).token_ids)
    wanted = []
    with torch.inference_mode():
        while len(wanted) < TOKENS and not (wanted and wanted[-1] == 2):
            logits = model(input_ids=torch.tensor([ids + wanted])).logits[0, -1]
            wanted.append(int(logits.argmax()))
    other = msgspec.structs.replace(request, prompt="another")
    found, beside = answers(engine, request, other)
    assert found == wanted
    assert len(set(found)) > 2, "it says more than one thing over and over"
    assert answers(engine, other) == [beside]


def test_in_bfloat16_it_answers_by_the_same_code(tmp_path):
    """What a GPU computes with, on the CPU."""
    known, _ = held(tmp_path, initializer_range=0.4)
    half = TransformersEngine(known, slots=2, at=Placement(torch.device("cpu"), torch.bfloat16))
    assert "/bfloat16/" in half.info().kernel_class
    request = GenerateRequest(prompt=PROMPT, model="qwen2", max_tokens=TOKENS)
    (found,) = answers(half, request)
    assert 0 < len(found) <= TOKENS


def test_a_full_gpu_fails_the_session_whose_step_it_was(tmp_path, monkeypatch):
    known, _ = held(tmp_path, initializer_range=0.4)
    engine = engine_of(known, slots=2)
    request = GenerateRequest(prompt=PROMPT, model="qwen2", max_tokens=2)

    def full(**_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine._model, "forward", full)
        engine.add(1, request, ())
        engine.allow(1, 10_000)
        (frame,) = engine.step()
    assert (frame.session, frame.finished) == (1, "error")
    assert "the GPU's memory is full" in frame.error
    assert answers(engine, request)[0]


def request_message(request):
    from aivillage.models.inference.generate import conversation

    return conversation(request)[0]


def test_a_session_goes_on_from_what_was_delivered_and_frees_its_slot(tmp_path):
    known, _ = held(tmp_path, initializer_range=0.4)
    engine = engine_of(known, slots=1)
    request = GenerateRequest(
        prompt=PROMPT, model="qwen2", max_tokens=TOKENS, temperature=1, seed=5
    )
    (whole,) = answers(engine, request)
    engine.add(0, request, whole[:4])
    engine.allow(0, 10_000)
    with pytest.raises(RefusedError, match="BUSY"):
        engine.add(1, request, ())
    rest = []
    while frames := engine.step():
        rest += frames[0].token_ids
    assert whole[:4] + rest == whole
    engine.add(1, request, ())
    engine.cancel(1)
    assert engine.step() == []


def test_an_answer_is_in_its_format_and_goes_on_in_it(tmp_path):
    pytest.importorskip("llguidance")
    known, _ = held(tmp_path, initializer_range=0.4)
    engine = engine_of(known, slots=2)
    request = GenerateRequest(
        prompt=PROMPT, model="qwen2", max_tokens=24, temperature=1, seed=5, logprobs=3,
        format=Format(regex="[a-z]{2,5}(-[a-z]{2,5}){2}"),
    )  # fmt: skip
    free = msgspec.structs.replace(request, format=None, logprobs=0)
    (undisturbed,) = answers(engine, free)
    whole, beside = results(engine, [request, free])
    assert re.fullmatch(request.format.regex, whole.text)
    assert MODULE.check(request, whole).ok
    assert list(beside.token_ids) == undisturbed
    for at in (1, 5, len(whole.token_ids) - 1):
        (again,) = results(engine, [request], [cut(whole, at)])
        assert again.token_ids == whole.token_ids
        said = [[its.logprob for its in one.logprobs] for one in (again, whole)]
        assert said[0] == pytest.approx(said[1], abs=1e-3), "this engine promises no bits"
    engine.add(0, msgspec.structs.replace(request, format=Format(lark='start: a\na: "x" a')), ())
    engine.allow(0, 10_000)
    frames = []
    while found := engine.step():
        frames += found
    assert "format" in frames[-1].error


def test_what_does_not_fit_is_refused(tmp_path):
    known, _ = held(tmp_path)
    engine = engine_of(known, slots=1)
    with pytest.raises(RequestError, match="answers requests to"):
        engine.add(0, GenerateRequest(prompt="a"), ())
    with pytest.raises(RequestError, match="TOO_LARGE"):
        engine.add(0, GenerateRequest(prompt="a" * 600, model="qwen2"), ())
    with pytest.raises(RequestError, match="vocabulary"):
        engine.add(0, GenerateRequest(prompt="a", model="qwen2"), (9_999,))


def test_changed_or_missing_weights_do_not_load(tmp_path):
    known, _ = held(tmp_path)
    folder = catalogue.weights_path(known)
    path = folder / "model.safetensors"
    body = bytearray(path.read_bytes())
    body[-1] ^= 1
    path.write_bytes(body)
    with pytest.raises(ConfigError, match="damaged"):
        engine_of(known, slots=1)
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors.pop("model.norm.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"model\.norm\.weight"):
        safetensors_model.load(folder, HOST)
