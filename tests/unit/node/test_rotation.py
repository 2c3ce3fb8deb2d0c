"""A new key for a node: wherever it is cut off, the node that is left opens its book."""

import os
import stat
from pathlib import Path

import pytest
import trio

from aivillage.ledger import books
from aivillage.ledger.ledger import open_ledger
from aivillage.node import identity, lock, rotation, village
from aivillage.node.identity import peer_of
from aivillage.node.jobs import open_jobs
from aivillage.node.paths import Paths
from aivillage.protocols import succession
from aivillage.protocols.errors import ConfigError


class Cut(BaseException):
    """The process ends here."""


def places(folder):
    return Paths(folder, folder / "s", folder / "cache")


async def names(where):
    async with open_ledger(where.ledger, identity.load(where.data_dir)) as book:
        return book.names, book.proofs


async def test_the_node_goes_by_the_new_key_and_its_book_proves_it(tmp_path):
    where = places(tmp_path)
    first = peer_of(identity.create(tmp_path))
    old, new = await rotation.rotate(where)
    assert old == first != new == peer_of(identity.load(tmp_path))
    found, (proof,) = await names(where)
    assert found == (new, first)
    assert succession.read(proof)[:2] == (first, new)
    kept = tmp_path / f"identity-{first[-8:]}.old"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert peer_of(identity.load(tmp_path, kept.name)) == first
    assert not identity.exists(tmp_path, identity.NEXT_FILE)
    _, third = await rotation.rotate(where)
    found, proofs = await names(where)
    assert found == (third, new, first)
    assert [step.old for step in succession.chain(proofs, third)] == [first, new]


async def test_a_running_node_keeps_its_key(tmp_path):
    identity.create(tmp_path)
    with lock.held(tmp_path), pytest.raises(ConfigError, match="running"):
        await rotation.rotate(places(tmp_path))


POINTS = {
    "next key": (identity, "_write_whole", False),
    "succession": (succession, "make", False),
    "book": (books, "add_own_key", False),
    "end": (rotation, "_finish", True),
    "certificate": (rotation, "_vouch", True),
    "old key aside": (os, "link", True),
    "key": (Path, "replace", True),
}
"""Step -> where it is, and whether the book has the new key when it begins."""


def cut_at(real, *, after, is_async, cuts):
    """`real`, which the process does not survive: not its beginning, or not its end."""

    async def ends_later(*args):
        cuts.append(args)
        if after:
            await real(*args)
        raise Cut

    def ends(*args, **options):
        if cuts or (real.__name__ == "link" and "identity-" not in str(args[1])):
            return real(*args, **options)
        cuts.append(args)
        if after:
            real(*args, **options)
        raise Cut

    return ends_later if is_async else ends


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("after", [False, True])
async def test_a_rotation_that_is_cut_off_leaves_a_node(tmp_path, monkeypatch, point, after):
    paths, first = places(tmp_path), peer_of(identity.create(tmp_path))
    (where, name, changed), cuts = POINTS[point], []
    real = getattr(where, name)
    with monkeypatch.context() as patched:
        is_async = where is rotation
        patched.setattr(where, name, cut_at(real, after=after, is_async=is_async, cuts=cuts))
        with pytest.raises(BaseException) as ended:  # noqa: PT011  Cut, maybe in a nursery's group
            await rotation.rotate(paths)
    assert "Cut" in repr(ended.value)
    assert len(cuts) == 1
    await rotation.settle(paths)
    found, _ = await names(paths)
    assert found[-1] == first
    assert len(found) == (2 if changed else 1)
    assert not identity.exists(tmp_path, identity.NEXT_FILE)
    await rotation.rotate(paths)  # and it can be done again
    again, _ = await names(paths)
    assert again[1:] == found


async def test_a_founders_next_key_is_certified_by_the_one_before(tmp_path):
    where, first = places(tmp_path), peer_of(identity.create(tmp_path))
    home = village.village_of(first)
    for _ in range(2):
        _, new = await rotation.rotate(where)
        async with open_jobs(where.jobs) as jobs:
            papers = await jobs.certificates(home)
        assert village.membership(papers, [new], home, 2**50) is not None
    assert len(papers) == 2


async def test_a_guests_next_key_is_certified_by_nobody(tmp_path):
    where = places(tmp_path)
    identity.create(tmp_path)
    async with open_jobs(where.jobs) as jobs:
        await jobs.set_setting("village", bytes(32))
    await rotation.rotate(where)
    async with open_jobs(where.jobs) as jobs:
        assert not await jobs.certificates(bytes(32))
        assert not await jobs.certificates(village.village_of((await names(where))[0][-1]))


def test_the_command_says_who_the_node_is_now(tmp_path, capsys):
    from aivillage.cli.main import main

    first = peer_of(identity.create(tmp_path))
    assert main(["rotate-key", "--data-dir", str(tmp_path)]) == 0
    new = peer_of(identity.load(tmp_path))
    assert new != first
    assert new in capsys.readouterr().out
    assert trio.run(names, places(tmp_path))[0] == (new, first)
