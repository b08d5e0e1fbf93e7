"""What every launcher needs: block sizes, the right device, and the cast to contiguous rows."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

# Lanes of one program. Wider blocks spill: a lane keeps up to ten float64 sums.
MAX_BLOCK = 512


def block_of(n: int) -> tuple[int, int]:
    """(lanes, warps) of a program that loops over rows of n samples."""
    block = min(MAX_BLOCK, max(32, triton.next_power_of_2(n)))
    return block, max(1, block // 64)


def device_guard(t: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device current; Triton launches on the current one."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def contiguous(t: Tensor | None) -> Tensor | None:
    """Rows without gaps; a copy only where the layout asks for one."""
    return None if t is None else t.contiguous()
