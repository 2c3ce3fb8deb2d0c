"""A safetensors model, by the code of the transformers library. Never by code of the model's own.

Nothing is ever unpickled, and a `config.json` that names code of its own is refused.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aivillage.models.inference.template_tokenizer import read_json
from aivillage.protocols.errors import ConfigError, RequestError

if TYPE_CHECKING:
    import torch

    from aivillage.models.inference.placement import Placement

FOREIGN_CODE: Final = (
    "auto_map", "custom_pipelines", "attn_implementation", "_attn_implementation",
)  # fmt: skip
"""Fields by which a model asks that code be fetched and run."""
_ACTIVE_EXPERTS: Final = ("num_experts_per_tok", "moe_topk", "num_selected_experts")
_EXPERTS: Final = ("num_local_experts", "num_experts", "n_routed_experts")


def read_config(folder: Path) -> Any:
    """The `PretrainedConfig` of the model in `folder`.

    Raises:
        RequestError: it wants foreign code, or no causal language model of transformers has it.
        ConfigError: transformers is not installed.
    """
    raw = plain_config(folder)
    kind = raw.get("model_type")
    auto = _auto()
    if not isinstance(kind, str) or kind not in auto.CONFIG_MAPPING:
        raise RequestError(f"transformers has no architecture called {kind!r}")
    try:
        config = auto.CONFIG_MAPPING[kind].from_dict(raw)
    except Exception as error:  # whatever a stranger's values make it raise
        raise RequestError(f"config.json makes no sense: {str(error)[:300]}") from None
    if type(config) not in auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise RequestError(f"{kind!r} is no language model that answers")
    return config


def plain_config(folder: Path) -> dict[str, Any]:
    """What config.json says, of a model without code of its own and with plain weights.

    Raises:
        RequestError: it is another one, or cannot be read.
    """
    raw = read_json(folder / "config.json")
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).exists() and any(
            key in read_json(folder / name) for key in FOREIGN_CODE
        ):
            raise RequestError(
                f"{name} names code of the model's own, and no model's code runs here",
                next_step="pull a model whose architecture transformers has itself",
            )
    if "quantization_config" in raw:
        raise RequestError(
            "its weights are packed, which is not read here", next_step="pull the unpacked model"
        )
    return raw


def end_token_ids(folder: Path, config: Any) -> tuple[int, ...]:
    """Those that end an answer, the first one first.

    Raises:
        RequestError: there is none.
    """
    path = folder / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.exists() else None
    found = config.eos_token_id if found is None else found
    ids = tuple(found) if isinstance(found, list) else (found,)
    if not ids or any(type(token) is not int or token < 0 for token in ids):
        raise RequestError("the model says no token that ends an answer")
    return ids


def context_tokens(config: Any) -> int:
    """Raises: RequestError: it does not say."""
    found = getattr(config, "max_position_embeddings", None)
    if type(found) is not int or found < 1:
        raise RequestError("config.json says no max_position_embeddings")
    return found


def without_weights(config: Any) -> torch.nn.Module:
    """The model's shapes, and no memory for them.

    Raises:
        RequestError: its sizes do not fit together.
    """
    import torch

    try:
        with torch.device("meta"):
            model: torch.nn.Module = _auto().AutoModelForCausalLM.from_config(
                config, trust_remote_code=False
            )
    except Exception as error:  # whatever a stranger's values make it raise
        raise RequestError(f"the sizes of the model do not fit together: {error}") from None
    return model


def active_parameters(model: torch.nn.Module, config: Any) -> int:
    """Weights that one token multiplies: all matrices, of experts those that are asked.

    The head counts also where it shares its weights with the table of words.
    """
    import torch

    share = 1.0
    experts, asked = _first(config, _EXPERTS), _first(config, _ACTIVE_EXPERTS)
    if experts and asked:
        share = asked / experts
    total = 0
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Embedding):
            count = sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)
            total += math.ceil(count * share) if ".experts" in name else count
    return total


def key_value_bytes(config: Any) -> int:
    """Of one token in one session, in float32."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * 4 * config.num_hidden_layers * heads * width)


def load(folder: Path, at: Placement) -> torch.nn.Module:
    """The model in `folder`, where `at` says and of that type, ready to answer.

    Raises:
        RequestError: weights are missing, too many, or of other shapes.
    """
    config = read_config(folder)
    try:
        model, told = _auto().AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=at.dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a stranger's file makes it raise
        raise RequestError(f"the weights do not fit the model: {str(error)[:300]}") from None
    wrong = [name for key in ("missing_keys", "mismatched_keys") for name in told.get(key, ())]
    if wrong:
        raise RequestError(
            f"the files have no fitting weights for {str(min(map(str, wrong)))[:200]}"
        )
    found: torch.nn.Module = model.eval().to(at.device)
    return found


def _first(config: Any, names: tuple[str, ...]) -> int:
    return next((value for n in names if isinstance(value := getattr(config, n, None), int)), 0)


def _auto() -> Any:
    """The library's tables, told first that there is no network."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "safetensors models need the transformers package",
            next_step="pip install 'aivillage[models]'",
        ) from None
    return transformers
