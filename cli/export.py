"""export: the book in a form that other programs read."""

from __future__ import annotations

import argparse
import io

from aivillage.cli import show
from aivillage.cli.node import places
from aivillage.cli.output import writing
from aivillage.ledger import reader
from aivillage.ledger.journal import beancount


def export(args: argparse.Namespace) -> int:
    """Read from the file itself, whether or not a daemon runs."""
    ledger = places(args).ledger
    if args.json and not args.output:
        text = io.StringIO()
        entries = reader.read(ledger, beancount(text.write))
        show.as_json({"entries": entries, "journal": text.getvalue()})
        return 0
    with writing(args.output) as file:
        entries = reader.read(ledger, beancount(file.write))
    if args.json:
        show.as_json({"path": args.output, "entries": entries})
    elif args.output:
        print(f"{args.output}: {entries} entries; check them with: bean-check {args.output}")
    return 0
