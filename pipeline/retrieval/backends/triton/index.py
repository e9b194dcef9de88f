"""The GPU backend: one shard laid out for the Triton kernels. On a CPU it runs in Triton's interpreter, for tests.

B queries, N items, M candidates, Q/X query/item components, D width, R rank, P = Q·X pairs of components.
"""

import copy
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from pipeline.model.mol import MixtureOfLogits, QuerySide
from pipeline.retrieval.backends.triton.bounds import LogitBounds
from pipeline.retrieval.backends.triton.launch import allow, collect_bounded, score_above, score_pairs
from pipeline.retrieval.backends.triton.layout import lay_out_items, lay_out_queries, lay_out_weights
from pipeline.retrieval.backends.triton.select import Kept, best_products
from pipeline.retrieval.backends.triton.tables import VectorTable, component_table, quantised_table, rounded_table
from pipeline.retrieval.filters import ShardMask
from pipeline.retrieval.index import FLOAT32_ERROR, Shortlist, Table, hide_missing
from pipeline.retrieval.shard import Shard
from pipeline.settings import TableDtype

PAIRS_PER_STEP = 131_072  # pairs whose items are gathered at once for float64 scores, some 10 KB each
SCAN_ITEMS = 16_384  # items that stay in a large GPU's cache while all queries meet them


class TritonIndex:
    """Implements `ShardIndex`, which documents the operations, on the Triton kernels.

    A float32 score costs about three times a bfloat16 score, but leaves only a few candidates in doubt, and each
    candidate in doubt costs a float64 score.
    """

    scan_skips = True
    table_dtypes: tuple[TableDtype, ...] = ("bfloat16", "int8")

    def __init__(
        self,
        mol: MixtureOfLogits,
        shard: Shard,
        precision: Literal["float32", "bfloat16"] = "float32",
        low_rank_bits: Literal[8, 16] = 16,
    ) -> None:
        self.first_row = shard.first_row
        self.num_item_components, self.temperature = mol.settings.num_item_components, mol.temperature
        device = shard.mean_ND.device
        self._mol64 = copy.deepcopy(mol).double()
        self._weights32 = lay_out_weights(mol, torch.float32, device)
        self._dtype = torch.float32 if precision == "float32" else torch.bfloat16
        self._weights = lay_out_weights(mol, self._dtype, device)
        self._shape = self._weights.shape
        self._rows = lay_out_items(self._shape, shard.items)
        self._tables: dict[Table, VectorTable] = {"mean": rounded_table(shard.mean_ND)}
        if shard.low_rank_NR.shape[1]:
            lay_out = quantised_table if low_rank_bits == 8 else rounded_table
            self._tables["low_rank"] = lay_out(shard.low_rank_NR)
        self._bounds = LogitBounds.of_items(self._rows, shard.items.components_NXD, self.temperature)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def product_error(self) -> float:
        return self._bounds.product_error

    @property
    def scan_error(self) -> float:
        return FLOAT32_ERROR / self.temperature

    @property
    def bytes_of(self) -> Mapping[str, int]:
        rows = {"items": self._rows.high_NW.nbytes + self._rows.low_NW.nbytes}
        return rows | {str(name): table.vectors_N1D.nbytes for name, table in self._tables.items()}

    @torch.inference_mode()
    def preselect(self, table: Table, queries_BD: Tensor, num_kept: int, mask: ShardMask) -> Shortlist:
        if not len(mask) or not len(self):
            return _empty_shortlist(queries_BD)
        vectors = self._tables[table] if isinstance(table, str) else component_table(self._rows, table)
        queries = vectors.prepare(queries_BD)
        num_kept = min(num_kept, len(self))
        best = best_products(queries.vectors_B1D, vectors.vectors_N1D, mask, num_kept, queries.margin_B)
        return Shortlist(best.scores_BM * queries.scale_B[:, None], best.at_BM)

    @torch.inference_mode()
    def score(self, queries: QuerySide, at_BM: Tensor, is_quick: bool = False) -> Tensor:
        weights, dtype = (self._weights, self._dtype) if is_quick else (self._weights32, torch.float32)
        laid_out = lay_out_queries(self._shape, queries, self.temperature, dtype)
        return score_pairs(self._rows, weights, laid_out, at_BM.to(torch.int32).contiguous())

    @torch.inference_mode()
    def rescore(self, queries: QuerySide, at_BM: Tensor) -> Tensor:
        width = max(1, PAIRS_PER_STEP // max(1, len(at_BM)))
        side = queries.to(torch.float64).alone()
        steps = []
        for low in range(0, at_BM.shape[1], width):
            part_BM = at_BM[:, low : low + width]
            items = self._rows.take(part_BM.clamp_min(0))
            # One group per query: (B, 1, …) queries against (B, M, …) items.
            scores_BM = self._mol64(side, items.to(torch.float64))[:, 0]
            steps.append(hide_missing(scores_BM.float(), part_BM))
        return torch.cat(steps, dim=1) if steps else torch.empty(at_BM.shape, device=at_BM.device)

    @torch.inference_mode()
    def scan(
        self, queries: QuerySide, num_kept: int, mask: ShardMask, floor_B: Tensor, max_scored: int
    ) -> tuple[Shortlist, Tensor]:
        kept = Kept(len(mask), num_kept, floor_B.device)
        largest_passed_B = torch.full_like(floor_B, -torch.inf)
        if not len(mask) or not len(self):
            return kept.result(), largest_passed_B
        allowed, bounds = allow(mask, floor_B.device), self._bounds.for_queries(queries)
        laid_out = lay_out_queries(self._shape, queries, self.temperature, torch.float32)
        left_B = torch.full(floor_B.shape, max_scored, dtype=torch.int32, device=floor_B.device)
        for low in range(0, len(self), SCAN_ITEMS):
            needed_B = torch.maximum(floor_B, kept.worst_B)
            reach_B = bounds.product_that_reaches(needed_B - self.scan_error).where(left_B > 0, torch.inf)
            high = min(low + SCAN_ITEMS, len(self))
            hopeful, passed_B = collect_bounded(
                bounds.vectors_BQD, self._rows.components_NXD, allowed, reach_B, low, high
            )
            if max_scored < len(self):
                hopeful, cut_B = bounds.within(hopeful, left_B, self._rows.components_NXD)
                passed_B, left_B = torch.maximum(passed_B, cut_B), left_B - hopeful.counts_B
            largest_passed_B = torch.maximum(largest_passed_B, passed_B)
            kept.add(*score_above(self._rows, self._weights32, laid_out, hopeful, needed_B))
        return kept.result(), bounds.score_bound(largest_passed_B)


def _empty_shortlist(queries_BD: Tensor) -> Shortlist:
    empty_BM = queries_BD.new_empty(len(queries_BD), 0, dtype=torch.float32)
    return Shortlist(empty_BM, torch.empty_like(empty_BM, dtype=torch.int64))
