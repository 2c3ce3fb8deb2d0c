"""The parser only."""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    del argv
    return 2
