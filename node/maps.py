"""One operation over many requests: maps taken from the owner, gone on with after a restart."""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
import trio

from aivillage.models import registry
from aivillage.node import results
from aivillage.node.buyer import Buyer
from aivillage.node.config import Settings
from aivillage.node.map_run import MapRun
from aivillage.node.map_store import REDUCE_LINE, LineEnd, LineRow, MapRow, MapStore
from aivillage.node.reduction import reduce_request, require_reducer
from aivillage.node.trade import Trade
from aivillage.protocols.codec import FRAME_BYTES_MAX
from aivillage.protocols.errors import AivillageError, RefusedError, RequestError
from aivillage.protocols.types import AMOUNT_MAX, Amount

LINES_MAX: Final = 10_000
"""In one map: what is kept of each in memory is small, and a person can still read the list."""
REQUEST_BYTES_MAX: Final = FRAME_BYTES_MAX - (64 << 10)
"""A call carries it, and some more."""
MAPS_MAX: Final = 4
"""Under way at once; they share the places of the owner's jobs."""
PARALLEL_MAX: Final = 48
"""Of the 64 jobs that a node has under way: some are left for its owner."""
PAGE_LINES: Final = 32
"""Read at once: each result may be of a megabyte."""
PAGE_BYTES: Final = 512 << 10
WAIT_SECONDS_MAX: Final = 20.0
"""A client that waits longer asks again, so that a lost one holds nothing."""
LINES_AT_ONCE: Final = 50
"""Looked at before others have their turn."""


