"""The processes that train together."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    world_size: int = 1

    def sum_(self, values: Tensor) -> Tensor:
        """Replace `values` by their sum over all processes."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values
