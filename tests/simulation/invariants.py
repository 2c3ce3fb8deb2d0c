"""What must hold at every step, on every wire, and once all is quiet. Named as in the tests.

Loss bounds (I1-I5) speak of nodes that kept their disk; the others speak of all honest nodes.
"""

from __future__ import annotations

import msgspec

from aivillage.ledger import books, corrections, payer
from aivillage.ledger.audit import audit
from aivillage.ledger.queries import run
from aivillage.protocols.vouchers import (
    ARREARS,
    GIFT,
    JOB,
    Message,
    Receipt,
    ReceiptBody,
    SyncReply,
    Voucher,
    VoucherBody,
)
from tests.simulation import rings, sybils
from tests.simulation.world import CEILING, EXPOSURE, LINE, POOL, UNIT_MAX, Node, World, broken


def on_wire(world: World, node: Node, peer: Node, message: Message) -> None:
    """I9: durable before it leaves. I10: an honest node never contradicts itself."""
    match message:
        case Voucher():
            _own_voucher(world, node, peer, message)
        case SyncReply():
            for voucher in message.mine:
                _own_voucher(world, node, peer, voucher)
        case Receipt():
            _receipt(node, peer, message)


def _own_voucher(world: World, node: Node, peer: Node, voucher: Voucher) -> None:
    body = msgspec.msgpack.decode(voucher.body, type=VoucherBody)
    row = books.one(
        node.db,
        "SELECT v.body FROM lane_out l LEFT JOIN voucher_out v"
        " ON v.peer = l.peer AND v.lane = l.lane AND v.n = ?3"
        " WHERE l.peer = ?1 AND l.lane = ?2 AND (v.n = ?3 OR l.n > ?3)",  # compaction drops it
        (peer.id, body.lane, body.n),
    )
    if node.db.in_transaction or row not in {(voucher.body,), (None,)}:
        raise broken("I9", f"node {node.index} sent a voucher before its commit")
    place = (node.id, peer.id, body.lane, body.n)
    if world.signed.setdefault(place, voucher.body) != voucher.body:
        raise broken("I10", f"node {node.index} signed two bodies for n {body.n}")
    world.vouchers += 1


def _receipt(node: Node, peer: Node, receipt: Receipt) -> None:
    body = msgspec.msgpack.decode(receipt.body, type=ReceiptBody)
    for row in body.rows:
        found = books.one(
            node.db,
            "SELECT 1 FROM lane_in WHERE peer = ? AND lane = ? AND n >= ?",
            (peer.id, body.lane, row.n),
        )
        if node.db.in_transaction or found is None:
            raise broken("I9", f"node {node.index} sent a receipt before its commit")


def at_every_step(world: World) -> None:
    for node in world.nodes:
        if node.honest and not node.db.in_transaction:
            pairs = books.read_pairs(node.db)
            signed = _signed(node, pairs)
            if node.lossless:
                _exposure(world, node, pairs, signed)
                rings.at_every_step(node)


_SIGNED_FOR_WORK = """
  SELECT peer, sum(CASE sealed WHEN 1 THEN service ELSE cum - attr + service END)
  FROM lane_in GROUP BY peer
"""


# By the items themselves; on a sealed lane all may count, since nobody knows what it was for.
_PAID_AT_MOST = """
  SELECT peer, sum(CASE sealed WHEN 1 THEN cum ELSE min(cum,
    (SELECT coalesce(sum(amount), 0) FROM item i
     WHERE mine = 0 AND i.peer = l.peer AND i.lane = l.lane AND kind IN (0, 2))) END)
  FROM lane_in l GROUP BY peer
"""


def _signed(node: Node, pairs: list[books.Pair]) -> dict[str, int]:
    """I8: what counts as paid was signed, and for work."""
    at_most = dict(books.rows(node.db, _PAID_AT_MOST))
    for pair in pairs:
        if pair.paid > at_most.get(pair.peer, 0):
            raise broken("I8", f"node {node.index} counts more as paid than was signed for work")
    return dict(books.rows(node.db, _SIGNED_FOR_WORK))


