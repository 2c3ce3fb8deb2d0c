"""Whole tiny models that can answer: a GGUF Llama, and safetensors of several architectures."""

from __future__ import annotations

import json

import gguf
import numpy as np

from aivillage.models.inference.tokenizer import CHAT_TEMPLATE, byte_of_letter

LETTERS = [letter for letter, _ in sorted(byte_of_letter().items(), key=lambda item: item[1])]
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = [*MARKS, *LETTERS, "he"]
"""Ids 0 to 2 are marks; byte b is id 3 + b; the last one joins two."""
WIDTH, HEADS, KEY_HEADS, INNER, LAYERS, CONTEXT = 64, 4, 2, 96, 2, 512
LINEARS = LAYERS * (2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2 + 3 * WIDTH * INNER)
ACTIVE = LINEARS + len(WORDS) * WIDTH
"""Weights that a token multiplies: the head shares those of the table of words."""
PARAMETERS = ACTIVE + (2 * LAYERS + 1) * WIDTH


def write_gguf(path, seed=3, template=CHAT_TEMPLATE, scale=0.2, inner=INNER, words=WORDS):
    """A random Llama with the tokenizer of bytes, by the reference writer."""
    draw = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "block_count": LAYERS,
        "embedding_length": WIDTH,
        "feed_forward_length": inner,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KEY_HEADS,
        "context_length": CONTEXT,
    }.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_string("general.license", "cc0-1.0")
    writer.add_float32("llama.rope.freq_base", 10_000.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "smollm")
    writer.add_array("tokenizer.ggml.tokens", words)
    writer.add_array("tokenizer.ggml.token_type", [3] * len(MARKS) + [1] * (len(LETTERS) + 1))
    writer.add_array("tokenizer.ggml.merges", ["h e"])
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    writer.add_string("tokenizer.chat_template", template)
    half = WIDTH * KEY_HEADS // HEADS
    shapes = {
        "attn_q": (WIDTH, WIDTH), "attn_k": (half, WIDTH), "attn_v": (half, WIDTH),
        "attn_output": (WIDTH, WIDTH), "ffn_gate": (inner, WIDTH), "ffn_up": (inner, WIDTH),
        "ffn_down": (WIDTH, inner), "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,),
    }  # fmt: skip
    weights = {"token_embd.weight": (len(WORDS), WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        weights |= {f"blk.{layer}.{name}.weight": shape for name, shape in shapes.items()}
    for name, shape in weights.items():
        value = draw.standard_normal(shape) * scale + (len(shape) == 1)
        writer.add_tensor(name, value.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "max_position_embeddings": CONTEXT,
    "eos_token_id": 2,
    "bos_token_id": 0,
    "pad_token_id": 0,
}


def write_safetensors(folder, kind="llama", seed=3, **changes):
    """A random model of architecture `kind`, written by transformers itself."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = CONFIG_MAPPING[kind](**(SIZES | {"tie_word_embeddings": True} | changes))
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model.eval()


def write_tokenizer(folder, template=TEMPLATE):
    """Bytes as words, three marks, and the template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = Tokenizer(models.BPE(vocab={w: n for n, w in enumerate(WORDS)}, merges=[("h", "e")]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    words.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
