"""A module -> what the mesh may know of it: name, schemas, default terms."""

from __future__ import annotations

import msgspec

from aivillage.models import registry
from aivillage.protocols.messages import OperationInfo
from aivillage.protocols.ports import Module
from aivillage.protocols.pricing import Terms


def described(module: Module, operation: str) -> OperationInfo:
    """MCP's tool shape plus the prices; the same in the daemon and in a worker."""
    return OperationInfo(
        name=operation,
        title=module.title,
        positional=module.positional,
        stability=registry.entry(operation).stability,
        request_schema=msgspec.json.schema(module.Request),
        result_schema=msgspec.json.schema(module.Result),
        terms=Terms(prices_micro_credits=module.prices_micro_credits()),
    )
