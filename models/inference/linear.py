"""Matrix products whose rows do not know their neighbours.

A plain torch product gives the same row other bits when it stands among 3 or among 300: the
library below picks another kernel. Rows padded to few sizes, and weights packed once for oneDNN,
make the bits of a row depend on that row alone. `sameness.py` tests it on this very machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

ROW_SIZES: Final = (4, 8, 16, 24, 32, 40)
"""Every product has one of these row counts. Below 4 rows other kernels run, with other bits."""

Linear = Callable[[Tensor], Tensor]


def padded_rows(count: int) -> int:
    """The row count that `count` rows are computed as."""
    return next(size for size in ROW_SIZES if size >= count)


def rule(like: Tensor) -> str:
    """The name of the product kernel of weights like that one, for the kernel class."""
    return "onednn-packed" if _can_pack(like) else "mm"


def linear(weight: Tensor) -> Linear:
    """`x -> x @ weight.T` for `weight` (out, in), packed where this build of torch can."""
    if not _can_pack(weight):
        return lambda rows: torch.mm(weight, rows.T).T
    ops = torch.ops.mkldnn
    packed = ops._reorder_linear_weight(weight, ROW_SIZES[1])  # noqa: SLF001 - no public name

    def product(rows: Tensor) -> Tensor:
        result: Tensor = ops._linear_pointwise(rows, packed, None, "none", [], "")  # noqa: SLF001
        return result

    return product


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return False
    has_ops = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return has_ops and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
