"""What a folder of safetensors says of an encoder: its sizes, its tensors, how it pools.

BERT, RoBERTa and XLM-RoBERTa, in the layout of sentence-transformers; a model without its tables
pools by the mean. No torch.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from aivillage.models.inference.safetensors_model import plain_config
from aivillage.models.inference.template_tokenizer import read_json
from aivillage.models.library.safetensors_file import TensorPlace, read_header
from aivillage.protocols.errors import RequestError

KINDS: Final = ("bert", "roberta", "xlm-roberta")
TOKENS_MAX: Final = 8_192
TABLE_BYTES_MAX: Final = 65_536
_COMPUTED: Final = {"Transformer", "Pooling", "Normalize"}
_POOLING_FOLDER: Final = "1_Pooling"
_POOLING: Final = ("pooling.json", f"{_POOLING_FOLDER}/config.json")
"""As a pull names it, and as it lies in a package."""

Pooling = Literal["mean", "cls"]
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """config.json, as far as it decides what is computed; with BERT's own defaults."""

    model_type: Literal["bert", "roberta", "xlm-roberta"]
    hidden_size: Annotated[int, msgspec.Meta(ge=8, le=4_096)]
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=128)]
    num_attention_heads: Annotated[int, msgspec.Meta(ge=1, le=256)]
    intermediate_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
    vocab_size: Size
    max_position_embeddings: Annotated[int, msgspec.Meta(ge=8, le=1 << 16)]
    type_vocab_size: Annotated[int, msgspec.Meta(ge=1, le=256)] = 2
    layer_norm_eps: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1e-12
    hidden_act: Literal["gelu"] = "gelu"
    position_embedding_type: Literal["absolute"] = "absolute"
    pad_token_id: Annotated[int, msgspec.Meta(ge=0, le=64)] | None = None
    is_decoder: Literal[False] = False
    architectures: Annotated[tuple[str, ...], msgspec.Meta(max_length=8)] | None = ()
    id2label: dict[str, str] = msgspec.field(default_factory=lambda: {"0": "", "1": ""})

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("its heads do not share its width")

    @property
    def ranks(self) -> bool:
        """Whether it scores pairs."""
        return any(name.endswith("ForSequenceClassification") for name in self.architectures or ())

    @property
    def first_position(self) -> int:
        """Positions of RoBERTa begin after that of padding."""
        if self.model_type == "bert":
            return 0
        return 2 if self.pad_token_id is None else self.pad_token_id + 1


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """`tensors`: names in the files by our own names. `tokens_max`: it reads no more of a text."""

    config: Config
    tokens_max: int
    pooling: Pooling
    tensors: dict[str, str]
    sizes: dict[str, tuple[int, ...]]

    @property
    def ranks(self) -> bool:
        return self.config.ranks

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.sizes.values()))

    @property
    def active_parameters(self) -> int:
        """Weights that a token multiplies: all matrices that are no table."""
        matrices = [s for n, s in self.sizes.items() if len(s) > 1 and "_embeddings." not in n]
        return sum(map(math.prod, matrices))


def is_encoder(folder: Path) -> bool:
    """Whether the model reads all of a text at once, and generates nothing.

    Raises:
        RequestError: config.json is missing or cannot be read.
    """
    raw = read_json(folder / "config.json")
    return raw.get("model_type") in KINDS and not raw.get("is_decoder")


def read(folder: Path) -> Shape:
    """Reads tables and headers, no weights.

    Raises:
        RequestError: it has layers, a pooling or a head that is not computed here, or lacks some.
    """
    raw = {name: value for name, value in plain_config(folder).items() if value is not None}
    try:
        config = msgspec.convert(raw, Config)
    except (msgspec.ValidationError, ValueError) as error:
        raise RequestError(f"config.json makes no sense, or is not computed: {error}") from None
    if config.ranks and len(config.id2label) != 1:
        raise RequestError(f"a model that ranks has one label, and this {len(config.id2label)}")
    _require_layers(folder)
    places = [place for path in sorted(folder.glob("*.safetensors")) for place in read_header(path)]
    sizes = _sizes(config)
    return Shape(
        config=config,
        tokens_max=_tokens_max(folder, config),
        pooling="mean" if config.ranks else _pooling(folder),
        tensors=_found(places, sizes),
        sizes=sizes,
    )


