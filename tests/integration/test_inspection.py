"""Strangers' model files, looked into behind the fence: a typed answer whatever they hold."""

from __future__ import annotations

import json
import os
import struct

import pytest

pytest.importorskip("torch")
pytest.importorskip("gguf")

from aivillage.models.library import inspection, safetensors_file
from aivillage.models.library.inspection import facts_of, look
from aivillage.protocols.errors import JobError, RequestError
from tests.unit.models import tiny_models

pytestmark = pytest.mark.slow


@pytest.fixture
def llama(tmp_path):
    pytest.importorskip("transformers")
    tiny_models.write_safetensors(tmp_path, "llama")
    return tmp_path


def change(folder, name, **fields):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_good_gguf_is_told_in_figures(tmp_path):
    tiny_models.write_gguf(tmp_path / "tiny.gguf")
    told = look(tmp_path).facts
    assert (told.format, told.architecture, told.licence) == ("gguf", "llama", "cc0-1.0")
    assert told.parameters == tiny_models.PARAMETERS
    assert told.active_parameters == tiny_models.ACTIVE
    assert (told.vocabulary, told.context_tokens) == (260, tiny_models.CONTEXT)
    assert told.end_token_ids == (2,)


def test_a_hostile_gguf_is_refused_behind_the_fence(tmp_path):
    boast = b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63) + bytes(64)
    (tmp_path / "x.gguf").write_bytes(boast)
    with pytest.raises(RequestError, match="no whole GGUF"):
        look(tmp_path)
    tiny_models.write_gguf(tmp_path / "x.gguf", template="{{ evil }}")
    with pytest.raises(RequestError, match="template"):
        look(tmp_path)


def test_a_hostile_safetensors_header_is_refused_behind_the_fence(llama):
    path = llama / "model.safetensors"
    length = safetensors_file.HEADER_BYTES_MAX + 1
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(RequestError, match="TOO_LARGE"):
        look(llama)
    change(llama, "config.json", num_attention_heads=0)
    with pytest.raises(RequestError):
        look(llama)


def test_a_file_that_kills_its_reader_kills_nobody_else(tmp_path, monkeypatch):
    tiny_models.write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(inspection, "MEMORY_BYTES_MAX", 1)
    (tmp_path / "sitecustomize.py").write_text("import os; os._exit(9)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(JobError, match="did not come to an end"):
        look(tmp_path)


def test_the_one_who_looks_cannot_reach_what_is_not_the_models(tmp_path):
    (tmp_path / "model").mkdir()
    tiny_models.write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "model" / "tiny.gguf").symlink_to(tmp_path / "tiny.gguf")
    with pytest.raises(RequestError, match="Permission denied"):
        look(tmp_path / "model")


# ------------------------------------------------------------------ in this process


@pytest.mark.parametrize(
    ("name", "fields", "why"),
    [
        ("config.json", {"auto_map": {"AutoModel": "evil.Evil"}}, "no model's code runs"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": "evil.Evil"}}, "no model's code"),
        ("config.json", {"_attn_implementation": "evil/kernel"}, "no model's code runs"),
        ("config.json", {"quantization_config": {"bits": 4}}, "packed"),
        ("config.json", {"model_type": "evil"}, "no architecture"),
        ("config.json", {"model_type": ["llama"]}, "no architecture"),
        ("config.json", {"model_type": "vit"}, "no language model"),
        ("config.json", {"hidden_size": 128}, "weights"),
        ("config.json", {"hidden_size": "x"}, "config.json"),
        ("config.json", {"max_position_embeddings": None}, "max_position_embeddings"),
        ("generation_config.json", {"eos_token_id": "x"}, "ends an answer"),
        ("generation_config.json", {"eos_token_id": []}, "ends an answer"),
        ("tokenizer_config.json", {"chat_template": "{{ evil() }}"}, "template"),
    ],
)
def test_a_safetensors_model_that_asks_for_more_is_refused(llama, name, fields, why):
    assert facts_of(llama).facts.parameters == tiny_models.PARAMETERS
    change(llama, name, **fields)
    with pytest.raises(RequestError, match=why):
        facts_of(llama)


def test_experts_that_sit_idle_cost_nothing(tmp_path):
    pytest.importorskip("transformers")
    fields = {"num_local_experts": 4, "num_experts_per_tok": 1}
    tiny_models.write_safetensors(tmp_path, "mixtral", **fields)
    told = facts_of(tmp_path).facts
    width, inner, layers = tiny_models.WIDTH, tiny_models.INNER, tiny_models.LAYERS
    idle = layers * 3 * (3 * width * inner)
    router = layers * 4 * width
    assert told.active_parameters == tiny_models.ACTIVE + router
    assert told.parameters == tiny_models.PARAMETERS + router + idle


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(RequestError, match="a model is"):
        facts_of(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"\x80\x04pickle")
    with pytest.raises(RequestError, match="a model is"):
        facts_of(tmp_path)