def _exposure(world: World, node: Node, pairs: list[books.Pair], signed: dict[str, int]) -> None:
    """What is owed is signed; what is delivered beyond all that was ever signed comes on top."""
    strangers = 0
    allowance = EXPOSURE / 4 * (world.now + world.jumped_seconds) / 86_400 + 1
    for pair in pairs:
        delivered = node.delivered.get(pair.peer, 0)
        unsigned = delivered - signed.get(pair.peer, 0)
        if not pair.known:
            taken = max(0, delivered - _given_by(node, pair.peer))
            strangers += min(taken, max(0, unsigned) + max(0, _owed_for_work(node, pair.peer)))
            continue
        name = f"node {node.index}: delivered {delivered}, {pair}"
        if delivered - pair.paid > EXPOSURE + pair.written_off:
            raise broken("I1", name)
        if pair.written_off > pair.paid // 16 + allowance:
            raise broken("I2", name)
        held = rings.held_back(node, pair.peer)
        if pair.balance - held + max(0, unsigned - pair.written_off) > LINE + EXPOSURE:
            raise broken("I14", name)
    if strangers > POOL:
        raise broken("I3", f"node {node.index}: strangers have {strangers}")
    if (taken := sybils.taken_by_strangers(node)) > POOL:
        raise broken("I3", f"node {node.index}: strangers took {taken} and earned none of it")
    _one_owner(world, node, pairs, signed)


def _one_owner(world: World, node: Node, pairs: list[books.Pair], signed: dict[str, int]) -> None:
    """I14 of all devices of an owner together: its line is one."""
    owed = 0
    for pair in pairs:
        if pair.owner is not None:
            unsigned = node.delivered.get(pair.peer, 0) - signed.get(pair.peer, 0)
            held = rings.held_back(node, pair.peer)
            owed += max(0, pair.balance - held + max(0, unsigned - pair.written_off))
    if owed > LINE + EXPOSURE:
        raise broken("I14", f"node {node.index}: one owner's devices owe {owed}")


def _owed_for_work(node: Node, peer: str) -> int:
    """What is owed for work, less my gifts. Others' gifts and transfers are but promises."""
    row = books.one(
        node.db,
        "SELECT coalesce((SELECT sum(service) FROM lane_in WHERE peer = ?1), 0)"
        " - coalesce((SELECT sum(service) FROM lane_out WHERE peer = ?1), 0)"
        " - coalesce((SELECT sum(amount) FROM item"
        "  WHERE mine = 1 AND peer = ?1 AND kind = ?2), 0)",
        (peer, GIFT),
    )
    return int(row[0]) if row else 0


def _given_by(node: Node, peer: str) -> int:
    """What a peer did for this node, which signed for it: who paid twice takes nothing by that."""
    row = books.one(
        node.db, "SELECT coalesce(sum(service), 0) FROM lane_out WHERE peer = ?", (peer,)
    )
    return int(row[0]) if row else 0


def paid_for_work(world: World, accepted: dict[tuple[str, str], int]) -> None:
    """I4: a buyer pays for what it accepted, and for claims within their budget. I5."""
    for node in world.nodes:
        if not (node.honest and node.lossless):
            continue
        signed = dict(books.rows(node.db, "SELECT peer, sum(service) FROM lane_out GROUP BY peer"))
        for pair in books.read_pairs(node.db):
            paid = signed.get(pair.peer, 0)
            if paid > accepted.get((node.id, pair.peer), 0) + pair.arrears:
                raise broken("I4", f"node {node.index} paid {paid} to {pair.peer}")
            if pair.arrears > pair.received_exposure + paid // 16:
                raise broken("I4", f"node {node.index}: arrears {pair.arrears}")
        over = books.rows(
            node.db,
            "SELECT id FROM item WHERE mine = 1 AND kind IN (?, ?) GROUP BY id"
            " HAVING sum(amount) > ? OR count(DISTINCT lane) > 2",
            (JOB, ARREARS, CEILING),
        )
        if over:
            raise broken("I5", f"node {node.index} paid an attempt above its ceiling")


