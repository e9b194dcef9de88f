"""float32 values as two planes of 16 bits, so that bfloat16 scoring and exact scoring share one copy of a table.

The bits of a value are (high << 16) + low. `high` alone is the value rounded to bfloat16, halves away from zero; with
halves rounded to even, as usual, the difference would not fit 16 signed bits.
"""

import torch
from torch import Tensor


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """Split contiguous float32 values into the high and the low plane (int16)."""
    bits = values.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16), (bits - (high << 16)).to(torch.int16)


def join(high: Tensor, low: Tensor) -> Tensor:
    """Join the planes to the float32 values, bit for bit."""
    return ((high.int() << 16) + low.int()).view(torch.float32)


def round_to_high(values: Tensor) -> Tensor:
    """Round contiguous float32 values to those of their high plane, in float32."""
    return ((values.view(torch.int32) + 0x8000) >> 16 << 16).view(torch.float32)
