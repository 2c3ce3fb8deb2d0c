"""A Llama of a few thousand weights as a GGUF file, written by the reference writer."""

import gguf
import numpy as np

WIDTH, HEADS, KEY_HEADS, INNER, LAYERS, WORDS = 64, 2, 1, 96, 2, 300
F32, F16 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16
Q8_0, Q4_1 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1

SHAPES = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH // HEADS * KEY_HEADS, WIDTH),
    "attn_v": (WIDTH // HEADS * KEY_HEADS, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (INNER, WIDTH),
    "ffn_up": (INNER, WIDTH),
    "ffn_down": (WIDTH, INNER),
}


def write(path, kind=F32, architecture="llama", **fields):
    """Writes the file; `fields` override metadata. Gives the float weights by name."""
    draw = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, architecture)
    sizes = {
        "block_count": LAYERS,
        "embedding_length": WIDTH,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KEY_HEADS,
        "context_length": 512,
    } | fields
    for name, value in sizes.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.rope.freq_base", 10_000.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_array("tokenizer.ggml.tokens", [f"w{n}" for n in range(WORDS)])
    weights = {"token_embd.weight": (WORDS, WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        weights |= {f"blk.{layer}.{name}.weight": shape for name, shape in SHAPES.items()}
        weights |= {f"blk.{layer}.{name}.weight": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
    made = {}
    for name, shape in weights.items():
        made[name] = (draw.standard_normal(shape) / 8 + (len(shape) == 1)).astype(np.float32)
        this = F32 if len(shape) == 1 else kind
        writer.add_tensor(name, gguf.quantize(made[name], this), raw_dtype=this)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made
