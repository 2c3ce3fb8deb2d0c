"""What an owner may ask for together: wishes that contradict each other are refused at once."""

from __future__ import annotations

from aivillage.models import registry
from aivillage.protocols.errors import RequestError
from aivillage.protocols.messages import Submit


def require_consistent(submit: Submit) -> None:
    """Raises: RequestError: no job can be all that was asked for, and what to leave out."""
    if submit.local and (submit.peer or submit.mesh):
        raise RequestError(
            "a local job has no peer", next_step="leave out --local, or --peer and --mesh"
        )
    if submit.local and submit.verify:
        raise RequestError("a local job is done here", next_step="leave out --verify")
    if registry.is_done_by_node(submit.operation) and (submit.local or submit.verify):
        raise RequestError(
            f"{submit.operation} is done by nodes, and checked as it comes",
            next_step="leave out --local and --verify",
        )
    has_other = registry.is_served_by_engine(submit.operation) and not submit.peer
    if submit.stand_by and (submit.local or not has_other):
        raise RequestError(
            "only an answer of a model that any peer may give has another peer standing by",
            next_step="leave out --stand-by, or --local and --peer",
        )
    if registry.takes_inputs(submit.operation):
        raise RequestError(
            f"{submit.operation} is a part of other jobs", next_step="submit inference.generate"
        )
