"""statement, verify-statement: what the book proves to others, and what theirs prove to us."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import msgspec

from aivillage.cli import show
from aivillage.cli.node import places
from aivillage.cli.output import writing
from aivillage.ledger import issuing, reader
from aivillage.ledger.documents import (
    DOCUMENT_BYTES_MAX,
    StatementError,
    decode_document,
    encode_document,
)
from aivillage.ledger.issuing import Issued
from aivillage.ledger.statement import Proof, verify_document
from aivillage.protocols.envelope import is_signed_by
from aivillage.protocols.errors import RequestError


def statement(args: argparse.Namespace) -> int:
    """From the file itself, whether or not a daemon runs; checked before anybody sees it."""
    try:
        document, proof = _issued(args)
    except StatementError as error:
        raise StatementError(
            f"this book cannot prove it: {error.message}",
            code=error.code,
            next_step="aivillage-node audit",
        ) from None
    if args.json and not args.output:
        show.as_json(msgspec.to_builtins(document))
        return 0
    encoded = encode_document(document)
    with writing(args.output) as file:
        file.write(encoded.decode())
    if args.json:
        show.as_json({"path": args.output} | msgspec.to_builtins(proof))
        return 0
    if args.output:
        print(f"{args.output}: whoever has it can check it with: {_VERIFY} {args.output}")
    show.note(f"It says: {proof.proven}.")
    return 0


_VERIFY = "aivillage-node verify-statement"


def _issued(args: argparse.Namespace) -> Issued:
    where, now_ms = places(args), time.time_ns() // 1_000_000
    if args.job is None:
        return reader.read(where.ledger, issuing.statement(args.peer, now_ms, is_signed_by))
    from aivillage.node.attempts import attempts_of

    job = args.job.lower()
    attempts = attempts_of(where.jobs, job)
    query = issuing.job_statement(args.peer, job, attempts, now_ms, is_signed_by)
    return reader.read(where.ledger, query)


def verify_statement(args: argparse.Namespace) -> int:
    """Needs no node and no data folder. Exit 7 and the first thing wrong."""
    proof = verify_document(decode_document(_contents(args.file)), is_signed_by)
    if args.json:
        show.as_json({"ok": True} | msgspec.to_builtins(proof))
    else:
        _say(proof)
    return 0


def _say(proof: Proof) -> None:
    print(f"proven: {proof.proven}.")
    print(f"not proven: {proof.not_proven}.")


def _contents(name: str) -> bytes:
    """One byte more than is read at most tells that it is too large."""
    try:
        if name == "-":
            return sys.stdin.buffer.read(DOCUMENT_BYTES_MAX + 1)
        with Path(name).open("rb") as file:
            return file.read(DOCUMENT_BYTES_MAX + 1)
    except OSError as error:
        raise RequestError(
            f"{name} cannot be read: {error.strerror}",
            code="BAD_REQUEST",
            next_step="name a file, or - for standard input",
        ) from None
