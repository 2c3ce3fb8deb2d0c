"""Power cuts: `python -m tests.simulation.power_loss --seeds 200`.

The books of the simulated world lie on a disk of ours, an SQLite VFS that knows which writes were
synced. A crash is a power cut: of what was written since the last sync of each file, a random part
survives, whole, torn or not at all. The product's own `books.configure` says when SQLite syncs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from contextlib import suppress
from typing import Any

import apsw

from aivillage.ledger import books
from tests.simulation import invariants, rings
from tests.simulation.ledger_sim import become_quiet, commit
from tests.simulation.world import BrokenError, Node, Rates, World, broken

STEPS = 60
SECTOR_BYTES = 512
_numbers = itertools.count()


class DiskFile:
    """What a file holds, and what of that a power cut may take back."""

    def __init__(self) -> None:
        self.synced = bytearray()
        self.content = bytearray()
        self.unsynced: list[tuple[int, bytes] | int] = []
        """Writes (offset, data) and truncations (size), in order, since the last sync."""

    def write(self, data: bytes, offset: int) -> None:
        _put(self.content, offset, data)
        self.unsynced.append((offset, data))

    def truncate(self, size: int) -> None:
        del self.content[size:]
        self.unsynced.append(size)

    def sync(self) -> None:
        self.synced = bytearray(self.content)
        self.unsynced.clear()

    def cut(self, dice: random.Random) -> None:
        """Some of the unsynced writes reached the disk, in any order of the drive's."""
        survives = dice.choice((0.0, 0.5, 0.9))
        for change in self.unsynced:
            if dice.random() >= survives:
                continue
            if isinstance(change, int):
                del self.synced[change:]
                continue
            offset, data = change
            if dice.random() < 0.2:  # torn at a sector
                data = data[: SECTOR_BYTES * dice.randint(0, len(data) // SECTOR_BYTES)]
            _put(self.synced, offset, data)
        self.content = bytearray(self.synced)
        self.unsynced.clear()


def _put(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


class Disk(apsw.VFS):
    """A VFS whose files live here. A new `generation` begins at each power cut."""

    def __init__(self) -> None:
        self.name = f"power-{next(_numbers)}"
        self.files: dict[str, DiskFile] = {}
        self.generation = 0
        self.is_off = False
        self.syncs = 0
        super().__init__(self.name, "")

    def xFullPathname(self, name: str) -> str:  # noqa: N802
        return name

    def xAccess(self, pathname: str, flags: int) -> bool:  # noqa: N802
        return pathname in self.files

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802
        if not self.is_off:
            self.files.pop(filename, None)

    def xOpen(self, name: Any, flags: list[int]) -> Any:  # noqa: N802
        path = name.filename() if isinstance(name, apsw.URIFilename) else name or "temporary"
        flags[1] = flags[0]
        return Handle(self, self.files.setdefault(path, DiskFile()))

    def sync_all(self) -> None:
        for file in self.files.values():
            file.sync()

    def cut_power(self, dice: random.Random, db: apsw.Connection) -> None:
        """What was not synced is lost, or not. `db` was open on it, and can do no more."""
        self.generation += 1
        self.is_off = True
        with suppress(apsw.Error):  # that it cannot close in good order is the point
            db.close(True)
        self.is_off = False
        for file in self.files.values():
            file.cut(dice)


class Handle:
    """An open file. One process, one connection: locks are no business of this disk."""

    def __init__(self, disk: Disk, file: DiskFile) -> None:
        self._disk = disk
        self._file = file
        self._generation = disk.generation

    @property
    def _alive(self) -> bool:
        return self._generation == self._disk.generation

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802
        return bytes(self._file.content[offset : offset + amount])

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        if self._alive:
            self._file.write(bytes(data), offset)

    def xTruncate(self, newsize: int) -> None:  # noqa: N802
        if self._alive:
            self._file.truncate(newsize)

    def xSync(self, flags: int) -> None:  # noqa: N802
        if self._alive:
            self._disk.syncs += 1
            self._file.sync()

    def xFileSize(self) -> int:  # noqa: N802
        return len(self._file.content)

    def xLock(self, level: int) -> None:  # noqa: N802
        """Always free."""

    def xUnlock(self, level: int) -> None:  # noqa: N802
        """Always free."""

    def xCheckReservedLock(self) -> bool:  # noqa: N802
        return False

    def xFileControl(self, op: int, ptr: int) -> bool:  # noqa: N802
        return False

    def xSectorSize(self) -> int:  # noqa: N802
        return SECTOR_BYTES

    def xDeviceCharacteristics(self) -> int:  # noqa: N802
        return 0

    def xClose(self) -> None:  # noqa: N802
        """The file stays on the disk."""


class PowerNode(Node):
    """A node whose crash is a power cut."""

    synchronous = ""
    """Another setting than the product's, to see what it would cost."""

    def open_db(self) -> apsw.Connection:
        if not hasattr(self, "disk"):
            self.disk = Disk()
        db = apsw.Connection("book", vfs=self.disk.name)
        db.execute("PRAGMA locking_mode=EXCLUSIVE").fetchall()  # no shared memory for the WAL
        books.configure(db)
        return db

    def boot(self) -> None:
        super().boot()
        if self.synchronous:
            self.db.execute(f"PRAGMA synchronous={self.synchronous}")

    def start_again(self) -> None:
        self.disk.cut_power(self.world.rng, self.db)
        self.db = self.open_db()
        found = books.one(self.db, "PRAGMA integrity_check")
        if found != ("ok",):
            raise broken("disk", f"node {self.index}: {found}")


class NormalNode(PowerNode):
    """Syncs at checkpoints only, as many programs do with a WAL."""

    synchronous = "NORMAL"


def run_seed(seed: int, node_type: type[PowerNode] = PowerNode) -> tuple[str, World]:
    """What broke, if anything, and the world."""
    world = World(seed, node_type=node_type, with_liars=False)
    with_power_cuts(world.rates, world.rng)
    for node in world.nodes:
        if isinstance(node, PowerNode):
            node.disk.sync_all()  # what the owners said on their first day is long on the disk
    try:
        _live(world)
    except BrokenError as error:
        return str(error), world
    except apsw.Error as error:
        return f"disk: {type(error).__name__}: {error}", world
    return "", world


def with_power_cuts(rates: Rates, rng: random.Random) -> None:
    """Disks fail by power cuts only, and those are frequent."""
    rates.lost_tail = rates.restore = 0.0
    for name in ("crash_before_commit", "crash_after_commit", "crash_sending", "crash_idle"):
        setattr(rates, name, rng.uniform(0.002, 0.02))


def _live(world: World) -> None:
    for _ in range(STEPS):
        world.trade()
        rings.trade(world)
        world.advance()
        invariants.at_every_step(world)
    become_quiet(world)
    invariants.at_every_step(world)
    invariants.when_quiet(world)
    nothing_sent_is_lost(world)


def nothing_sent_is_lost(world: World) -> None:
    """Every voucher that was ever on a wire is on its signer's disk, byte for byte.

    Or it was dropped since a later one of its lane says more, which is on the disk then.
    """
    books_by_id = {node.id: node for node in world.nodes}
    for (signer, payee, lane, n), body in world.signed.items():
        node = books_by_id[signer]
        row = books.one(
            node.db,
            "SELECT body FROM voucher_out WHERE peer = ? AND lane = ? AND n = ?",
            (payee, lane, n),
        )
        lane_row = books.one(
            node.db, "SELECT n FROM lane_out WHERE peer = ? AND lane = ?", (payee, lane)
        )
        if row != (body,) and (row is not None or lane_row is None or lane_row[0] <= n):
            raise broken("kept", f"node {node.index} lost voucher {n} that it had sent")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    started = time.process_time()
    failed: dict[int, str] = {}
    cuts = vouchers = syncs = 0
    for seed in range(options.first, options.first + options.seeds):
        failure, world = run_seed(seed)
        if failure:
            failed[seed] = failure
        cuts += world.crashes
        vouchers += world.vouchers
        syncs += sum(node.disk.syncs for node in world.nodes if isinstance(node, PowerNode))
    summary = {
        "seeds": options.seeds, "failures": len(failed), "power_cuts": cuts, "vouchers": vouchers,
        "syncs": syncs, "cpu_seconds": round(time.process_time() - started, 1), "commit": commit(),
    }  # fmt: skip
    if options.json:
        print(json.dumps(summary | {"failed": failed}))
    else:
        for seed, failure in failed.items():
            print(f"seed {seed}: {failure}")
            print(f"  again: python -m tests.simulation.power_loss --first {seed} --seeds 1")
        print(" ".join(f"{key}={value}" for key, value in summary.items()))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
