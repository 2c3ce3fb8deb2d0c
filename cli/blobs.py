"""blobs: files named by what is in them. Only to fetch one from others takes a daemon."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from aivillage.cli import show
from aivillage.cli.node import amount, places
from aivillage.models.mesh.fetch import FetchRequest
from aivillage.node import config as settings_file
from aivillage.node.blob_room import HEX
from aivillage.node.blobs import BlobInfo, Blobs, open_blobs
from aivillage.protocols.errors import RequestError
from aivillage.protocols.types import Cid


def blobs(args: argparse.Namespace) -> int:
    where = places(args)
    settings, _ = settings_file.load(where.data_dir, {})
    store = open_blobs(where.blobs, settings)
    actions = {
        "add": _add, "get": _get, "list": _list, "pin": _pin, "unpin": _pin, "remove": _remove,
    }  # fmt: skip
    return actions[args.action](args, store)


def _add(args: argparse.Namespace, store: Blobs) -> int:
    cid = store.put(sys.stdin.buffer if args.file == "-" else Path(args.file))
    if args.json:
        show.as_json(_described(store, cid))
    else:
        print(cid.hex())
    return 0


def _described(store: Blobs, cid: Cid) -> dict[str, Any]:
    manifest = store.manifest(cid)
    return {"cid": cid, "size_bytes": manifest.size_bytes, "root": manifest.root}


def _get(args: argparse.Namespace, store: Blobs) -> int:
    """To standard output, or to a file; only what still is what its name says."""
    cid, receipt = _cid_here(args, store)
    path = store.get(cid, verify=receipt is None)
    found = _described(store, cid) | ({"receipt": receipt} if receipt else {})
    if args.json and not args.output:
        show.as_json(found | {"path": str(path)})
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
        show.as_json(found | {"path": args.output})
    return 0


def _cid_here(args: argparse.Namespace, store: Blobs) -> tuple[Cid, dict[str, Any] | None]:
    """The blob, and what it cost where members had to bring it."""
    if len(args.cid) != 64 or set(args.cid) - HEX or store.has(Cid(bytes.fromhex(args.cid))):
        return store.find(args.cid), None
    from aivillage.cli.fetching import Meter, fetch
    from aivillage.cli.jobs import receipt_line

    root, price = args.root or "", amount(args.max_price) if args.max_price else None
    request = FetchRequest(cid=args.cid, root=root, sources=tuple(args.sources or ()))
    answer = fetch(places(args), request, price, Meter())
    receipt: dict[str, Any] = answer["receipt"]
    show.note(receipt_line(receipt))
    return Cid(bytes.fromhex(args.cid)), receipt


def _list(args: argparse.Namespace, store: Blobs) -> int:
    found = [*store.on_their_way(), *store.all()]
    if args.json:
        fields = ("cid", "size_bytes", "added_unix", "used_unix", "pinned", "missing_bytes")
        show.as_json([{name: getattr(blob, name) for name in fields} for blob in found])
        return 0
    show.table(
        [
            (
                blob.cid.hex(),
                f"{blob.size_bytes:,}",
                show.ago(blob.added_unix),
                show.ago(blob.used_unix),
                _state(blob),
            )
            for blob in found
        ],
        ("cid", "bytes", "added", "used", ""),
    )
    return 0


def _state(blob: BlobInfo) -> str:
    if blob.missing_bytes:
        return f"{blob.missing_bytes:,} bytes have not come"
    return "pinned" if blob.pinned else ""


def _pin(args: argparse.Namespace, store: Blobs) -> int:
    cid, keep = store.find(args.cid), args.action == "pin"
    store.pin(cid, keep=keep)
    if args.json:
        show.as_json({"cid": cid, "pinned": keep})
    else:
        print(f"{args.action}ned {cid.hex()}")
    return 0


def _remove(args: argparse.Namespace, store: Blobs) -> int:
    cid = store.find(args.cid, begun=True)
    store.remove(cid)
    if args.json:
        show.as_json({"removed": cid})
    else:
        print(f"removed {cid.hex()}")
    return 0
