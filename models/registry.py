"""What this node can do: a literal table, then what other packages plug in.

A row is imported on first use. Third-party modules (entry points of group `aivillage.modules`,
named like their operation) are listed from metadata alone: their code runs in workers only.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from typing import Final, Literal, cast

import msgspec

from aivillage.models.library.manifest import Format
from aivillage.protocols.errors import RequestError
from aivillage.protocols.model_ports import ComparedModule, ModelModule, PaidByPartsModule
from aivillage.protocols.ports import Module

ENTRY_POINT_GROUP: Final = "aivillage.modules"
THIRD_PARTY_MAX: Final = 64
"""Each costs a worker's time at start; more than this is an accident."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """Where one operation lives. `target` is "module:Object"; `source` the paper or the reason."""

    operation: str
    target: str
    stability: Literal["stable", "experimental"] = "stable"
    source: str = ""
    third_party: bool = False
    has_engine: bool = False
    """A resident engine serves its sessions; `run` is for library use and local jobs."""
    by_node: bool = False
    """The node itself does it, since a worker has neither its files nor its links."""
    checks_anywhere: bool = False
    """`check` is as pure and cheap as `meter`: it reads nothing but its two arguments, once."""
    takes_inputs: bool = False
    """A call of it is a session that is fed while it lasts, and paid as it goes; no job alone."""
    formats: tuple[Format, ...] = ()
    """Of the models that do it, each at its own price; its module is a `ModelModule`."""


BUILT_IN: Final = {
    entry.operation: entry
    for entry in (
        Entry(
            operation="inference.generate",
            target="aivillage.models.inference.generate:MODULE",
            source="Llama, arXiv 2302.13971; SmolLM2, arXiv 2502.02737",
            has_engine=True,
            formats=("gguf", "safetensors", "remote"),
        ),
        Entry(
            operation="inference.embed",
            target="aivillage.models.inference.embed:MODULE",
            source="Sentence-BERT, arXiv 1908.10084; MiniLM, arXiv 2002.10957",
            formats=("encoder",),
        ),
        Entry(
            operation="inference.rerank",
            target="aivillage.models.inference.rerank:MODULE",
            source="Passage re-ranking with BERT, arXiv 1901.04085",
            formats=("encoder", "ranker"),
        ),
        Entry(
            operation="inference.stage",
            target="aivillage.models.inference.stages:MODULE",
            stability="experimental",
            source="Petals, arXiv 2209.01188",
            takes_inputs=True,
        ),
        Entry(
            operation="mesh.noop",
            target="aivillage.models.mesh.noop:MODULE",
            source="measures what the mesh itself costs",
            checks_anywhere=True,
        ),
        Entry(
            operation="mesh.fetch",
            target="aivillage.models.mesh.fetch:MODULE",
            source="docs/decisions/0008-blobs.md",
            by_node=True,
        ),
    )
}


def entries() -> dict[str, Entry]:
    """Every operation that is installed, ours first; nothing is imported."""
    return {**third_party(), **BUILT_IN}


def third_party() -> dict[str, Entry]:
    """What other packages declare. Nobody replaces one of ours."""
    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    found = {
        point.name: Entry(
            operation=point.name,
            target=point.value,
            stability="experimental",
            source=point.dist.name if point.dist else "",
            third_party=True,
        )
        for point in sorted(points, key=lambda point: point.name)
        if point.name not in BUILT_IN
    }
    return dict(list(found.items())[:THIRD_PARTY_MAX])


def entry(operation: str) -> Entry:
    """Raises: RequestError: UNKNOWN_OPERATION."""
    known = BUILT_IN.get(operation) or third_party().get(operation)
    if known is None:
        raise RequestError(
            f"no operation is called {operation!r}",
            code="UNKNOWN_OPERATION",
            next_step="`aivillage-node operations` lists what there is",
        )
    return known


@functools.cache
def load(target: str) -> Module:
    """Imports the module object at "package.module:Object". In a worker, unless it is ours."""
    path, _, attribute = target.partition(":")
    found = functools.reduce(getattr, attribute.split("."), importlib.import_module(path))
    return cast("Module", found() if isinstance(found, type) else found)


def built_in(operation: str) -> Module | None:
    """Our own module of that name, which any process may hold; None for third-party ones."""
    known = BUILT_IN.get(operation)
    return load(known.target) if known else None


def checks_anywhere(operation: str) -> bool:
    """Whether any process may run its `check`. Never for third-party modules."""
    known = BUILT_IN.get(operation)
    return known is not None and known.checks_anywhere


def takes_inputs(operation: str) -> bool:
    """Whether a call of `operation` is a session that is fed while it lasts."""
    known = BUILT_IN.get(operation)
    return known is not None and known.takes_inputs


def formats(operation: str) -> tuple[Format, ...]:
    """Of the models that do `operation`; none: it needs no model."""
    known = BUILT_IN.get(operation)
    return known.formats if known else ()


def of_models(operation: str) -> ModelModule:
    """Our module of an operation that models do."""
    return cast("ModelModule", load(BUILT_IN[operation].target))


def operation_of(kind: Format) -> str:
    """What a model of that format is for, first of all."""
    return next(entry.operation for entry in BUILT_IN.values() if kind in entry.formats)


def paid_by_parts(operation: str) -> PaidByPartsModule | None:
    """Our module of that name, if each of its parts is paid as it comes."""
    known = BUILT_IN.get(operation)
    return _paid_by_parts(known.target) if known else None


def compared(operation: str) -> ComparedModule | None:
    """Our module of that name, if two of its results can be held against each other."""
    known = BUILT_IN.get(operation)
    return _compared(known.target) if known else None


# Asked several times a job: whether an object has all of a protocol's methods takes 10 us to see.
@functools.cache
def _paid_by_parts(target: str) -> PaidByPartsModule | None:
    module = load(target)
    return module if isinstance(module, PaidByPartsModule) else None


@functools.cache
def _compared(target: str) -> ComparedModule | None:
    module = load(target)
    return module if isinstance(module, ComparedModule) else None


def is_served_by_engine(operation: str) -> bool:
    """Whether a resident engine serves `operation` step by step."""
    known = BUILT_IN.get(operation)
    return known is not None and known.has_engine


def is_done_by_node(operation: str) -> bool:
    """Whether no worker runs it."""
    known = BUILT_IN.get(operation)
    return known is not None and known.by_node
