-- The book of one node. Amounts are micro-credits. What may never change, cannot: by trigger.

CREATE TABLE identity(                                -- the keys of this book, the last one in force
  n INTEGER PRIMARY KEY CHECK (n >= 1),
  public_key BLOB NOT NULL UNIQUE CHECK (length(public_key) = 32),
  since_ms INTEGER NOT NULL,
  proof BLOB                                          -- where the key before names this one
) STRICT;

CREATE TABLE boot(
  epoch INTEGER PRIMARY KEY,
  lane BLOB NOT NULL CHECK (length(lane) = 16)       -- of every voucher signed in this boot
) STRICT;

-- One row per peer. `reserved`, `paid`, `written_off` are D_reserved, P and F of the exposure
-- inequality; `arrears` is what I paid it on claims. `line` and `exposure` are in force: the
-- owner's word (`owner_*`), else what its village certifies, and nothing while it is blocked.
CREATE TABLE peer(
  peer TEXT PRIMARY KEY,
  known INTEGER NOT NULL DEFAULT 0,
  line INTEGER NOT NULL DEFAULT 0 CHECK (line BETWEEN 0 AND 9007199254740991),
  exposure INTEGER NOT NULL DEFAULT 0 CHECK (exposure BETWEEN 0 AND 9007199254740991),
  certified_line INTEGER CHECK (certified_line BETWEEN 0 AND 9007199254740991),
  certified_exposure INTEGER CHECK (certified_exposure BETWEEN 0 AND 9007199254740991),
  owner_line INTEGER CHECK (owner_line BETWEEN 0 AND 9007199254740991),
  owner_exposure INTEGER CHECK (owner_exposure BETWEEN 0 AND 9007199254740991),
  blocked INTEGER NOT NULL DEFAULT 0 CHECK (blocked IN (0, 1)),
  shared INTEGER NOT NULL DEFAULT 0 CHECK (shared IN (0, 1)),      -- work for it is free
  owner TEXT,                                         -- whose device it is; they share one line
  unsynced INTEGER NOT NULL DEFAULT 0 CHECK (unsynced IN (0, 1)),  -- since a restored backup
  received_line INTEGER NOT NULL DEFAULT 0
    CHECK (received_line BETWEEN 0 AND 9007199254740991),
  received_exposure INTEGER NOT NULL DEFAULT 20000
    CHECK (received_exposure BETWEEN 0 AND 9007199254740991),
  epoch INTEGER NOT NULL DEFAULT 0,
  reserved INTEGER NOT NULL DEFAULT 0 CHECK (reserved BETWEEN 0 AND 9007199254740991),
  paid INTEGER NOT NULL DEFAULT 0 CHECK (paid BETWEEN 0 AND 9007199254740991),
  written_off INTEGER NOT NULL DEFAULT 0 CHECK (written_off >= 0),
  arrears INTEGER NOT NULL DEFAULT 0 CHECK (arrears >= 0),
  allowance_ms INTEGER NOT NULL DEFAULT 0,
  healed_ms INTEGER NOT NULL DEFAULT 0
) STRICT;

CREATE TABLE peer_key(                                -- later keys of a peer that changed its key
  key_peer TEXT PRIMARY KEY,
  peer TEXT NOT NULL,
  n INTEGER NOT NULL CHECK (n >= 2),
  since_ms INTEGER NOT NULL,
  proof BLOB NOT NULL,
  UNIQUE (peer, n)
) STRICT;

CREATE TABLE pool(                                    -- what the owner forgave all strangers
  id INTEGER PRIMARY KEY CHECK (id = 1),
  relieved INTEGER NOT NULL DEFAULT 0 CHECK (relieved >= 0),
  healed_ms INTEGER NOT NULL DEFAULT 0
) STRICT;

CREATE TABLE bal(                                     -- what the peer owes me; follows the entries
  peer TEXT PRIMARY KEY,
  amount INTEGER NOT NULL CHECK (abs(amount) <= 9007199254740991),
  moved_ms INTEGER NOT NULL
) STRICT;

