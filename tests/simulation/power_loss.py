"""Power cuts: `python -m tests.simulation.power_loss --seeds 200`.

The books of the simulated world lie on a disk of ours, an SQLite VFS that knows which writes were
synced. Power goes between transactions and at any write or sync inside one, inside a checkpoint or
a boot. Of what was written since the last sync of each file a random part survives, whole, torn or
not at all. Some crashes are of the process only: then all that was written stays, synced or not,
until a power cut. The product's own `books.configure` says when SQLite syncs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import apsw
import msgspec

from aivillage.ledger import books
from aivillage.protocols.vouchers import Receipt, ReceiptBody, decode, digest
from tests.simulation import invariants, rings
from tests.simulation.ledger_sim import become_quiet, commit
from tests.simulation.world import BrokenError, CrashError, Node, Rates, World, broken

STEPS = 60
SECTOR_BYTES = 512
KILLS_SHARE = 0.25
"""Of the crashes: the process alone ends."""
OPERATIONS_PER_COMMIT = 10
"""About: a crash rate per commit becomes one per write or sync."""
CHECKPOINT_PAGES = (4, 40, 1000)
"""1000 is what the product has, too many for a short life: smaller ones bring cuts inside."""
_numbers = itertools.count()
_Change = tuple[int, bytes] | int


class DiskFile:
    """What a file holds, and what of that a power cut may take back."""

    def __init__(self, synced: bytes = b"") -> None:
        self.synced = bytearray(synced)
        self.content = bytearray(synced)
        self.unsynced: list[_Change] = []
        """Writes (offset, data) and truncations (size), in order, since the last sync."""

    def change(self, change: _Change) -> None:
        _apply(self.content, change)
        self.unsynced.append(change)

    def sync(self) -> None:
        for change in self.unsynced:
            _apply(self.synced, change)
        self.unsynced.clear()

    def after_kill(self) -> DiskFile:
        copy = DiskFile(self.synced)
        for change in self.unsynced:
            copy.change(change)
        return copy

    def after_cut(self, dice: random.Random) -> DiskFile:
        """Some of the unsynced writes reached the disk, in any order of the drive's."""
        survives = dice.choice((0.0, 0.5, 0.9, 1.0))
        left = bytearray(self.synced)
        for change in self.unsynced:
            if dice.random() < survives:
                _apply(left, _torn(change, dice))
        return DiskFile(left)


