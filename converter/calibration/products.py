"""Products in bfloat16 or TF32, for what need not be exact: training and sampling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Let float32 products be taken in bfloat16 where a CPU has instructions for it, in TF32 on a GPU: much faster."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