def when_quiet(world: World) -> None:
    rings.when_quiet(world)
    for a in world.nodes:
        for b in world.nodes:
            if a.honest and b is not a and b.honest:
                _no_evidence(a, b)
                _books_agree(world, a, b)
    for node in world.nodes:
        report = run(node.db, audit(node.signer.verify))
        if node.honest and not report.ok:
            raise broken("audit", f"node {node.index}: {report.first_error}")


def _no_evidence(a: Node, b: Node) -> None:
    if books.one(a.db, "SELECT 1 FROM evidence WHERE payer = ?", (b.id,)):
        raise broken("I10", f"node {a.index} holds evidence against honest node {b.index}")


_UNCOUNTED = """
  SELECT lane FROM lane_in l WHERE peer = ?1 AND sealed = 1 AND service < cum
    - (SELECT coalesce(sum(amount), 0) FROM item i
       WHERE mine = 0 AND i.peer = ?1 AND i.lane = l.lane AND kind NOT IN (0, 2))
"""
_ITEMS = "SELECT kind, id, lane, amount, final FROM item WHERE mine = ? AND peer = ? ORDER BY 1, 2"


def _books_agree(world: World, a: Node, b: Node) -> None:
    name = f"nodes {a.index}, {b.index}"
    there, back = books.read_pair(a.db, b.id).balance, books.read_pair(b.db, a.id).balance
    if there != -back:
        raise broken("I11", f"{name}: balances {there} and {back}")
    out = books.rows(a.db, "SELECT lane, n, cum FROM lane_out WHERE peer = ? ORDER BY 1", (b.id,))
    held = books.rows(b.db, "SELECT lane, n, cum FROM lane_in WHERE peer = ? ORDER BY 1", (a.id,))
    if out != held:
        raise broken("I11", f"{name}: lanes differ")
    if payer.count_unreceipted(a.db, b.id):
        raise broken("I12", f"{name}: a voucher has no receipt")
    if books.rows(a.db, _ITEMS, (1, b.id)) != books.rows(b.db, _ITEMS, (0, a.id)):
        raise broken("I12", f"{name}: items differ")
    if books.rows(b.db, _UNCOUNTED, (a.id,)):
        raise broken("I12", f"{name}: money that no item explains does not count as pay")
    if all(node.lossless for node in world.nodes):
        loose = "SELECT lane FROM lane_in WHERE peer = ? AND attr <> cum"
        if books.rows(b.db, loose, (a.id,)):
            raise broken("I12", f"{name}: unlabelled money without a loss")


def can_work_again(world: World, seller: Node, buyer: Node) -> None:
    """Healing: a pair with line left is not blocked for ever by what crashes left behind."""
    pair = books.read_pair(seller.db, buyer.id)
    partner = seller.ledger.desk.partner(buyer.id)
    if pair.known and pair.line - pair.balance - pair.routed >= 2 * UNIT_MAX:
        seller.ledger.selling.want_room(buyer.id, UNIT_MAX)
        world.flush(seller)
        if partner.pair.reserved - partner.delivered < UNIT_MAX:
            raise broken("live", f"node {seller.index} is blocked towards {buyer.index}: {pair}")


def after_days(world: World) -> None:
    """I15: what is given up is owed; and what was owed for too long without a movement is given up.

    To be asked when all has been quiet for longer than debts may last.
    """
    for node in world.members:
        if not node.honest:
            continue
        for pair in books.read_pairs(node.db):
            doubtful = corrections.doubtful(node.db, pair.peer)
            if not 0 <= doubtful <= max(0, pair.balance):
                raise broken("I15", f"node {node.index} doubts {doubtful} of {pair}")
            if world.settings.debt_expiry_days and doubtful < pair.balance:
                raise broken("I15", f"node {node.index} still counts on {pair}")
