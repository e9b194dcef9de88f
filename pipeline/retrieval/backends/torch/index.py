"""The portable backend: plain PyTorch on any device. The fallback, and the oracle for the faster backends.

B queries, N items, M candidates, D width, Q/X query/item components.
"""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.data.lists import NO_ITEM
from pipeline.model.mol import MixtureOfLogits, QuerySide
from pipeline.retrieval.filters import ShardMask
from pipeline.retrieval.index import FLOAT32_ERROR, Shortlist, Table, hide_missing
from pipeline.retrieval.shard import Shard
from pipeline.retrieval.streaming import Best
from pipeline.settings import TableDtype

# Pairs whose items are gathered at once, 2 to 4 KB each.
PAIRS_PER_STEP = 32_768
# Queries and items of a scan that are scored at once; no result depends on them.
QUERY_TILE, ITEM_TILE = 64, 512
# Queries and items of one matrix product of stage 1.
STAGE1_QUERIES = 128
STAGE1_ITEMS = 8_192


class TorchIndex:
    """Implements `ShardIndex`, which documents the operations, in plain PyTorch."""

    scan_skips = False
    table_dtypes: tuple[TableDtype, ...] = ("float32",)
    product_error = 1e-6

    def __init__(self, mol: MixtureOfLogits, shard: Shard) -> None:
        self.first_row = shard.first_row
        self.num_item_components, self.temperature = mol.settings.num_item_components, mol.temperature
        self._mol, self._mol64 = mol, copy.deepcopy(mol).double()
        self._shard = shard

    def __len__(self) -> int:
        return len(self._shard)

    @property
    def scan_error(self) -> float:
        return FLOAT32_ERROR / self.temperature

    @property
    def bytes_of(self) -> Mapping[str, int]:
        items = self._shard.items
        tables = {
            "components": items.components_NXD,
            "gate": items.gate_NP,
            "mean": self._shard.mean_ND,
            "low_rank": self._shard.low_rank_NR,
        }
        return {name: table.nbytes for name, table in tables.items()}

    @torch.inference_mode()
    def preselect(self, table: Table, queries_BD: Tensor, num_kept: int, mask: ShardMask) -> Shortlist:
        rows_ND = self._table(table)

        def tile_of(queries: slice, low: int, high: int) -> Tensor:
            # Padded to one shape: a product of another shape may differ in its last bits.
            tile_BD = queries_BD[queries]
            full_BD = pad(tile_BD, (0, 0, 0, STAGE1_QUERIES - len(tile_BD)))
            return (full_BD @ rows_ND[low:high].T)[: len(tile_BD)]

        return _best(tile_of, mask, num_kept, len(self), STAGE1_QUERIES, STAGE1_ITEMS, queries_BD.device)

    @torch.inference_mode()
    def score(self, queries: QuerySide, at_BM: Tensor, is_quick: bool = False) -> Tensor:
        return _in_steps(lambda part_BM: self._pairs(queries, part_BM, torch.float32), at_BM)

    @torch.inference_mode()
    def rescore(self, queries: QuerySide, at_BM: Tensor) -> Tensor:
        return _in_steps(lambda part_BM: self._pairs(queries, part_BM, torch.float64), at_BM)

    @torch.inference_mode()
    def scan(
        self, queries: QuerySide, num_kept: int, mask: ShardMask, floor_B: Tensor, max_scored: int
    ) -> tuple[Shortlist, Tensor]:
        def tile_of(tile: slice, low: int, high: int) -> Tensor:
            scores_BN: Tensor = self._mol(queries.take(tile), self._shard.items.take(slice(low, high)))
            return scores_BN

        num_scored = min(len(self), max_scored)
        best = _best(tile_of, mask, num_kept, num_scored, QUERY_TILE, ITEM_TILE, floor_B.device)
        is_below_BM = best.scores_BM < floor_B[:, None]
        scores_BM = best.scores_BM.masked_fill(is_below_BM, -torch.inf)
        highest = -torch.inf if num_scored == len(self) else 1 / self.temperature
        return Shortlist(scores_BM, best.at_BM.masked_fill(is_below_BM, NO_ITEM)), torch.full_like(floor_B, highest)

    def _table(self, table: Table) -> Tensor:
        if table == "mean":
            return self._shard.mean_ND
        if table == "low_rank":
            return self._shard.low_rank_NR
        return self._shard.items.components_NXD[:, table]

    def _pairs(self, queries: QuerySide, at_BM: Tensor, dtype: torch.dtype) -> Tensor:
        """Score each query with its own items, gathered from the cached item side: no item is projected again."""
        items = self._shard.items.take(at_BM.clamp_min(0))
        mol = self._mol64 if dtype == torch.float64 else self._mol
        # One group per query: (B, 1, …) queries against (B, M, …) items.
        scores_BM = mol(queries.to(dtype).alone(), items.to(dtype))[:, 0]
        return hide_missing(scores_BM.float(), at_BM)


def _best(
    tile_of: Callable[[slice, int, int], Tensor],
    mask: ShardMask,
    num_kept: int,
    num_items: int,
    query_tile: int,
    item_tile: int,
    device: torch.device,
) -> Shortlist:
    """Find the best of the first `num_items`; `tile_of(queries, low, high)` scores a tile of them."""
    parts = []
    for start in range(0, len(mask), query_tile):
        queries = slice(start, min(start + query_tile, len(mask)))
        part = mask.narrow(queries.start, queries.stop)
        best = Best(len(part), num_kept, device)
        for low in range(0, num_items, item_tile):
            best.add(part.hide(tile_of(queries, low, min(low + item_tile, num_items)), low), low)
        parts.append(best.result())
    return Shortlist(torch.cat([p.scores_BM for p in parts]), torch.cat([p.at_BM for p in parts]))


def _in_steps(pairs: Callable[[Tensor], Tensor], at_BM: Tensor) -> Tensor:
    """Score the candidates with `pairs`, a bounded number at a time."""
    width = max(1, PAIRS_PER_STEP // max(1, len(at_BM)))
    steps = [pairs(at_BM[:, low : low + width]) for low in range(0, at_BM.shape[1], width)]
    return torch.cat(steps, dim=1) if steps else torch.empty(at_BM.shape, device=at_BM.device)