def _apply(content: bytearray, change: _Change) -> None:
    if isinstance(change, int):
        del content[change:]
        return
    offset, data = change
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def _torn(change: _Change, dice: random.Random) -> _Change:
    """One in five writes ends at a sector inside it."""
    if isinstance(change, int) or dice.random() < 0.8:
        return change
    offset, data = change
    return offset, data[: SECTOR_BYTES * dice.randint(0, len(data) // SECTOR_BYTES)]


class Disk(apsw.VFS):
    """A VFS whose files live here.

    Once `fails` said so the disk is dead: what is left of it is settled, and the process that goes
    on writing writes into the void. Whoever runs the process looks at `is_dead` and ends it.
    """

    def __init__(self, dice: random.Random) -> None:
        self.name = f"power-{next(_numbers)}"
        self.files: dict[str, DiskFile] = {}
        self.fails: Callable[[], bool] = lambda: False
        self.syncs = self.cuts_inside = self.kills = self.lost_writes = 0
        self._dice = dice
        self._left: dict[str, DiskFile] | None = None
        super().__init__(self.name, "")

    @property
    def is_dead(self) -> bool:
        return self._left is not None

    def step(self) -> None:
        """A moment at which power may go."""
        if not self.is_dead and self.fails():
            self.cuts_inside += 1
            self._settle()

    def _settle(self) -> None:
        dice = self._dice
        if dice.random() < KILLS_SHARE:
            self.kills += 1
            self._left = {name: file.after_kill() for name, file in self.files.items()}
        else:
            self.lost_writes += sum(len(file.unsynced) for file in self.files.values())
            self._left = {name: file.after_cut(dice) for name, file in self.files.items()}

    def end(self, db: apsw.Connection) -> None:
        """The process that has `db` open is gone; the files are what its end left of them."""
        if self._left is None:
            self._settle()
        db.close(True)
        assert self._left is not None
        self.files, self._left = self._left, None

    def sync_all(self) -> None:
        for file in self.files.values():
            file.sync()

    def xFullPathname(self, name: str) -> str:  # noqa: N802
        return name

    def xAccess(self, pathname: str, flags: int) -> bool:  # noqa: N802
        return pathname in self.files

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802
        self.files.pop(filename, None)

    def xOpen(self, name: Any, flags: list[int]) -> Any:  # noqa: N802
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        flags[1] = flags[0]
        # Without a name it is a temporary file, which nobody else can open.
        return Handle(self, self.files.setdefault(path, DiskFile()) if path else DiskFile())


class Handle:
    """An open file. One process, one connection: locks are no business of this disk."""

    def __init__(self, disk: Disk, file: DiskFile) -> None:
        self._disk = disk
        self._file = file

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802
        return bytes(self._file.content[offset : offset + amount])

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        self._file.change((offset, bytes(data)))
        self._disk.step()

    def xTruncate(self, newsize: int) -> None:  # noqa: N802
        self._file.change(newsize)
        self._disk.step()

    def xSync(self, flags: int) -> None:  # noqa: N802
        self._disk.step()
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
        return 4096

    def xDeviceCharacteristics(self) -> int:  # noqa: N802
        """As on Linux: a torn write leaves its neighbours alone."""
        return int(apsw.SQLITE_IOCAP_POWERSAFE_OVERWRITE)

    def xClose(self) -> None:  # noqa: N802
        """The file stays on the disk."""


class PowerNode(Node):
    """A node whose crash is a power cut, or the end of the process alone."""

    synchronous = ""
    """Another setting than the product's, to see what it would cost."""

    def __init__(self, world: PowerWorld, index: int, lie: str) -> None:
        self.disk = Disk(world.rng)
        self.checkpoint_pages = world.rng.choice(CHECKPOINT_PAGES)
        self.receipted: dict[tuple[str, bytes, int], bytes] = {}
        """(payer, lane, n) -> hash of the voucher behind each receipt that was ever on a wire."""
        self.last_epoch = 0
        super().__init__(world, index, lie)

    def open_db(self) -> apsw.Connection:
        db = apsw.Connection("book", vfs=self.disk.name)
        db.execute("PRAGMA locking_mode=EXCLUSIVE").fetchall()  # no shared memory for the WAL
        books.configure(db)
        db.execute(f"PRAGMA wal_autocheckpoint={self.checkpoint_pages}").fetchall()
        if self.synchronous:
            db.execute(f"PRAGMA synchronous={self.synchronous}")
        return db

    def start_again(self) -> None:
        self.disk.end(self.db)
        self.db = self.open_db()
        found = books.one(self.db, "PRAGMA integrity_check")
        if found != ("ok",):
            raise broken("disk", f"node {self.index}: {found}")

    def boot(self) -> None:
        super().boot()
        if self.disk.is_dead:
            self.world.crash(self)
            return
        epoch = self.ledger.desk.epoch
        if epoch <= self.last_epoch:
            raise broken("boot", f"node {self.index} begins epoch {epoch} again")
        self.last_epoch = epoch
        nothing_sent_is_lost(self)

    def committed(self) -> None:
        super().committed()
        if self.disk.is_dead:
            raise CrashError("inside a commit")


class NormalNode(PowerNode):
    """Syncs at checkpoints only, as many programs do with a WAL."""

    synchronous = "NORMAL"


class CarelessNode(PowerNode):
    """Leaves it to the system when to write."""

    synchronous = "OFF"


class PowerWorld(World):
    """Remembers what each receipt speaks of too."""

    def watch(self, node: Node, peer: Node, blob: bytes) -> None:
        super().watch(node, peer, blob)
        message = decode(blob)[1]
        if isinstance(message, Receipt) and isinstance(node, PowerNode):
            body = msgspec.msgpack.decode(message.body, type=ReceiptBody)
            for row in body.rows:
                # What a later voucher made worthless is not stored: that one has to stay.
                n, stored = books.rows(node.db, _WITNESS, (peer.id, body.lane, row.n))[0]
                node.receipted[peer.id, body.lane, n] = digest(stored)


_WITNESS = """
  SELECT n, body FROM voucher_in WHERE peer = ? AND lane = ? AND n >= ? ORDER BY n LIMIT 1
"""


def nothing_sent_is_lost(node: PowerNode) -> None:
    """What was ever on a wire stands on the disk, byte for byte.

    Or compaction dropped it, since a later one of its lane says more, which is on the disk then.
    """
    signed = node.world.signed.items()
    sent = {(p, lane, n): digest(body) for (me, p, lane, n), body in signed if me == node.id}
    _kept(node, "out", sent, "a voucher that it had sent")
    _kept(node, "in", node.receipted, "what it had given a receipt for")


def _kept(node: Node, side: str, wanted: dict[tuple[Any, ...], bytes], what: str) -> None:
    stored = books.rows(node.db, f"SELECT peer, lane, n, body FROM voucher_{side}")
    held = {(peer, lane, n): digest(body) for peer, lane, n, body in stored}
    last: dict[tuple[Any, ...], int] = {}
    for peer, lane, n in held:
        last[peer, lane] = max(n, last.get((peer, lane), 0))
    for place, body_hash in wanted.items():
        found, newest = held.get(place), last.get(place[:2], 0)
        if found != body_hash and (found is not None or newest <= place[2]):
            raise broken("kept", f"node {node.index} lost {what}: {place[2]}")


class Outcome(NamedTuple):
    """One seed. `failure` is empty if all held."""

    failure: str
    vouchers: int
    receipts: int
    crashes: int
    kills: int
    cuts_inside: int
    lost_writes: int
    syncs: int


def run_seed(seed: int, node_type: type[PowerNode] = PowerNode) -> Outcome:
    """One world to the end, or until something breaks."""
    world = PowerWorld(seed, node_type=node_type, with_liars=False)
    with_power_cuts(world.rates, world.rng)
    # The swarm changes a key and its book in two steps; what a cut between them does is tested
    # with the product's own order of them, in tests/unit/node/test_rotation.py.
    world.rekeys = 0.0
    nodes = [node for node in world.nodes if isinstance(node, PowerNode)]
    for node in nodes:
        node.disk.sync_all()  # what the owners said on their first day is long on the disk
        node.disk.fails = lambda: world.chance(
            world.rates.crash_before_commit / OPERATIONS_PER_COMMIT
        )
    failure = ""
    try:
        _live(world, nodes)
    except BrokenError as error:
        failure = str(error)
    except apsw.Error as error:
        failure = f"disk: {type(error).__name__}: {error}"
    disks = [node.disk for node in nodes]
    sums = (sum(getattr(d, name) for d in disks) for name in Outcome._fields[-4:])
    receipts = sum(len(node.receipted) for node in nodes)
    return Outcome(failure, world.vouchers, receipts, world.crashes, *sums)


def with_power_cuts(rates: Rates, rng: random.Random) -> None:
    """Disks fail by power cuts only, and those are frequent."""
    rates.lost_tail = rates.restore = 0.0
    for name in ("crash_before_commit", "crash_after_commit", "crash_sending", "crash_idle"):
        setattr(rates, name, rng.uniform(0.002, 0.02))


def _live(world: World, nodes: list[PowerNode]) -> None:
    for _ in range(STEPS):
        world.trade()
        rings.trade(world)
        world.advance()
        invariants.at_every_step(world)
    become_quiet(world)
    invariants.at_every_step(world)
    invariants.when_quiet(world)
    for node in nodes:
        nothing_sent_is_lost(node)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    started = time.process_time()
    seeds = range(options.first, options.first + options.seeds)
    outcomes = {seed: run_seed(seed) for seed in seeds}
    failed = {seed: outcome.failure for seed, outcome in outcomes.items() if outcome.failure}
    summary = {
        "seeds": options.seeds,
        "failures": len(failed),
        **{
            name: sum(getattr(outcome, name) for outcome in outcomes.values())
            for name in Outcome._fields[1:]
        },
        "cpu_seconds": round(time.process_time() - started, 1),
        "commit": commit(),
    }
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
