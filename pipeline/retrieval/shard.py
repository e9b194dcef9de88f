"""One shard of the corpus: everything item-side, computed once. N items, X components of width D, P pairs, R rank."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.model.model import RetrievalModel
from pipeline.model.mol import ItemSide

# Items that are projected at once. Every tile has this size (the last one is padded): a matrix product of another
# shape may differ in its last bits, and an item's vectors must not depend on how the corpus is cut.
ITEM_TILE = 1_024


@dataclass(frozen=True)
class Shard:
    """Items `first_row` to `first_row + N` of the item index.

    `items` holds components (N, X, D) and item gates (N, P); `mean_ND` is the mean over an item's X components, the
    item side of TopKAvg's stage 1, `low_rank_NR` that of TopKLowRank (R = 0 where none was fitted).
    """

    first_row: int
    items: ItemSide
    mean_ND: Tensor
    low_rank_NR: Tensor

    def __len__(self) -> int:
        return int(self.mean_ND.shape[0])

    def to(self, device: torch.device | str) -> "Shard":
        """The same shard on a device."""
        return Shard(self.first_row, self.items.to(device), self.mean_ND.to(device), self.low_rank_NR.to(device))


def make_shard(first_row: int, items: ItemSide, low_rank_NR: Tensor | None = None) -> Shard:
    """Make a shard of these items; its low-rank table has rank 0 when none is given."""
    mean_ND = items.components_NXD.mean(dim=-2)
    if low_rank_NR is None:
        low_rank_NR = mean_ND[:, :0]
    return Shard(first_row, items, mean_ND, low_rank_NR)


def shard_bounds(num_items: int, num_shards: int) -> list[tuple[int, int]]:
    """First and last row (exclusive) of each logical shard: contiguous, sizes differing by at most one."""
    return [(s * num_items // num_shards, (s + 1) * num_items // num_shards) for s in range(num_shards)]


@torch.inference_mode()
def embed_rows(model: RetrievalModel, rows_N: Tensor) -> ItemSide:
    """The item side of the given item rows, computed in tiles of one shape."""
    tiles = []
    for low in range(0, max(1, len(rows_N)), ITEM_TILE):  # an empty shard too needs its shapes
        part = rows_N[low : low + ITEM_TILE]
        tiles.append(model.item_side(pad(part, (0, ITEM_TILE - len(part)))).take(slice(0, len(part))))
    return ItemSide.cat(tiles)
