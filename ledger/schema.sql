-- The book of one node. Amounts are micro-credits. What may never change, cannot: by trigger.

CREATE TABLE identity(
  id INTEGER PRIMARY KEY CHECK (id = 1),
  public_key BLOB NOT NULL CHECK (length(public_key) = 32),
  created_ms INTEGER NOT NULL
) STRICT;

CREATE TABLE boot(
  epoch INTEGER PRIMARY KEY,
  lane BLOB NOT NULL CHECK (length(lane) = 16)       -- of every voucher signed in this boot
) STRICT;

-- One row per peer. `reserved`, `paid`, `written_off` are D_reserved, P and F of the exposure
-- inequality; `arrears` is what I paid it on claims.
CREATE TABLE peer(
  peer TEXT PRIMARY KEY,
  known INTEGER NOT NULL DEFAULT 0,
  line INTEGER NOT NULL DEFAULT 0 CHECK (line BETWEEN 0 AND 9007199254740991),
  exposure INTEGER NOT NULL DEFAULT 0 CHECK (exposure BETWEEN 0 AND 9007199254740991),
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

CREATE TABLE bal(                                     -- what the peer owes me; follows the entries
  peer TEXT PRIMARY KEY,
  amount INTEGER NOT NULL CHECK (abs(amount) <= 9007199254740991)
) STRICT;

CREATE TABLE entry(
  seq INTEGER PRIMARY KEY,
  at_ms INTEGER NOT NULL,
  kind TEXT NOT NULL CHECK (kind IN ('pay', 'receive', 'recover-pay', 'recover-receive')),
  peer TEXT NOT NULL,
  lane BLOB NOT NULL,
  n INTEGER NOT NULL,
  body_hash BLOB NOT NULL,
  prev BLOB NOT NULL,
  hash BLOB NOT NULL UNIQUE
) STRICT;
CREATE INDEX entry_peer ON entry(peer, seq);

CREATE TABLE posting(
  seq INTEGER NOT NULL REFERENCES entry(seq) DEFERRABLE INITIALLY DEFERRED,
  leg INTEGER NOT NULL,
  account TEXT NOT NULL CHECK (account IN ('peer', 'earned', 'spent', 'unlabelled')),
  attempt BLOB,
  amount INTEGER NOT NULL CHECK (amount <> 0),
  PRIMARY KEY (seq, leg)
) STRICT, WITHOUT ROWID;

CREATE TABLE lane_out(
  peer TEXT NOT NULL,
  lane BLOB NOT NULL,
  n INTEGER NOT NULL CHECK (n >= 1),
  cum INTEGER NOT NULL CHECK (cum BETWEEN 0 AND 9007199254740991),
  PRIMARY KEY (peer, lane)
) STRICT, WITHOUT ROWID;

CREATE TABLE voucher_out(
  peer TEXT NOT NULL,
  lane BLOB NOT NULL,
  n INTEGER NOT NULL,
  cum INTEGER NOT NULL,
  body BLOB NOT NULL,
  signature BLOB NOT NULL,
  items BLOB NOT NULL,
  receipt INTEGER REFERENCES receipt(id),
  attest INTEGER,
  PRIMARY KEY (peer, lane, n)
) STRICT;

CREATE INDEX voucher_out_open ON voucher_out(peer, lane, n) WHERE receipt IS NULL;

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
  count INTEGER NOT NULL,
  sealed INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (peer, lane)
) STRICT, WITHOUT ROWID;

CREATE TABLE voucher_in(
  peer TEXT NOT NULL,
  lane BLOB NOT NULL,
  n INTEGER NOT NULL,
  cum INTEGER NOT NULL,
  body BLOB NOT NULL,
  signature BLOB NOT NULL,
  items BLOB NOT NULL,
  attest INTEGER NOT NULL,
  PRIMARY KEY (peer, lane, n)
) STRICT;

