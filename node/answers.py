"""Answers as jobs.db has them: who made which part of one."""

from __future__ import annotations

from typing import Any

import apsw

from aivillage.models import registry
from aivillage.models.inference.generate import GenerateRequest, GenerateResult, Piece
from aivillage.models.inference.logprobs import packed_all
from aivillage.node import compared
from aivillage.node.jobs import JobRow, Jobs
from aivillage.node.shares import shares_of
from aivillage.node.verifier import Answer
from aivillage.protocols.codec import unpack


async def kept_answer(jobs: Jobs, row: JobRow, result: bytes) -> Answer:
    """An answer of a job on the mesh, and who made which part of it."""
    sql = (
        "SELECT attempt.id, seller, kernel, identical, quote, body FROM delivered"
        " JOIN attempt ON attempt.id = delivered.attempt WHERE delivered.job = ? ORDER BY seq"
    )
    is_compared = compared.is_compared(row.operation)

    def work(db: apsw.Connection) -> list[Any]:
        found = db.execute(sql, (row.id,)).fetchall()
        last = "SELECT id, seller, '', '', quote, x'' FROM attempt WHERE job=? AND outcome IN"
        if is_compared:  # before its owner gets it, the attempt has not ended
            return found + db.execute(f"{last} ('', 'done')", (row.id,)).fetchall()
        return found or db.execute(f"{last} ('done')", (row.id,)).fetchall()

    rows = await jobs.transaction(work)
    if is_compared:
        return compared.answer_of(row.operation, rows, result)
    is_engine = registry.is_served_by_engine(row.operation)
    marks: list[bytes] = []

    def tokens_of(part: bytes, first: int) -> int:
        if not (is_engine and part):
            return 0
        piece = unpack(Piece, part)
        if piece.fingerprint:
            marks.append(piece.fingerprint)
        return len(piece.token_ids)

    shares = shares_of(rows, tokens_of)
    ids, said = tokens_said(result) if is_engine else ((), b"")
    made = tuple(share for share in shares if share.count or not is_engine)
    in_format = is_engine and unpack(GenerateRequest, row.request).format is not None
    return Answer(
        token_ids=ids,
        shares=made,
        result=result,
        fingerprints=tuple(marks),
        logprobs=said,
        in_format=in_format,
    )


def tokens_said(result: bytes) -> tuple[tuple[int, ...], bytes]:
    """The tokens of a generated answer, and their log-probabilities as they travel."""
    found = unpack(GenerateResult, result)
    return found.token_ids, packed_all(found.logprobs)
