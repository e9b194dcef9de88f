"""One shard of the corpus: everything item-side, computed once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.model.mol import ItemSide


@dataclass(frozen=True)
class Shard:
    """Items `first_row` to `first_row + N` of the item index.

    `items` holds components (N, X, D) and item gates (N, P); `mean_ND` is the mean over an item's X components, the
    item side of TopKAvg's stage 1; `is_eligible_N` is False where tonight's rules hide an item from all.
    """

    first_row: int
    items: ItemSide
    mean_ND: Tensor
    is_eligible_N: Tensor

    def __len__(self) -> int:
        return int(self.mean_ND.shape[0])

    def to(self, device: torch.device | str) -> "Shard":
        """The same shard on a device."""
        items = ItemSide(self.items.components_NXD.to(device), self.items.gate_NP.to(device))
        return Shard(self.first_row, items, self.mean_ND.to(device), self.is_eligible_N.to(device))


def make_shard(first_row: int, items: ItemSide) -> Shard:
    """A shard in which every item is eligible."""
    mean_ND = items.components_NXD.mean(dim=-2)
    return Shard(first_row, items, mean_ND, torch.ones(len(mean_ND), dtype=torch.bool, device=mean_ND.device))


def shard_bounds(num_items: int, num_shards: int) -> list[tuple[int, int]]:
    """First and last row (exclusive) of each logical shard: contiguous, sizes differing by at most one."""
    return [(s * num_items // num_shards, (s + 1) * num_items // num_shards) for s in range(num_shards)]
