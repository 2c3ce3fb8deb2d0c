"""Tiny random encoders in the layout of sentence-transformers, made by the reference library."""

from __future__ import annotations

import json

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WIDTH, LAYERS, INNER, POSITIONS = 32, 2, 64, 40
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [*MARKS, *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
LINEARS = LAYERS * (4 * WIDTH * WIDTH + 2 * WIDTH * INNER)


def tokenizer():
    found = Tokenizer(models.WordPiece({w: n for n, w in enumerate(WORDS)}, unk_token="[UNK]"))
    found.normalizer = normalizers.BertNormalizer(lowercase=True)
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    found.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    found.add_special_tokens(MARKS)
    found.enable_padding(length=POSITIONS)  # as published ones come: it must not leak
    return found


def write(folder, kind="bert", *, pooling="mean", ranks=False, seed=5, labels=1, **changes):
    """A model in `folder`; gives the reference library's own, ready to compare with."""
    torch.manual_seed(seed)
    name = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}[kind]
    sizes = {
        "vocab_size": len(WORDS), "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "intermediate_size": INNER,
        "max_position_embeddings": POSITIONS, "pad_token_id": 0, "initializer_range": 0.5,
        "num_labels": labels, "type_vocab_size": 2,
    } | changes  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**sizes)
    end = "ForSequenceClassification" if ranks else "Model"
    model = getattr(transformers, name + end)(config).eval()
    model.save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    if not ranks:
        layers = ["models.Transformer", "models.Pooling", "models.Normalize"]
        told = [{"type": f"sentence_transformers.{layer}"} for layer in layers]
        (folder / "modules.json").write_text(json.dumps(told))
        (folder / "1_Pooling").mkdir()
        modes = {"pooling_mode_mean_tokens": pooling == "mean"}
        modes |= {"pooling_mode_cls_token": pooling == "cls"}
        modes |= {"pooling_mode_max_tokens": pooling == "max"}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    return model
