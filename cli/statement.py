"""statement, evidence, verify-statement: what books prove to others, ours and theirs."""

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
    Evidence,
    Proof,
    StatementError,
    decode_document,
    encode_document,
)
from aivillage.ledger.issuing import Issued
from aivillage.ledger.statement import verify_document
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


def evidence(args: argparse.Namespace) -> int:
    """Each proof with both bodies and signatures; the document about one payer can be checked."""
    if args.output and not args.peer:
        raise RequestError(
            "a document is about one payer", code="BAD_REQUEST", next_step="name it with --peer"
        )
    now_ms = time.time_ns() // 1_000_000
    query = issuing.evidence(args.peer, now_ms, is_signed_by)
    found = reader.read(places(args).ledger, query)
    if args.peer and args.output:
        _write_evidence(args, found)
    elif args.json:
        documents = [msgspec.to_builtins(document) for document, _ in found]
        show.as_json(documents[0] if args.peer and documents else documents)
    else:
        _show_evidence(found)
    return 0


def _write_evidence(args: argparse.Namespace, found: list[Issued]) -> None:
    if not found:
        raise RequestError(
            f"this book holds nothing against {args.peer!r}",
            code="BAD_REQUEST",
            next_step="`aivillage-node evidence` lists what it holds",
        )
    ((document, proof),) = found
    with writing(args.output) as file:
        file.write(encode_document(document).decode())
    if args.json:
        show.as_json({"path": args.output} | msgspec.to_builtins(proof))
    else:
        print(f"{args.output}: whoever has it can check it with: {_VERIFY} {args.output}")


def _show_evidence(found: list[Issued]) -> None:
    for document, proof in found:
        assert isinstance(document, Evidence)
        print(f"{proof.proven}.")
        for number, signed in enumerate(document.proofs, 1):
            print(f"  {number}  {signed.first_body}  signed {signed.first_signature}")
            print(f"     {signed.second_body}  signed {signed.second_signature}")
    if not found:
        show.note("Nobody contradicted itself in writing, as far as this book knows.")


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
