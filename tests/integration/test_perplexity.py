"""Perplexity on WikiText-2 through our loader: the committed figure, and another library's."""

from __future__ import annotations

import math
import os
import pathlib

import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

from aivillage.models.inference import catalogue  # noqa: E402
from aivillage.models.inference.engine_torch import TorchEngine  # noqa: E402
from aivillage.models.inference.llama import Span  # noqa: E402
from aivillage.protocols.errors import AivillageError  # noqa: E402
from tests.house import ROOT  # noqa: E402

pytestmark = pytest.mark.slow

DATA = pathlib.Path(os.environ.get("AIVILLAGE_TEST_DATA", ROOT.parent / "shared" / "data"))
TEXT = DATA / "wikitext-2" / "valid.txt"
CHARACTERS, TOKENS = 12_000, 512
REFERENCE = 15.6595
"""First measured with torch 2.13.0 on AVX-512."""

try:
    WEIGHTS = catalogue.weights_path(catalogue.known(catalogue.DEFAULT))
    MISSING = "" if TEXT.exists() else "no WikiText-2: set AIVILLAGE_TEST_DATA"
except AivillageError as error:
    MISSING = str(error)


@pytest.mark.skipif(bool(MISSING), reason=MISSING or "present")
def test_perplexity_on_wikitext_is_the_reference_and_that_of_transformers():
    """The same tokens; weights unpacked by the gguf package, the pass by transformers."""
    pytest.importorskip("transformers")
    engine = TorchEngine(catalogue.known(catalogue.DEFAULT), slots=1)
    text = TEXT.read_text(encoding="utf-8")[:CHARACTERS]
    ids = tuple(engine.tokenizer.encode(text))[:TOKENS]
    spans = [Span(0, at, ids[at : at + 32]) for at in range(0, TOKENS, 32)]
    states = torch.cat([engine._model.forward([span])[: len(span.token_ids)] for span in spans])
    ours = perplexity(torch.cat([engine._model.logits(part) for part in states.split(8)]), ids)
    assert ours == pytest.approx(REFERENCE, rel=1e-3)
    with torch.inference_mode():
        theirs = perplexity(reference_model()(input_ids=torch.tensor([ids])).logits[0], ids)
    assert ours == pytest.approx(theirs, rel=1e-3)


def perplexity(logits, ids):
    loss = torch.nn.functional.cross_entropy(logits[:-1].clone(), torch.tensor(ids[1:]))
    return math.exp(float(loss))


NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def reference_model():
    """SmolLM2 as its config.json has it, with nothing of ours in between."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads, key_heads = 9, 3
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1_536, num_hidden_layers=30,
        num_attention_heads=heads, num_key_value_heads=key_heads, rope_theta=100_000.0,
        max_position_embeddings=8_192, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    found = {}
    for tensor in gguf.GGUFReader(WEIGHTS).tensors:
        value = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        parts = tensor.name.split(".")
        if parts[0] != "blk":
            name = {"token_embd": "embed_tokens", "output_norm": "norm"}[parts[0]]
            found[f"model.{name}.weight"] = value
            continue
        if parts[2] in {"attn_q", "attn_k"}:
            count = heads if parts[2] == "attn_q" else key_heads
            value = value.view(count, -1, 2, value.shape[1]).transpose(1, 2).reshape(value.shape)
        found[f"model.layers.{parts[1]}.{NAMES[parts[2]]}.weight"] = value
    found["lm_head.weight"] = found["model.embed_tokens.weight"]
    model.load_state_dict(found)
    return model
