"""A node that keeps what it should pass on: the product, and one function of its book replaced.

    python -m tests.integration.denying_node start --data-dir FOLDER

It books every transfer that comes and gives a receipt, and neither pays the next nor gives back.
"""

from __future__ import annotations

import sys
from typing import Any

from aivillage.cli.main import main
from aivillage.ledger import transfers


def keep_it(*_book_and_reach: Any) -> list[transfers.Sent]:
    """In place of `transfers.advance`: nothing is passed on, and nothing goes back."""
    return []


if __name__ == "__main__":
    transfers.advance = keep_it
    sys.exit(main())
