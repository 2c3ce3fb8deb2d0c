"""blobs: the files of this machine, named by what is in them. Needs no daemon."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from aivillage.cli import show
from aivillage.cli.node import places
from aivillage.node import config as settings_file
from aivillage.node.blobs import Blobs, open_blobs
from aivillage.protocols.errors import RequestError
from aivillage.protocols.types import Cid


def blobs(args: argparse.Namespace) -> int:
    where = places(args)
    settings, _ = settings_file.load(where.data_dir, {})
    store = open_blobs(where.blobs, settings)
    actions = {"add": _add, "get": _get, "list": _list, "remove": _remove}
    return actions[args.action](args, store)


def _add(args: argparse.Namespace, store: Blobs) -> int:
    cid = store.put(sys.stdin.buffer if args.file == "-" else Path(args.file))
    if args.json:
        show.as_json({"cid": cid, "size_bytes": store.get(cid).stat().st_size})
    else:
        print(cid.hex())
    return 0


def _get(args: argparse.Namespace, store: Blobs) -> int:
    """To standard output, or to a file; only what still is what its name says."""
    path = store.get(store.find(args.cid), verify=True)
    if args.json and not args.output:
        show.as_json({"cid": path.name, "path": str(path)})
        return 0
    with path.open("rb") as file:
        if not args.output:
            shutil.copyfileobj(file, sys.stdout.buffer)
            return 0
        try:
            with Path(args.output).open("wb") as out:
                shutil.copyfileobj(file, out)
        except OSError as error:
            raise RequestError(
                f"{args.output} cannot be written: {error.strerror}",
                next_step="name another file with --output",
            ) from None
    if args.json:
        show.as_json({"cid": path.name, "path": args.output})
    return 0


def _list(args: argparse.Namespace, store: Blobs) -> int:
    found = store.all()
    if args.json:
        show.as_json(
            [{"cid": b.cid, "size_bytes": b.size_bytes, "added_unix": b.added_unix} for b in found]
        )
        return 0
    show.table(
        [(b.cid.hex(), f"{b.size_bytes:,}", show.ago(b.added_unix)) for b in found],
        ("cid", "bytes", "added"),
    )
    return 0


def _remove(args: argparse.Namespace, store: Blobs) -> int:
    cid: Cid = store.find(args.cid)
    store.remove(cid)
    if args.json:
        show.as_json({"removed": cid})
    else:
        print(f"removed {cid.hex()}")
    return 0
