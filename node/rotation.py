"""A new key for a node that stands still: whatever moment it is cut off at, a node is left.

The order decides. The next key is on disk first, in a file of its own; the book's commit is the
change; only then does the file of the key follow, which `settle` does at the next start if need be.
"""

from __future__ import annotations

import os
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.ledger import books
from aivillage.ledger.opening import SystemClock, open_file, read_file
from aivillage.ledger.queries import keys
from aivillage.ledger.signing import Ed25519Signer
from aivillage.node import identity, lock, village
from aivillage.node.identity import peer_of
from aivillage.node.jobs import Jobs, open_jobs
from aivillage.node.membership import VILLAGE_SETTING
from aivillage.node.paths import Paths
from aivillage.protocols import succession
from aivillage.protocols.types import AMOUNT_MAX, PeerId, peer_id

FOR_EVER: Final = AMOUNT_MAX
"""The founder's next key is the founder as long as there is a village."""


async def rotate(paths: Paths) -> tuple[PeerId, PeerId]:
    """Gives the node in `paths` a new key; (the former id, the new one).

    Raises:
        ConfigError: the node runs, or its key or book is not usable.
    """
    with lock.held(paths.data_dir):
        await settle(paths)
        old = identity.load(paths.data_dir)
        clock = SystemClock()
        db = open_file(paths.ledger, Ed25519Signer(old), clock)
        try:
            new = identity.create(paths.data_dir, identity.NEXT_FILE)
            at_ms = clock.unix_ms()
            proof = succession.make(old, new, at_ms)
            with db:
                books.add_own_key(db, new.public_key().public_bytes_raw(), proof, at_ms)
        finally:
            db.close()
        await _finish(paths, old, new)
    return peer_of(old), peer_of(new)


async def settle(paths: Paths) -> None:
    """Ends a rotation that was cut off: forwards if the book has the next key, else not at all.

    The caller holds the folder's lock.
    """
    if not identity.exists(paths.data_dir, identity.NEXT_FILE):
        return
    new = identity.load(paths.data_dir, identity.NEXT_FILE)
    old = identity.load(paths.data_dir)
    if peer_of(new) == peer_of(old) or not _has_key(paths, new):
        identity.forget_next(paths.data_dir)
    else:
        await _finish(paths, old, new)


def _has_key(paths: Paths, key: Ed25519PrivateKey) -> bool:
    """Whether the book goes by `key`."""
    if not paths.ledger.exists():
        return False
    return read_file(paths.ledger, keys())[0] == key.public_key().public_bytes_raw()


async def _finish(paths: Paths, old: Ed25519PrivateKey, new: Ed25519PrivateKey) -> None:
    """The book has the new key; each of these steps may be done again."""
    os.umask(0o077)
    async with open_jobs(paths.jobs) as jobs:
        await _vouch(jobs, paths, old, new)
    identity.replace(paths.data_dir, peer_of(old))


async def _vouch(jobs: Jobs, paths: Paths, old: Ed25519PrivateKey, new: Ed25519PrivateKey) -> None:
    """A founder's key certifies the next one: newcomers prove themselves to others by it."""
    home = village.village_of(peer_id(read_file(paths.ledger, keys())[-1]))
    if (await jobs.setting(VILLAGE_SETTING) or home) != home:
        return
    known = await jobs.certificates(home)
    if village.membership(known, [peer_of(new)], home, 0) is None:
        paper = village.certify(
            old, home, peer_of(new), line=AMOUNT_MAX, not_after_unix_ms=FOR_EVER, may_invite=True
        )
        await jobs.add_certificates(home, (paper,))