def _sizes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor that is computed with, by its name without what stands before it."""
    width, inner = config.hidden_size, config.intermediate_size
    found: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config.vocab_size, width),
        "embeddings.position_embeddings.weight": (config.max_position_embeddings, width),
        "embeddings.token_type_embeddings.weight": (config.type_vocab_size, width),
    } | _both("embeddings.LayerNorm", (width,))
    for number in range(config.num_hidden_layers):
        layer = f"encoder.layer.{number}."
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            found |= _both(f"{layer}attention.{name}", (width, width))
        found |= _both(f"{layer}attention.output.LayerNorm", (width,))
        found |= _both(f"{layer}intermediate.dense", (inner, width))
        found |= _both(f"{layer}output.dense", (width, inner))
        found |= _both(f"{layer}output.LayerNorm", (width,))
    if config.ranks and config.model_type == "bert":
        found |= _both("pooler.dense", (width, width)) | _both("classifier", (1, width))
    elif config.ranks:
        found |= _both("classifier.dense", (width, width))
        found |= _both("classifier.out_proj", (1, width))
    return found


def _both(name: str, size: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": size, f"{name}.bias": size[:1]}


def _found(places: list[TensorPlace], sizes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """Raises: RequestError: one is missing, or of another shape."""
    there = {place.name: place for place in places}
    found = {}
    for name, size in sizes.items():
        named = next((n for n in (name, f"bert.{name}", f"roberta.{name}") if n in there), None)
        if named is None:
            raise RequestError(f"the files have no weights {name}")
        if there[named].shape != size:
            raise RequestError(f"{named} is of shape {there[named].shape}, the model says {size}")
        found[name] = named
    return found


def _require_layers(folder: Path) -> None:
    """Nothing but what is computed here may come after the encoder."""
    path = folder / "modules.json"
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            layers = msgspec.json.decode(file.read(TABLE_BYTES_MAX), type=list[dict[str, Any]])
    except (OSError, msgspec.DecodeError) as error:
        raise RequestError(f"modules.json cannot be read: {error}") from None
    for layer in layers:
        name = str(layer.get("type", "")).rpartition(".")[2]
        if name not in _COMPUTED:
            raise RequestError(f"the model has a layer {name[:80]!r}, which is not computed here")
        if name == "Pooling" and not _is_pooling_there(folder, layer):
            raise RequestError(
                "modules.json says that the model pools, but 1_Pooling/config.json is not there",
                next_step="pull the whole folder; a pooling of another name is not read here",
            )


def _is_pooling_there(folder: Path, layer: dict[str, Any]) -> bool:
    """Whether the table is here that says how; without it another one than its own was guessed."""
    path = layer.get("path", _POOLING_FOLDER)
    return path == _POOLING_FOLDER and _pooling_table(folder) is not None


def _pooling_table(folder: Path) -> Path | None:
    return next((folder / name for name in _POOLING if (folder / name).exists()), None)


def _tokens_max(folder: Path, config: Config) -> int:
    found = config.max_position_embeddings - config.first_position
    path = folder / "sentence_bert_config.json"
    told = read_json(path).get("max_seq_length") if path.exists() else None
    return min(max(4, min(found, told)) if type(told) is int else found, TOKENS_MAX)


def _pooling(folder: Path) -> Pooling:
    path = _pooling_table(folder)
    if path is None:
        return "mean"
    raw = read_json(path)
    told = {name for name, on in raw.items() if name.startswith("pooling_mode_") and on}
    if isinstance(raw.get("pooling_mode"), str):
        told = {f"pooling_mode_{raw['pooling_mode']}"}
    if told <= {"pooling_mode_mean_tokens", "pooling_mode_mean"} and told:
        return "mean"
    if told <= {"pooling_mode_cls_token", "pooling_mode_cls"} and told:
        return "cls"
    raise RequestError(f"the model pools by {', '.join(sorted(told)) or 'nothing'}: not done here")
