"""Results of modules held against each other: lists of items that honest machines agree about.

Which they are, and how near is near enough, is the module's to say (`ports.ComparedModule`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aivillage.models import registry
from aivillage.node.jobs import JobRow
from aivillage.node.shares import shares_of
from aivillage.node.verifier import Answer, Finding, Rule, compare
from aivillage.protocols.codec import unpack
from aivillage.protocols.errors import RequestError
from aivillage.protocols.model_ports import ComparedModule
from aivillage.protocols.ports import Module


def is_compared(operation: str) -> bool:
    """Whether two results of it say which one is wrong."""
    return registry.compared(operation) is not None


def rule_of(row: JobRow) -> Rule:
    """How two answers to that request are held against each other; slow for large ones."""
    module = registry.compared(row.operation)
    if module is None:
        return compare
    kinds = _kinds(row.operation)
    request = unpack(kinds.Request, row.request)

    def rule(first: Answer, second: Answer) -> tuple[Finding, int]:
        one, other = (unpack(kinds.Result, answer.result) for answer in (first, second))
        place = module.parting(request, one, other)
        return ("same", 0) if place is None else ("different", place)

    return rule


def answer_of(operation: str, rows: Iterable[tuple[Any, ...]], result: bytes) -> Answer:
    """Who made which items of a result.

    `rows`: (attempt, seller, kernel, identical, quote, part), in the order of the parts; the last
    one is of the attempt whose last word the result was. What stands in the result as a part had
    it is its maker's, up to the first part of which that is not so; the rest is the last one's.
    """
    module = registry.compared(operation)
    assert module is not None, "asked for only where it is"
    typed = unpack(_kinds(operation).Result, result)
    is_intact = True

    def items_of(part: bytes, first: int) -> int:
        nonlocal is_intact
        count = _items(module, typed, part, first) if is_intact else 0
        is_intact = count > 0
        return count

    shares = shares_of(rows, items_of)
    made = [share for share in shares[:-1] if share.count]
    return Answer(token_ids=(), shares=(*made, *shares[-1:]), result=result, by_result=True)


def _items(module: ComparedModule, result: Any, part: bytes, first: int) -> int:
    try:
        return module.items_of(result, part, first)
    except RequestError:  # what its seller sent was no part of such a result
        return 0


def _kinds(operation: str) -> Module:
    module = registry.built_in(operation)
    assert module is not None, "only ours are compared"
    return module
