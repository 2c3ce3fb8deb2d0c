"""The kill test in short."""

import pytest

from tests.integration import ledger_kills


@pytest.mark.slow
def test_five_kills_lose_no_money():
    result = ledger_kills.run(kills=5, seed=7)
    assert result["ok"], result
