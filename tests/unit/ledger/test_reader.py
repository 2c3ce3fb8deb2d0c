"""Reads without a daemon."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aivillage.ledger import reader
from aivillage.protocols.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


def test_reading_loads_no_event_loop_of_the_node_and_no_models():
    code = (
        "import sys, aivillage.ledger.reader;"
        "print([name for name in ('trio', 'torch', 'libp2p') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


def test_no_ledger_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="no ledger"):
        reader.read_balance(tmp_path / "ledger.db")


def test_another_file_is_a_config_error(tmp_path):
    path = tmp_path / "ledger.db"
    path.write_bytes(b"not a database, but long enough to be taken for one" * 50)
    with pytest.raises(ConfigError, match="cannot be read"):
        reader.read_history(path)


def test_a_book_of_another_version_says_how_to_bring_it_up_to_date(tmp_path):
    path = tmp_path / "ledger.db"
    shutil.copy(ROOT / "tests" / "data" / "ledger_v1_buyer.db", path)
    with pytest.raises(ConfigError, match="is of version 1") as caught:
        reader.read_audit(path)
    assert "start" in caught.value.next_step