-- `amount` is cumulative; an id lives on one lane. `mine`: I am the payer.
CREATE TABLE item(
  mine INTEGER NOT NULL,
  peer TEXT NOT NULL,
  kind INTEGER NOT NULL,
  id BLOB NOT NULL,
  lane BLOB NOT NULL,
  amount INTEGER NOT NULL CHECK (amount BETWEEN 0 AND 9007199254740991),
  last_n INTEGER NOT NULL,
  final INTEGER NOT NULL,
  PRIMARY KEY (mine, peer, kind, id)
) STRICT, WITHOUT ROWID;
CREATE INDEX item_lane ON item(mine, peer, lane, last_n);

CREATE TABLE intent(                                  -- what I asked for and may owe after a crash
  peer TEXT NOT NULL,
  attempt BLOB NOT NULL,
  quote_hash BLOB NOT NULL,
  ceiling INTEGER NOT NULL,
  PRIMARY KEY (peer, attempt)
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
CREATE TRIGGER identity_kept BEFORE UPDATE ON identity
BEGIN SELECT RAISE(ABORT, 'a book keeps its key'); END;

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
CREATE TRIGGER entry_moves_balance AFTER INSERT ON entry
BEGIN
  INSERT INTO bal(peer, amount)
  SELECT NEW.peer, amount FROM posting WHERE seq = NEW.seq AND account = 'peer'
  ON CONFLICT(peer) DO UPDATE SET amount = amount + excluded.amount;
END;
CREATE TRIGGER entry_kept BEFORE UPDATE ON entry
BEGIN SELECT RAISE(ABORT, 'entries are never changed'); END;
CREATE TRIGGER entry_stays BEFORE DELETE ON entry
BEGIN SELECT RAISE(ABORT, 'entries are never deleted'); END;
CREATE TRIGGER posting_kept BEFORE UPDATE ON posting
BEGIN SELECT RAISE(ABORT, 'postings are never changed'); END;
CREATE TRIGGER posting_stays BEFORE DELETE ON posting
BEGIN SELECT RAISE(ABORT, 'postings are never deleted'); END;

CREATE TRIGGER lane_out_rises BEFORE UPDATE ON lane_out
WHEN NEW.n <= OLD.n OR NEW.cum < OLD.cum
BEGIN SELECT RAISE(ABORT, 'a lane never goes back'); END;
CREATE TRIGGER lane_out_stays BEFORE DELETE ON lane_out
BEGIN SELECT RAISE(ABORT, 'lanes are never deleted'); END;
CREATE TRIGGER lane_in_rises BEFORE UPDATE ON lane_in
WHEN NEW.n < OLD.n OR NEW.cum < OLD.cum OR NEW.attr < OLD.attr OR NEW.sealed < OLD.sealed
BEGIN SELECT RAISE(ABORT, 'a lane never goes back'); END;
CREATE TRIGGER lane_in_stays BEFORE DELETE ON lane_in
BEGIN SELECT RAISE(ABORT, 'lanes are never deleted'); END;
CREATE TRIGGER voucher_out_kept BEFORE UPDATE OF peer, lane, n, cum, body, signature, items
ON voucher_out
BEGIN SELECT RAISE(ABORT, 'signed bytes are never changed'); END;
CREATE TRIGGER voucher_out_stays BEFORE DELETE ON voucher_out
BEGIN SELECT RAISE(ABORT, 'signed bytes are never deleted'); END;
CREATE TRIGGER voucher_in_kept BEFORE UPDATE ON voucher_in
BEGIN SELECT RAISE(ABORT, 'signed bytes are never changed'); END;
CREATE TRIGGER voucher_in_stays BEFORE DELETE ON voucher_in
BEGIN SELECT RAISE(ABORT, 'signed bytes are never deleted'); END;
CREATE TRIGGER item_rises BEFORE UPDATE ON item
WHEN NEW.amount < OLD.amount OR NEW.last_n < OLD.last_n OR NEW.final < OLD.final
  OR NEW.lane <> OLD.lane
BEGIN SELECT RAISE(ABORT, 'an item never goes back'); END;
CREATE TRIGGER paid_rises BEFORE UPDATE OF paid ON peer WHEN NEW.paid < OLD.paid
BEGIN SELECT RAISE(ABORT, 'what was paid stays paid'); END;
