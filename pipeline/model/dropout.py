"""Dropout from one random byte per entry: on a CPU the masks of torch's own take a fifth of a whole training step."""

import torch
from torch import Tensor


def dropout(values: Tensor, rate: float, is_training: bool) -> Tensor:
    """Zero entries with probability `rate`, rounded to 1/256, and scale the others up so that the mean stays."""
    num_dropped = round(rate * 256)
    if not is_training or num_dropped == 0:
        return values
    return values * keep_mask(values, rate).mul_(256 / (256 - num_dropped))


def keep_mask(values: Tensor, rate: float) -> Tensor:
    """1 with probability 1 - rate, rounded to 1/256, else 0; shape, type and device of `values`."""
    size = values.numel()
    noise = torch.empty((size + 7) // 8, dtype=torch.int64, device=values.device).random_(-(2**63), None)
    num_dropped = round(rate * 256)  # of the 256 values of a byte
    mask = noise.view(torch.uint8)[:size].to(values.dtype).sub_(num_dropped - 1).clamp_(0, 1)
    return mask.view(values.shape)
