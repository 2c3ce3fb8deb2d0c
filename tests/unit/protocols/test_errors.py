"""Error code <-> exception, both ways; exit codes."""

from __future__ import annotations

import pytest

from aivillage.protocols import errors
from aivillage.protocols.errors import (
    CODES,
    TREE,
    AivillageError,
    NodeError,
    PeerError,
    RequestError,
    exit_code,
    from_code,
)


@pytest.mark.parametrize("code", CODES)
def test_a_code_becomes_its_exception_and_comes_back(code):
    error = from_code(code, "what happened", "what to do")
    assert type(error) is CODES[code]
    assert (error.code, error.message, error.next_step) == (code, "what happened", "what to do")
    assert str(error) == f"{code}: what happened Next: what to do"


def test_no_code_belongs_to_two_exceptions():
    assert len(CODES) == sum(len(kind.codes) for kind in TREE)


def test_every_exception_is_in_the_tree_and_in_its_drawing():
    assert set(AivillageError.__subclasses__()) == set(TREE)
    assert all(f"-- {kind.__name__} " in errors.__doc__ for kind in TREE)


def test_an_unknown_code_is_a_failure_of_the_other_side():
    error = from_code("FROM_1_1", "something new")
    assert type(error) is NodeError
    assert error.code == "INTERNAL"
    assert "something new" in str(error)


@pytest.mark.parametrize("kind", TREE)
def test_an_exception_without_a_code_takes_its_first(kind):
    assert kind("text").code == kind.codes[0]
    assert str(kind("text")) == f"{kind.codes[0]}: text"


def test_the_base_alone_is_an_internal_error():
    assert AivillageError("text").code == "INTERNAL"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("CONFIG", errors.EXIT_CONFIG),
        ("BAD_REQUEST", errors.EXIT_USAGE),
        ("TOO_LARGE", errors.EXIT_REFUSED),
        ("PRICE_ABOVE_CEILING", errors.EXIT_REFUSED),
        ("NO_PEER", errors.EXIT_REFUSED),
        ("INSUFFICIENT_CREDITS", errors.EXIT_REFUSED),
        ("PEER_LOST", errors.EXIT_JOB_FAILED),
        ("CANCELLED", errors.EXIT_JOB_FAILED),
        ("DISK_FULL", errors.EXIT_INTERNAL),
        ("INTERNAL", errors.EXIT_INTERNAL),
    ],
)
def test_a_code_has_its_exit_code(code, status):
    assert exit_code(from_code(code, "text")) == status


def test_a_peers_malformed_bytes_are_not_the_users_usage_error():
    assert exit_code(PeerError("not a message", code="BAD_REQUEST")) == errors.EXIT_JOB_FAILED
    assert exit_code(RequestError("no such field")) == errors.EXIT_USAGE


def test_exit_codes_are_told_apart():
    values = [value for name, value in vars(errors).items() if name.startswith("EXIT_")]
    assert sorted(values) == list(range(8))
