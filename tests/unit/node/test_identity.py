"""The key file: who a node is, kept from others and from accidents."""

import stat

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

from aivillage.ledger.ledger import open_ledger
from aivillage.node import identity
from aivillage.protocols.errors import ConfigError


def test_a_new_key_is_readable_by_its_owner_only_and_loads_again(tmp_path):
    key = identity.create(tmp_path / "node")
    path = tmp_path / "node" / identity.KEY_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert identity.peer_of(identity.load(tmp_path / "node")) == identity.peer_of(key)
    assert [p.name for p in path.parent.iterdir()] == [identity.KEY_FILE]


def test_a_key_is_never_overwritten(tmp_path):
    first = identity.create(tmp_path)
    with pytest.raises(ConfigError, match="exists already"):
        identity.create(tmp_path)
    assert identity.peer_of(identity.load(tmp_path)) == identity.peer_of(first)
    assert [p.name for p in tmp_path.iterdir()] == [identity.KEY_FILE]  # no second key lies about


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666])
def test_a_key_that_others_can_read_is_refused(tmp_path, mode):
    identity.create(tmp_path)
    (tmp_path / identity.KEY_FILE).chmod(mode)
    with pytest.raises(ConfigError, match="others can read") as caught:
        identity.load(tmp_path)
    assert "chmod 600" in caught.value.next_step


def other_kind() -> bytes:
    return generate_private_key(SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


@pytest.mark.parametrize(
    "body", [b"", b"garbage", b"\xff" * 100, b"-----BEGIN PRIVATE KEY-----\nAAAA\n", other_kind()]
)
def test_a_file_that_is_no_key_of_ours_is_refused(tmp_path, body):
    path = tmp_path / identity.KEY_FILE
    path.write_bytes(body)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="is not a"):
        identity.load(tmp_path)


def test_a_folder_without_a_node_says_how_to_make_one(tmp_path):
    assert not identity.exists(tmp_path)
    with pytest.raises(ConfigError) as caught:
        identity.load(tmp_path)
    assert caught.value.next_step == "aivillage-node init"


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot hold a key"):
        identity.create(tmp_path / "file" / "node")


async def test_a_ledger_refuses_another_identity(tmp_path):
    mine, other = identity.create(tmp_path / "a"), identity.create(tmp_path / "b")
    async with open_ledger(tmp_path / "ledger.db", mine):
        pass
    with pytest.raises(ConfigError, match="another key"):
        async with open_ledger(tmp_path / "ledger.db", other):
            pass
    async with open_ledger(tmp_path / "ledger.db", identity.load(tmp_path / "a")):
        pass
