"""What a folder of safetensors says of an encoder: its kind, how much it reads, how it pools.

The layout is that of sentence-transformers; a model without its tables pools by the mean. No torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from aivillage.models.inference.template_tokenizer import read_json
from aivillage.protocols.errors import RequestError

KINDS: Final = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
"""model_type -> how transformers' classes for it begin."""
_OFFSET: Final = {"bert": 0, "roberta": 1, "xlm-roberta": 1}
"""Positions of RoBERTa begin after that of padding."""
WIDTH_MAX: Final = 4_096
TOKENS_MAX: Final = 8_192
_LAYERS: Final = {"Transformer", "Pooling", "Normalize"}
_POOLING: Final = ("pooling.json", "1_Pooling/config.json")
"""As a pull names it, and as it lies in a package."""

Pooling = Literal["mean", "cls"]


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """`classes`: how the names of transformers' classes begin. `ranks`: it scores pairs."""

    classes: str
    ranks: bool
    width: int
    tokens_max: int
    pooling: Pooling


def is_encoder(folder: Path) -> bool:
    """Whether the model reads all of a text at once, and generates nothing.

    Raises:
        RequestError: config.json is missing or cannot be read.
    """
    raw = read_json(folder / "config.json")
    return raw.get("model_type") in KINDS and not raw.get("is_decoder")


def read(folder: Path, config: Any) -> Shape:
    """`config` is transformers' own, of the encoder in `folder`.

    Raises:
        RequestError: it has layers, a pooling or a head that is not computed here.
    """
    kind = str(config.model_type)
    named = [name for name in config.architectures or () if isinstance(name, str)]
    ranks = any(name.endswith("ForSequenceClassification") for name in named)
    if ranks and config.num_labels != 1:
        raise RequestError(f"a model that ranks has one label, and this one {config.num_labels}")
    _require_layers(folder)
    width, tokens = config.hidden_size, _tokens_max(folder, config, _OFFSET[kind])
    if type(width) is not int or not 1 <= width <= WIDTH_MAX:
        raise RequestError(f"a vector has 1 to {WIDTH_MAX} numbers, and of this model {width}")
    return Shape(
        classes=KINDS[kind],
        ranks=ranks,
        width=width,
        tokens_max=min(tokens, TOKENS_MAX),
        pooling="mean" if ranks else _pooling(folder),
    )


def _require_layers(folder: Path) -> None:
    """Nothing but what is computed here may come after the encoder."""
    path = folder / "modules.json"
    if not path.exists():
        return
    try:
        layers = msgspec.json.decode(path.read_bytes()[:65_536], type=list[dict[str, Any]])
    except (OSError, msgspec.DecodeError) as error:
        raise RequestError(f"modules.json cannot be read: {error}") from None
    for layer in layers:
        name = str(layer.get("type", "")).rpartition(".")[2]
        if name not in _LAYERS:
            raise RequestError(f"the model has a layer {name[:80]!r}, which is not computed here")


def _tokens_max(folder: Path, config: Any, offset: int) -> int:
    found = config.max_position_embeddings
    if type(found) is not int or found < 8:
        raise RequestError("config.json says no fitting max_position_embeddings")
    found -= offset * (config.pad_token_id + 1 if type(config.pad_token_id) is int else 0)
    path = folder / "sentence_bert_config.json"
    told = read_json(path).get("max_seq_length") if path.exists() else None
    return max(4, min(found, told)) if type(told) is int else found


def _pooling(folder: Path) -> Pooling:
    path = next((folder / name for name in _POOLING if (folder / name).exists()), None)
    if path is None:
        return "mean"
    raw = read_json(path)
    told = {name for name, on in raw.items() if name.startswith("pooling_mode_") and on is True}
    if isinstance(raw.get("pooling_mode"), str):
        told = {f"pooling_mode_{raw['pooling_mode']}"}
    if told <= {"pooling_mode_mean_tokens", "pooling_mode_mean"} and told:
        return "mean"
    if told <= {"pooling_mode_cls_token", "pooling_mode_cls"} and told:
        return "cls"
    raise RequestError(f"the model pools by {', '.join(sorted(told)) or 'nothing'}: not done here")