class Maps:
    """Answers by name; `handlers()` is what the control socket serves of it."""

    def __init__(
        self, *, settings: Settings, trade: Trade, buyer: Buyer, nursery: trio.Nursery
    ) -> None:
        self._settings = settings
        self._trade = trade
        self._buyer = buyer
        self._nursery = nursery
        self._store = MapStore(trade.jobs)
        self._running: dict[str, MapRun] = {}

    def handlers(self) -> dict[str, Callable[[dict[str, Any]], Awaitable[Any]]]:
        return {
            "map_new": self.on_new,
            "map_add": self.on_add,
            "map_start": self.on_start,
            "map_wait": self.on_wait,
            "map_lines": self.on_lines,
            "map_stop": self.on_stop,
        }

    async def resume(self) -> None:
        """Goes on with what a stop or crash of this node interrupted."""
        await self._store.open()
        for row in await self._store.unfinished():
            try:
                await self._start(row)
            except AivillageError as error:  # one unreadable map must not keep the node down
                self._trade.events.emit("map_not_resumed", level=40, map=row.id, reason=str(error))
            else:
                self._trade.events.emit("map_resumed", map=row.id)

    # ------------------------------------------------------------------ asked
    async def on_new(self, args: dict[str, Any]) -> dict[str, Any]:
        """A map that gets its lines next."""
        operation, reduce = str(args["operation"]), str(args.get("reduce") or "")
        self._trade.workers.describe(operation)
        if registry.is_done_by_node(operation):
            raise RequestError(
                f"{operation} is no work for a map", next_step=f"submit {operation} for each"
            )
        if reduce:
            require_reducer(self._trade.workers.describe(reduce))
        parallel = int(args.get("parallel") or PARALLEL_MAX)
        if not 0 < parallel <= PARALLEL_MAX:
            raise RequestError(
                f"1 to {PARALLEL_MAX} tasks run at once, not {parallel}",
                next_step=f"--parallel {PARALLEL_MAX}, or leave it out",
            )
        row = MapRow(
            id=secrets.token_hex(16),
            operation=operation,
            reduce=reduce,
            budget=0,
            each=self._settings.ceiling_micro_credits,
            parallel=parallel,
            state="filling",
            created=time.time(),
        )
        await self._store.add(row)
        return {"map": row.id}

    async def on_add(self, args: dict[str, Any]) -> dict[str, Any]:
        """Lines, as [number, JSON text]; one that is no request fails alone."""
        row = await self._map(args)
        if row.state != "filling":
            raise RequestError("this map has its lines", next_step="begin another one")
        lines = msgspec.convert(args["lines"], list[tuple[int, str | None]])
        held = (await self._store.tally(row)).total
        if held + len(lines) > LINES_MAX:
            raise RequestError(
                f"a map has at most {LINES_MAX:,} lines",
                code="TOO_LARGE",
                next_step="split the input, and map one part after the other",
            )
        read = []
        for count, (number, text) in enumerate(lines, 1):
            if number <= REDUCE_LINE:
                raise RequestError(f"no line has the number {number}")
            read.append(await self._read(row.operation, number, text))
            if count % LINES_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        await self._store.add_lines(row, read)
        return {"lines": held + len(lines)}

    async def _read(self, operation: str, number: int, text: str | None) -> LineRow:
        try:
            request = _request_of(text)
            usage, _ = await self._trade.workers.estimate(operation, request)
            await self._trade.workers.validate(operation, request)
        except AivillageError as error:
            return LineRow(line=number, code=error.code, message=error.message)
        return LineRow(line=number, request=request, usage=usage)

    async def on_start(self, args: dict[str, Any]) -> dict[str, Any]:
        """Begins a map, or goes on with one: tasks that failed are tried again, none that is done.

        With a budget it may cost so much in all, what it has cost included.
        """
        row = await self._map(args)
        if row.id in self._running:
            return await self._shown(row)
        if len(self._running) >= MAPS_MAX:
            raise RefusedError(
                f"{MAPS_MAX} maps are under way", code="BUSY", next_step="wait for one, or stop it"
            )
        if (budget := args.get("budget_micro_credits")) is not None:
            allowed = msgspec.convert(budget, Amount)
            await self._store.allow(row, allowed, allowed)
        elif row.state == "filling":
            count = (await self._store.tally(row)).total + bool(row.reduce)
            await self._store.allow(row, min(count * row.each, AMOUNT_MAX), row.each)
        if row.state != "filling":
            await self._store.forgive(row)
        await self._store.set_state(row, "running")
        await self._start(await self._map(args))
        return await self._shown(row)

    async def on_wait(self, args: dict[str, Any]) -> dict[str, Any]:
        """How a map stands, at its end or after `seconds`."""
        row = await self._map(args)
        run = self._running.get(row.id)
        if run is not None:
            with trio.move_on_after(min(float(args.get("seconds", 0)), WAIT_SECONDS_MAX)):
                await run.ended.wait()
        return await self._shown(await self._map(args))

    async def on_lines(self, args: dict[str, Any]) -> dict[str, Any]:
        """The lines after `after`, with result or reason, as many as an answer holds."""
        row, after = await self._map(args), int(args.get("after", REDUCE_LINE))
        ends = await self._store.ends(row, after, PAGE_LINES)
        shown: list[dict[str, Any]] = []
        size = 0
        for end in ends:
            size += len(end.result or b"")
            if shown and size > PAGE_BYTES:
                break
            shown.append(_line(row.operation, end))
        return {"lines": shown, "more": bool(shown)}

    async def on_stop(self, args: dict[str, Any]) -> dict[str, Any]:
        """Cancels what runs, and returns when it has ended; the map can be gone on with."""
        row = await self._map(args)
        run = self._running.get(row.id)
        if run is not None:
            run.stop()
            await run.ended.wait()
        return await self._shown(await self._map(args))

    async def _map(self, args: dict[str, Any]) -> MapRow:
        row = await self._store.get(str(args["map"]))
        if row is None:
            raise RequestError(
                f"no single map begins with {args['map']!r}",
                next_step="`aivillage-node map` names it when it begins",
            )
        return row

    async def _shown(self, row: MapRow) -> dict[str, Any]:
        run = self._running.get(row.id)
        tally = run.tally() if run else await self._store.tally(row)
        state = run.state if run else None
        return {
            "map": row.id,
            "operation": row.operation,
            "state": "running" if run else "interrupted" if row.state == "running" else row.state,
            "total": tally.total,
            "done": tally.done,
            "failed": tally.failed,
            "under_way": len(state.tries) if state else 0,
            "workers": len(state.workers) if state else 0,
            "micro_credits": state.spent if state else await self._store.spent(row),
            "budget_micro_credits": row.budget,
            "seconds": round((row.ended or time.time()) - row.created, 3),
            "reduced": None if run else await self._reduced(row),
        }

    async def _reduced(self, row: MapRow) -> dict[str, Any] | None:
        ends = await self._store.ends(row, REDUCE_LINE - 1, 1) if row.reduce else []
        return next((_line(row.reduce, end) for end in ends if end.line == REDUCE_LINE), None)

    # ------------------------------------------------------------------ done
    async def _start(self, row: MapRow) -> None:
        run = MapRun(row, self._store, self._trade, self._buyer, self._places(row.operation))
        self._running[row.id] = run
        try:
            await run.load()
        except BaseException:
            del self._running[row.id]
            raise
        self._nursery.start_soon(self._live, run)

    def _places(self, operation: str) -> int:
        """How many tasks our own workers do at once."""
        settings = self._settings
        if registry.is_served_by_engine(operation):
            return settings.slots
        return min(settings.slots, settings.module_workers)

    async def _live(self, run: MapRun) -> None:
        """One map; its end is in jobs.db before anybody hears of it."""
        row, events = run.row, self._trade.events
        try:
            await run.run()
            if row.reduce and not run.is_stopped:
                await self._reduce(run)
            await self._store.set_state(row, "stopped" if run.is_stopped else "done")
            events.emit("map_ended", map=row.id, micro_credits=run.state.spent)
        except AivillageError as error:  # the next start of this node goes on with it
            events.emit("map_interrupted", level=40, map=row.id, reason=str(error))
        except Exception as defect:  # one map must not fell the daemon
            events.emit("map_crashed", level=40, map=row.id, exc_info=defect)
        finally:
            del self._running[row.id]
            run.ended.set()

    async def _reduce(self, run: MapRun) -> None:
        """Over the results that there are, unless an earlier run did it over the same ones."""
        row = run.row
        reduced = await self._reduced(row)
        if reduced is not None and "error" not in reduced and not run.state.done:
            return
        try:
            found = await self._found(row)
            request = reduce_request(self._trade.workers.describe(row.reduce), found)
            _require_travels(request)
            usage, _ = await self._trade.workers.estimate(row.reduce, request)
        except AivillageError as error:
            reason = LineRow(line=REDUCE_LINE, code=error.code, message=error.message)
            await self._store.add_lines(row, [reason])
            return
        await self._store.add_lines(row, [LineRow(line=REDUCE_LINE, request=request, usage=usage)])
        await run.reduce(row.reduce, usage)

    async def _found(self, row: MapRow) -> list[Any]:
        """The results of all tasks that have one, in order."""
        found: list[Any] = []
        after, size = REDUCE_LINE, 0
        while ends := await self._store.ends(row, after, PAGE_LINES):
            after, size = ends[-1].line, size + sum(len(end.result or b"") for end in ends)
            if size > REQUEST_BYTES_MAX:
                raise _too_large()
            found += [results.shown(row.operation, end.result) for end in ends if end.result]
        return found


