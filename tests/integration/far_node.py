"""A node far away: the product, whose stages hear each input, and are heard, `WAY_SECONDS` later.

    python -m tests.integration.far_node start --data-dir FOLDER

Both ways are waited for at once, before an input is read; nothing of the line itself is changed.
"""

from __future__ import annotations

import sys
from typing import Any

import trio

from aivillage.cli.main import main
from aivillage.node import inputs

WAY_SECONDS = 0.05
_near = inputs.Inputs.next


async def far(waiting: Any) -> inputs.Fed | None:
    """In place of `Inputs.next`."""
    fed = await _near(waiting)
    await trio.sleep(2 * WAY_SECONDS)
    return fed


if __name__ == "__main__":
    inputs.Inputs.next = far  # type: ignore[method-assign]
    sys.exit(main())