CREATE TABLE account(                                 -- sums of all postings; follows the entries
  account TEXT PRIMARY KEY,
  amount INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Money between two peers has a voucher (peer, lane, n); a correction of mine has a memo.
CREATE TABLE entry(
  seq INTEGER PRIMARY KEY,
  at_ms INTEGER NOT NULL,
  kind TEXT NOT NULL CHECK (kind IN ('pay', 'receive', 'recover-pay', 'recover-receive',
    'write-off', 'write-back', 'release')),
  peer TEXT NOT NULL,
  lane BLOB NOT NULL,
  n INTEGER NOT NULL,
  body_hash BLOB NOT NULL,
  prev BLOB NOT NULL,
  hash BLOB NOT NULL
) STRICT;
CREATE INDEX entry_peer ON entry(peer, seq);
CREATE INDEX entry_at ON entry(at_ms);
CREATE INDEX entry_kind ON entry(kind, at_ms);
CREATE INDEX entry_correction ON entry(peer) WHERE lane = x'';

CREATE TABLE memo(                                    -- why a correction was made
  hash BLOB PRIMARY KEY CHECK (length(hash) = 32),
  body BLOB NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE posting(
  seq INTEGER NOT NULL REFERENCES entry(seq) DEFERRABLE INITIALLY DEFERRED,
  leg INTEGER NOT NULL,
  account TEXT NOT NULL CHECK (account IN ('peer', 'earned', 'spent', 'unlabelled', 'routed',
    'gift', 'doubtful', 'writeoff')),
  attempt BLOB,
  amount INTEGER NOT NULL CHECK (amount <> 0),
  PRIMARY KEY (seq, leg)
) STRICT, WITHOUT ROWID;

CREATE TABLE lane_out(
  peer TEXT NOT NULL,
  lane BLOB NOT NULL,
  n INTEGER NOT NULL CHECK (n >= 1),
  cum INTEGER NOT NULL CHECK (cum BETWEEN 0 AND 9007199254740991),
  service INTEGER NOT NULL CHECK (service BETWEEN 0 AND cum),     -- the part that was for work
  confirmed INTEGER NOT NULL DEFAULT 0 CHECK (confirmed BETWEEN 0 AND cum),  -- by receipts
  fold BLOB,                                          -- hash of what it says, once it is an old one
  PRIMARY KEY (peer, lane)
) STRICT, WITHOUT ROWID;

CREATE TABLE voucher_out(
  id INTEGER PRIMARY KEY,
  peer TEXT NOT NULL,
  lane BLOB NOT NULL,
  n INTEGER NOT NULL,
  cum INTEGER NOT NULL,
  body BLOB NOT NULL,
  signature BLOB NOT NULL,
  items BLOB NOT NULL,
  receipt INTEGER REFERENCES receipt(id),
  attest INTEGER,
  UNIQUE (peer, lane, n)
) STRICT;

CREATE INDEX voucher_out_open ON voucher_out(peer, lane, n) WHERE receipt IS NULL;
CREATE INDEX voucher_out_receipt ON voucher_out(receipt) WHERE receipt IS NOT NULL;

CREATE TABLE receipt(
  id INTEGER PRIMARY KEY,
  peer TEXT NOT NULL,
  body BLOB NOT NULL,
  signature BLOB NOT NULL
) STRICT;

CREATE TABLE lane_in(
  peer TEXT NOT NULL,
  lane BLOB NOT NULL,
  n INTEGER NOT NULL CHECK (n >= 1),
  cum INTEGER NOT NULL CHECK (cum BETWEEN 0 AND 9007199254740991),
  attr INTEGER NOT NULL CHECK (attr BETWEEN 0 AND cum),  -- the part that items account for
  service INTEGER NOT NULL CHECK (service BETWEEN 0 AND cum),  -- the part that counts as pay
  count INTEGER NOT NULL,
  sealed INTEGER NOT NULL DEFAULT 0,
  fold BLOB,
  PRIMARY KEY (peer, lane)
) STRICT, WITHOUT ROWID;

CREATE TABLE voucher_in(
  id INTEGER PRIMARY KEY,
  peer TEXT NOT NULL,
  lane BLOB NOT NULL,
  n INTEGER NOT NULL,
  cum INTEGER NOT NULL,
  body BLOB NOT NULL,
  signature BLOB NOT NULL,
  items BLOB NOT NULL,
  attest INTEGER NOT NULL,
  UNIQUE (peer, lane, n)
) STRICT;

-- `amount` is cumulative; an id lives on one lane. `mine`: I am the payer. `voucher` has the last
-- word, and is the `last_n`th of the lane: found by its id, since new ids lie on one page.
CREATE TABLE item(
  mine INTEGER NOT NULL,
  peer TEXT NOT NULL,
  kind INTEGER NOT NULL,
  id BLOB NOT NULL,
  lane BLOB NOT NULL,
  amount INTEGER NOT NULL CHECK (amount BETWEEN 0 AND 9007199254740991),
  last_n INTEGER NOT NULL,
  final INTEGER NOT NULL,
  voucher INTEGER NOT NULL,
  PRIMARY KEY (mine, peer, kind, id)
) STRICT, WITHOUT ROWID;
CREATE INDEX item_voucher ON item(mine, voucher);

CREATE TABLE intent(                                  -- what I asked for and may owe after a crash
  peer TEXT NOT NULL,
  attempt BLOB NOT NULL,
  quote_hash BLOB NOT NULL,
  ceiling INTEGER NOT NULL,
  at_ms INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (peer, attempt)
) STRICT, WITHOUT ROWID;

-- A transfer that this node started: a ring of promises that begins and ends here.
CREATE TABLE route(
  xid BLOB PRIMARY KEY CHECK (length(xid) = 16),
  amount INTEGER NOT NULL CHECK (amount BETWEEN 1 AND 9007199254740991),
  ring BLOB NOT NULL,                                 -- msgpack array of keys, this node's first
  state TEXT NOT NULL CHECK (state IN ('open', 'closed', 'refunded', 'released')),
  started_ms INTEGER NOT NULL,
  ended_ms INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE route_hop(                               -- each other member, while the ring is open
  xid BLOB NOT NULL REFERENCES route(xid),
  peer TEXT NOT NULL,
  amount INTEGER NOT NULL,
  PRIMARY KEY (xid, peer)
) STRICT, WITHOUT ROWID;
CREATE INDEX route_hop_peer ON route_hop(peer, amount);

-- A transfer of somebody else's that comes through here.
CREATE TABLE transfer(
  xid BLOB NOT NULL CHECK (length(xid) = 16),
  previous TEXT NOT NULL,
  next TEXT NOT NULL,
  amount INTEGER NOT NULL CHECK (amount BETWEEN 1 AND 9007199254740991),
  ring BLOB NOT NULL,
  state TEXT NOT NULL
    CHECK (state IN ('waiting', 'forwarded', 'refunded', 'returning', 'returned')),
  at_ms INTEGER NOT NULL,
  PRIMARY KEY (xid, previous)
) STRICT, WITHOUT ROWID;
CREATE INDEX transfer_pending ON transfer(state) WHERE state IN ('waiting', 'returning');

CREATE TABLE favour(                                  -- work for nothing, and what it was worth
  mine INTEGER NOT NULL,                              -- 1: it was done for me
  peer TEXT NOT NULL,
  attempt BLOB NOT NULL,
  worth INTEGER NOT NULL CHECK (worth >= 0),
  at_ms INTEGER NOT NULL,
  PRIMARY KEY (mine, peer, attempt)
) STRICT, WITHOUT ROWID;
CREATE INDEX favour_at ON favour(at_ms, attempt);

CREATE TABLE favour_sum(                              -- follows the favours
  mine INTEGER NOT NULL,
  peer TEXT NOT NULL,
  worth INTEGER NOT NULL,
  PRIMARY KEY (mine, peer)
) STRICT, WITHOUT ROWID;

CREATE TABLE evidence(                                -- two bodies of one payer that contradict
  id INTEGER PRIMARY KEY,
  payer TEXT NOT NULL,
  lane BLOB NOT NULL,
  n INTEGER NOT NULL,
  first_body BLOB NOT NULL,
  first_signature BLOB NOT NULL,
  second_body BLOB NOT NULL,
  second_signature BLOB NOT NULL,
  at_ms INTEGER NOT NULL,
  UNIQUE (payer, lane, n, first_body, second_body)
) STRICT;

CREATE TRIGGER boot_rises BEFORE INSERT ON boot
WHEN NEW.epoch <= (SELECT max(epoch) FROM boot)
BEGIN SELECT RAISE(ABORT, 'a boot epoch never repeats'); END;
CREATE TRIGGER boot_kept BEFORE UPDATE ON boot
BEGIN SELECT RAISE(ABORT, 'boots are never changed'); END;
CREATE TRIGGER identity_follows BEFORE INSERT ON identity
WHEN NEW.n <> (SELECT coalesce(max(n), 0) + 1 FROM identity) OR (NEW.n > 1 AND NEW.proof IS NULL)
BEGIN SELECT RAISE(ABORT, 'a key follows the last one, which names it'); END;
CREATE TRIGGER identity_kept BEFORE UPDATE ON identity
BEGIN SELECT RAISE(ABORT, 'a book keeps its keys'); END;
CREATE TRIGGER identity_stays BEFORE DELETE ON identity
BEGIN SELECT RAISE(ABORT, 'a book keeps its keys'); END;
CREATE TRIGGER peer_key_follows BEFORE INSERT ON peer_key
WHEN NEW.n <> (SELECT coalesce(max(n), 1) + 1 FROM peer_key WHERE peer = NEW.peer)
BEGIN SELECT RAISE(ABORT, 'a key follows the last one'); END;
CREATE TRIGGER peer_key_kept BEFORE UPDATE ON peer_key
BEGIN SELECT RAISE(ABORT, 'a succession is never changed'); END;
CREATE TRIGGER peer_key_stays BEFORE DELETE ON peer_key
BEGIN SELECT RAISE(ABORT, 'a succession is never changed'); END;

-- Postings come first; the entry that names them closes the set and must balance.
CREATE TRIGGER posting_closed BEFORE INSERT ON posting
WHEN EXISTS (SELECT 1 FROM entry WHERE seq = NEW.seq)
BEGIN SELECT RAISE(ABORT, 'the entry is closed'); END;
CREATE TRIGGER entry_balances BEFORE INSERT ON entry
WHEN (SELECT count(*) < 2 OR sum(amount) <> 0 FROM posting WHERE seq = NEW.seq)
BEGIN SELECT RAISE(ABORT, 'an entry sums to zero'); END;
CREATE TRIGGER entry_chained BEFORE INSERT ON entry
WHEN NEW.seq <> (SELECT coalesce(max(seq), 0) + 1 FROM entry)
  OR NEW.prev <> coalesce((SELECT hash FROM entry WHERE seq = NEW.seq - 1), zeroblob(32))
BEGIN SELECT RAISE(ABORT, 'an entry follows the last one'); END;

-- Only a voucher moves what a peer owes. A correction of mine says how much of that I count on, or
-- what a transfer cost me: two legs, the cost and what it is for, and a reason.
CREATE TRIGGER correction_shaped BEFORE INSERT ON entry
WHEN (NEW.lane = x'') <> (NEW.kind IN ('write-off', 'write-back', 'release'))
  OR NEW.lane = x'' AND (NEW.n <> 0 OR NOT EXISTS (SELECT 1 FROM memo WHERE hash = NEW.body_hash)
    OR (SELECT count(*) <> 2 FROM posting WHERE seq = NEW.seq)
    OR NOT EXISTS (SELECT 1 FROM posting w JOIN posting a ON a.seq = w.seq
      AND a.attempt IS w.attempt
      WHERE w.seq = NEW.seq AND w.account = 'writeoff' AND (w.amount < 0) = (NEW.kind = 'write-back')
        AND (a.account = 'doubtful' AND a.attempt IS NULL AND NEW.kind <> 'release'
          OR a.account = 'routed' AND length(a.attempt) = 16 AND NEW.kind <> 'write-off')))
BEGIN SELECT RAISE(ABORT, 'a correction moves a doubt or a transfer against its cost'); END;
-- No more is written off than is owed, and no more written back than was written off.
CREATE TRIGGER doubt_bounded BEFORE INSERT ON entry
WHEN NEW.lane = x'' AND EXISTS (SELECT 1 FROM posting WHERE seq = NEW.seq AND account = 'doubtful')
  AND (SELECT -sum(amount) FROM posting WHERE seq = NEW.seq AND account = 'doubtful')
    + (SELECT -coalesce(sum(p.amount), 0) FROM entry e CROSS JOIN posting p ON p.seq = e.seq
      WHERE e.peer = NEW.peer AND e.lane = x'' AND p.account = 'doubtful')
    NOT BETWEEN 0 AND CASE NEW.kind WHEN 'write-back' THEN 9007199254740991
      ELSE max(0, coalesce((SELECT amount FROM bal WHERE peer = NEW.peer), 0)) END
BEGIN SELECT RAISE(ABORT, 'no more is written off than is owed, nor written back'); END;
-- A transfer of mine that I gave up cost its amount, once; it comes back only if it was given up.
CREATE TRIGGER release_bounded BEFORE INSERT ON entry
WHEN NEW.lane = x'' AND EXISTS (SELECT 1 FROM posting p WHERE p.seq = NEW.seq
  AND p.account = 'routed' AND NOT EXISTS (SELECT 1 FROM route r JOIN item i ON i.id = r.xid
    WHERE r.xid = p.attempt AND r.amount = abs(p.amount)
      AND (r.state = 'released') = (NEW.kind = 'release')
      AND i.mine = 1 AND i.kind = 1 AND i.peer = NEW.peer AND i.amount >= r.amount
      AND (SELECT coalesce(sum(o.amount), 0) FROM entry e CROSS JOIN posting o ON o.seq = e.seq
        WHERE e.peer = NEW.peer AND e.lane = x'' AND o.account = 'writeoff' AND o.attempt = r.xid)
        = CASE NEW.kind WHEN 'release' THEN 0 ELSE r.amount END))
BEGIN SELECT RAISE(ABORT, 'no more is given up than was sent, and once'); END;
CREATE TRIGGER entry_moves_balance AFTER INSERT ON entry
BEGIN
  INSERT INTO bal(peer, amount, moved_ms)
  SELECT NEW.peer, amount, NEW.at_ms FROM posting WHERE seq = NEW.seq AND account = 'peer'
  ON CONFLICT(peer) DO UPDATE SET amount = amount + excluded.amount, moved_ms = excluded.moved_ms;
  INSERT INTO account(account, amount)
  SELECT account, sum(amount) FROM posting WHERE seq = NEW.seq GROUP BY account
  ON CONFLICT(account) DO UPDATE SET amount = amount + excluded.amount;
END;
CREATE TRIGGER entry_kept BEFORE UPDATE ON entry
BEGIN SELECT RAISE(ABORT, 'entries are never changed'); END;
CREATE TRIGGER entry_stays BEFORE DELETE ON entry
BEGIN SELECT RAISE(ABORT, 'entries are never deleted'); END;
CREATE TRIGGER posting_kept BEFORE UPDATE ON posting
BEGIN SELECT RAISE(ABORT, 'postings are never changed'); END;
CREATE TRIGGER posting_stays BEFORE DELETE ON posting
BEGIN SELECT RAISE(ABORT, 'postings are never deleted'); END;

CREATE TRIGGER memo_kept BEFORE UPDATE ON memo
BEGIN SELECT RAISE(ABORT, 'a reason is never changed'); END;
CREATE TRIGGER memo_stays BEFORE DELETE ON memo
BEGIN SELECT RAISE(ABORT, 'a reason is never deleted'); END;

CREATE TRIGGER lane_out_rises BEFORE UPDATE OF n, cum, service ON lane_out
WHEN NEW.n <= OLD.n OR NEW.cum < OLD.cum OR NEW.service < OLD.service
BEGIN SELECT RAISE(ABORT, 'a lane never goes back'); END;
CREATE TRIGGER lane_out_stays BEFORE DELETE ON lane_out
BEGIN SELECT RAISE(ABORT, 'lanes are never deleted'); END;
CREATE TRIGGER lane_in_rises BEFORE UPDATE ON lane_in
WHEN NEW.n < OLD.n OR NEW.cum < OLD.cum OR NEW.attr < OLD.attr OR NEW.sealed < OLD.sealed
  OR NEW.service < OLD.service
BEGIN SELECT RAISE(ABORT, 'a lane never goes back'); END;
CREATE TRIGGER lane_in_stays BEFORE DELETE ON lane_in
BEGIN SELECT RAISE(ABORT, 'lanes are never deleted'); END;
CREATE TRIGGER voucher_out_kept BEFORE UPDATE OF id, peer, lane, n, cum, body, signature, items
ON voucher_out
BEGIN SELECT RAISE(ABORT, 'signed bytes are never changed'); END;
-- What a later voucher says too may go; the last word on an item, and of a lane, stays, and the
-- last that was confirmed.
CREATE TRIGGER voucher_out_stays BEFORE DELETE ON voucher_out
WHEN OLD.n = (SELECT n FROM lane_out WHERE peer = OLD.peer AND lane = OLD.lane)
  OR OLD.receipt IS NOT NULL
    AND OLD.cum = (SELECT confirmed FROM lane_out WHERE peer = OLD.peer AND lane = OLD.lane)
  OR EXISTS (SELECT 1 FROM item WHERE mine = 1 AND voucher = OLD.id)
BEGIN SELECT RAISE(ABORT, 'a proof is never deleted'); END;
CREATE TRIGGER voucher_in_kept BEFORE UPDATE ON voucher_in
BEGIN SELECT RAISE(ABORT, 'signed bytes are never changed'); END;
CREATE TRIGGER voucher_in_stays BEFORE DELETE ON voucher_in
WHEN OLD.n = (SELECT n FROM lane_in WHERE peer = OLD.peer AND lane = OLD.lane)
  OR EXISTS (SELECT 1 FROM item WHERE mine = 0 AND voucher = OLD.id)
BEGIN SELECT RAISE(ABORT, 'a proof is never deleted'); END;
CREATE TRIGGER item_rises BEFORE UPDATE ON item
WHEN NEW.amount < OLD.amount OR NEW.last_n < OLD.last_n OR NEW.final < OLD.final
  OR NEW.lane <> OLD.lane OR (NEW.last_n = OLD.last_n) <> (NEW.voucher = OLD.voucher)
BEGIN SELECT RAISE(ABORT, 'an item never goes back'); END;
CREATE TRIGGER paid_rises BEFORE UPDATE OF paid ON peer WHEN NEW.paid < OLD.paid
BEGIN SELECT RAISE(ABORT, 'what was paid stays paid'); END;

CREATE TRIGGER item_stays BEFORE DELETE ON item
BEGIN SELECT RAISE(ABORT, 'an item is never deleted'); END;

-- An end of a transfer is final; only one that its owner gave up may still come to another.
CREATE TRIGGER route_begins BEFORE INSERT ON route WHEN NEW.state <> 'open'
BEGIN SELECT RAISE(ABORT, 'a transfer begins open'); END;
CREATE TRIGGER route_ends BEFORE UPDATE ON route
WHEN NEW.xid <> OLD.xid OR NEW.amount <> OLD.amount OR NEW.ring <> OLD.ring
  OR OLD.state IN ('closed', 'refunded') OR (OLD.state = 'released' AND NEW.state = 'open')
BEGIN SELECT RAISE(ABORT, 'a transfer ends once'); END;
CREATE TRIGGER route_stays BEFORE DELETE ON route
BEGIN SELECT RAISE(ABORT, 'a transfer is never deleted'); END;
CREATE TRIGGER route_frees AFTER UPDATE OF state ON route WHEN NEW.state <> 'open'
BEGIN DELETE FROM route_hop WHERE xid = NEW.xid; END;
CREATE TRIGGER transfer_moves BEFORE UPDATE ON transfer
WHEN NEW.xid <> OLD.xid OR NEW.previous <> OLD.previous OR NEW.amount <> OLD.amount
  OR NOT ((OLD.state = 'waiting' AND NEW.state IN ('forwarded', 'refunded'))
    OR (OLD.state = 'forwarded' AND NEW.state IN ('returning', 'returned'))
    OR (OLD.state = 'returning' AND NEW.state = 'returned'))
BEGIN SELECT RAISE(ABORT, 'a transfer goes on, or back, once'); END;
CREATE TRIGGER transfer_stays BEFORE DELETE ON transfer
BEGIN SELECT RAISE(ABORT, 'a transfer is never deleted'); END;

CREATE TRIGGER favour_counts AFTER INSERT ON favour
BEGIN
  INSERT INTO favour_sum VALUES (NEW.mine, NEW.peer, NEW.worth)
  ON CONFLICT DO UPDATE SET worth = worth + excluded.worth;
END;
CREATE TRIGGER favour_once BEFORE INSERT ON favour
WHEN EXISTS (SELECT 1 FROM favour
  WHERE mine = NEW.mine AND peer = NEW.peer AND attempt = NEW.attempt)
BEGIN SELECT RAISE(IGNORE); END;
CREATE TRIGGER favour_kept BEFORE UPDATE ON favour
BEGIN SELECT RAISE(ABORT, 'a favour is never changed'); END;
CREATE TRIGGER favour_stays BEFORE DELETE ON favour
BEGIN SELECT RAISE(ABORT, 'a favour is never deleted'); END;
CREATE TRIGGER evidence_kept BEFORE UPDATE ON evidence
BEGIN SELECT RAISE(ABORT, 'a proof is never changed'); END;
CREATE TRIGGER evidence_stays BEFORE DELETE ON evidence
BEGIN SELECT RAISE(ABORT, 'a proof is never deleted'); END;