async def open_maps(settings: Settings, trade: Trade, buyer: Buyer, nursery: trio.Nursery) -> Maps:
    """Goes on with the owner's jobs and maps that a stop of this node interrupted, in this order.

    A map takes the results of its tasks from the jobs, and begins the others anew.
    """
    maps = Maps(settings=settings, trade=trade, buyer=buyer, nursery=nursery)
    await buyer.resume()
    await maps.resume()
    return maps


def _request_of(text: str | None) -> bytes:
    """A line as the operation's request, packed.

    Raises:
        RequestError: it is no JSON object, or too long to travel.
    """
    if text is None:
        raise _too_large()
    try:
        found = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(f"the line is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise RequestError("the line is no JSON object with the operation's fields")
    try:
        request = msgspec.msgpack.encode(found)
    except (ValueError, OverflowError, RecursionError) as error:
        raise RequestError(f"the line is no request: {error}") from None
    _require_travels(request)
    return request


def _require_travels(request: bytes) -> None:
    if len(request) > REQUEST_BYTES_MAX:
        raise _too_large()


def _too_large() -> RequestError:
    return RequestError(
        f"a request has at most {REQUEST_BYTES_MAX:,} bytes",
        code="TOO_LARGE",
        next_step="split it",
    )


def _line(operation: str, end: LineEnd) -> dict[str, Any]:
    """What the owner sees of one line."""
    if end.result is None:
        code, message = end.code or "CANCELLED", end.message or "it was not done"
        return {"line": end.line, "error": code, "message": message}
    if len(end.result) > REQUEST_BYTES_MAX:
        message = f"its {len(end.result):,} bytes do not fit an answer; job {end.job} has them"
        return {"line": end.line, "error": "TOO_LARGE", "message": message}
    receipt = msgspec.json.decode(end.receipt) if end.receipt else {}
    return {
        "line": end.line,
        **results.shown_or_why(operation, end.result),
        "job": end.job,
        "by": list(receipt.get("sellers", ())),
        "micro_credits": receipt.get("price_micro_credits", 0),
    }
