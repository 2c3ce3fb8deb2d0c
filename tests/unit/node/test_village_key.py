"""The key file of a private village, and the cipher that it is for."""

from __future__ import annotations

import pathlib

import nacl.secret
import pytest

from aivillage.node import village_key
from aivillage.node.transport.psk import hsalsa20, xsalsa20
from aivillage.protocols.errors import ConfigError, RequestError

KEY = bytes(range(32))
KNOWN = "6189c5cf0b87fb800c1a9feeda73c6ab5e998db48fb9e6a978575c770ceef683"


def test_the_file_is_the_swarm_key_of_other_programs():
    text = f"/key/swarm/psk/1.0.0/\n/base16/\n{KNOWN}"
    assert village_key.from_text(text) == bytes.fromhex(KNOWN)
    assert village_key.to_text(bytes.fromhex(KNOWN)) == text + "\n"
    other = "/key/swarm/psk/1.0.0/\r\n/base64/\r\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\r\n"
    assert village_key.from_text(other) == KEY


def test_the_fingerprint_is_the_one_that_go_and_rust_print():
    assert village_key.fingerprint(bytes.fromhex(KNOWN)) == "45fc986bbc9388a11d939df26f730f0c"


@pytest.mark.parametrize(
    "text",
    [
        "",
        KNOWN,
        f"/key/swarm/psk/2.0.0/\n/base16/\n{KNOWN}",
        f"/key/swarm/psk/1.0.0/\n/bin/\n{KNOWN}",
        f"/key/swarm/psk/1.0.0/\n/base16/\n{KNOWN[2:]}",
        f"/key/swarm/psk/1.0.0/\n/base16/\n{KNOWN}00",
        f"/key/swarm/psk/1.0.0/\n/base16/\n{KNOWN[:-1]}g",
        f"/key/swarm/psk/1.0.0/\n/base64/\n{KNOWN[:-1]}",
        f"/key/swarm/psk/1.0.0/\n/base16/\n{KNOWN}\nmore",
    ],
)
def test_what_is_no_key_is_refused_with_a_next_step(text):
    with pytest.raises(RequestError) as caught:
        village_key.from_text(text)
    assert (caught.value.code, bool(caught.value.next_step)) == ("BAD_REQUEST", True)
    assert KNOWN[4:40] not in str(caught.value)


def test_a_text_is_read_up_to_its_limit_and_not_beyond():
    whole = village_key.to_text(KEY)
    padded = whole + "\n" * (village_key.TEXT_CHARACTERS_MAX - len(whole))
    assert village_key.from_text(padded) == KEY
    with pytest.raises(RequestError):
        village_key.from_text(padded + "\n")


def test_the_key_is_kept_for_the_owner_alone_and_a_former_one_beside_it(tmp_path):
    assert village_key.load(tmp_path) is None
    village_key.store(tmp_path, KEY)
    path = tmp_path / village_key.KEY_FILE
    assert path.stat().st_mode & 0o777 == 0o600
    assert village_key.load(tmp_path) == KEY
    village_key.store(tmp_path, KEY)
    assert list(tmp_path.iterdir()) == [path]
    village_key.store(tmp_path, KEY[::-1])
    village_key.store(tmp_path, None)
    assert village_key.load(tmp_path) is None
    kept = {file.read_text() for file in tmp_path.glob("village-????????.old")}
    assert kept == {village_key.to_text(KEY), village_key.to_text(KEY[::-1])}


def test_a_change_of_keys_that_is_cut_off_leaves_the_former_one(tmp_path, monkeypatch):
    """Without a key in its folder a node would start open."""

    def cut_off(*_args):
        raise OSError(28, "No space left on device")

    village_key.store(tmp_path, KEY)
    monkeypatch.setattr(pathlib.Path, "replace", cut_off)
    with pytest.raises(ConfigError, match="cannot be written"):
        village_key.store(tmp_path, KEY[::-1])
    assert village_key.load(tmp_path) == KEY
    monkeypatch.undo()
    village_key.store(tmp_path, KEY[::-1])
    assert village_key.load(tmp_path) == KEY[::-1]


def test_a_key_that_others_can_read_or_that_is_none_stops_the_node(tmp_path):
    village_key.store(tmp_path, KEY)
    path = tmp_path / village_key.KEY_FILE
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="others can read"):
        village_key.load(tmp_path)
    path.chmod(0o600)
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="no village key"):
        village_key.load(tmp_path)


def test_the_cipher_is_xsalsa20_by_its_published_vector_and_by_libsodium():
    # Source: NaCl, tests/core1.c and tests/stream3.c.
    key = bytes.fromhex("1b27556473e985d462cd51197a9a46c76009549eac6474f206c4ee0844f68389")
    nonce = bytes.fromhex("69696ee955b62b73cd62bda875fc73d68219e0036b7a0b37")
    second = "dc908dda0b9344a953629b733820778880f3ceb421bb61b91cbd4c3e66256ce4"
    assert hsalsa20(key, nonce[:16]).hex() == second
    begins = "eea6a7251c1e72916d11c2cb214d3c252539121d8e234e652d651fa4c8cff880"
    assert xsalsa20(key, nonce).encrypt(bytes(32)).hex() == begins
    said = bytes(range(256)) * 300
    box = (
        nacl.secret.SecretBox(key).encrypt(said, nonce).ciphertext
    )  # 32 bytes of stream are its tag's
    mine = xsalsa20(key, nonce)
    pieces = [mine.encrypt(piece) for piece in (bytes(32), said[:1], said[1:70_000], said[70_000:])]
    assert b"".join(pieces[1:]) == box[16:]
