"""Top-k of one shard under MoL: exact, or TopKAvg (Ding & Zhai 2025, section 4). B queries, N items, M candidates.

Scores are scanned in float32 by tiles, and the survivors scored again in float64. A published score is that float64
score rounded once to float32, so it does not depend on how the corpus was cut, tiled or batched; float32 products do,
in their last bits. A scan that cannot prove that its survivors hold the true top-k is repeated with more of them.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.model.mol import ItemSide, MixtureOfLogits, QuerySide
from pipeline.retrieval.filters import Exclusions, ShardMask
from pipeline.retrieval.shard import Shard
from pipeline.retrieval.topk import NO_ITEM, TopK, concat_queries, empty_topk, merge_topk, select_topk
from pipeline.settings import SearchSettings

# Survivors of a scan beyond k. More are only needed where many scores lie within `error_bound` of the k-th.
SLACK = 28
WIDEN = 4
# Pairs whose items are gathered at once, 2 to 4 KB each.
PAIRS_PER_STEP = 32_768


class Scorer(Protocol):
    """Scores of a batch of queries over the N items of one shard; items are addressed within the shard."""

    @property
    def error_bound(self) -> float:
        """Of a float32 score against the float64 one."""

    def __len__(self) -> int:
        """Number of queries."""

    def take(self, queries: Tensor | slice) -> "Scorer":
        """The same for some of the queries."""

    def tile(self, low: int, high: int) -> Tensor:
        """(B, high - low) float32: every query against items `low` to `high`."""

    def coarse_tile(self, low: int, high: int) -> Tensor:
        """(B, high - low): the cheap score by which TopKAvg preselects."""

    def pairs(self, at_BM: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, M): each query against its own items."""


@dataclass(frozen=True)
class MolScorer:
    """Scores by Mixture-of-Logits from the shard's cached item side; no item is ever projected again."""

    mol: MixtureOfLogits
    mol64: MixtureOfLogits
    queries: QuerySide
    shard: Shard

    @property
    def error_bound(self) -> float:
        # Scores lie within ±1/τ; the test of this bound measures the error over gates of many kinds.
        return 1e-5 / self.mol.temperature

    def __len__(self) -> int:
        return int(self.queries.gate_BP.shape[0])

    def take(self, queries: Tensor | slice) -> "MolScorer":
        return MolScorer(self.mol, self.mol64, self.queries.take(queries), self.shard)

    def tile(self, low: int, high: int) -> Tensor:
        scores_BN: Tensor = self.mol(self.queries, self.shard.items.take(slice(low, high)))
        return scores_BN

    def coarse_tile(self, low: int, high: int) -> Tensor:
        # mean over p of <f_i, g_j> = <mean f, mean g>: one dot product of width D.
        return self.queries.mean_BD @ self.shard.mean_ND[low:high].T

    def pairs(self, at_BM: Tensor, dtype: torch.dtype) -> Tensor:
        items = self.shard.items.take(at_BM)
        # One group per query: (B, 1, …) queries against (B, M, …) items.
        queries = QuerySide(self.queries.components_BQD.to(dtype)[:, None], self.queries.gate_BP.to(dtype)[:, None])
        mol = self.mol64 if dtype == torch.float64 else self.mol
        scores_BM: Tensor = mol(queries, ItemSide(items.components_NXD.to(dtype), items.gate_NP.to(dtype)))[:, 0]
        return scores_BM


@dataclass(frozen=True)
class PopularityScorer:
    """The same order for everybody: more events first, ties by row. The baseline beside the model."""

    scores_N: Tensor
    num_queries: int
    error_bound: float = 0.0

    @classmethod
    def from_counts(cls, counts_N: Tensor, num_queries: int) -> "PopularityScorer":
        """Scores N, N - 1, … by falling count: without ties, and exact in float32 up to 16 million items."""
        order_N = counts_N.argsort(descending=True, stable=True)
        scores_N = torch.empty(len(counts_N), dtype=torch.float32)
        scores_N[order_N] = torch.arange(len(counts_N), 0, -1, dtype=torch.float32)
        return cls(scores_N, num_queries)

    def __len__(self) -> int:
        return self.num_queries

    def take(self, queries: Tensor | slice) -> "PopularityScorer":
        return PopularityScorer(self.scores_N, len(torch.arange(self.num_queries)[queries]))

    def tile(self, low: int, high: int) -> Tensor:
        return self.scores_N[low:high].repeat(self.num_queries, 1)

    def coarse_tile(self, low: int, high: int) -> Tensor:
        return self.tile(low, high)

    def pairs(self, at_BM: Tensor, dtype: torch.dtype) -> Tensor:
        return self.scores_N[at_BM].to(dtype)


@torch.inference_mode()
def search_shard(
    mol: MixtureOfLogits,
    queries: QuerySide,
    shard: Shard,
    excluded: Exclusions,
    settings: SearchSettings,
    running: TopK | None = None,
) -> TopK:
    """Improve each query's running top-k with the best eligible, not excluded items of one shard.

    Shapes: queries (B, Q, D) and (B, P), shard (N, …); returns (B, k). Every score is the exact MoL score of its
    pair. `running` must come from other shards. Memory is bounded by query_tile × item_tile, never by B × N.
    """
    scorer = MolScorer(mol, copy.deepcopy(mol).double(), queries, shard)
    return search_items(scorer, shard.first_row, shard.is_eligible_N, excluded, settings, running)


@torch.inference_mode()
def search_items(
    scorer: Scorer,
    first_row: int,
    is_eligible_N: Tensor,
    excluded: Exclusions,
    settings: SearchSettings,
    running: TopK | None = None,
) -> TopK:
    """`search_shard` for any scorer."""
    if len(excluded) != len(scorer):
        raise ValueError(f"{len(excluded)} exclusion lists for {len(scorer)} queries")
    if running is None:
        running = empty_topk(len(scorer), settings.k, is_eligible_N.device)
    if not len(scorer) or not len(is_eligible_N):
        return running
    parts = []
    for start in range(0, len(scorer), settings.query_tile):
        tile = slice(start, min(start + settings.query_tile, len(scorer)))
        mask = ShardMask(is_eligible_N, first_row, excluded.narrow(tile.start, tile.stop))
        so_far = running.take(tile)
        found = _search(scorer.take(tile), mask, so_far, settings, settings.k + SLACK)
        rows_BK = torch.where(found.rows_BK == NO_ITEM, NO_ITEM, found.rows_BK + first_row)
        parts.append(merge_topk(so_far, TopK(found.scores_BK, rows_BK), settings.k))
    return concat_queries(parts)


def _search(scorer: Scorer, mask: ShardMask, running: TopK, settings: SearchSettings, num_kept: int) -> TopK:
    """The k best of one shard for one tile of queries; rows within the shard.

    What the scan left out scores at most the last survivor's float32 score plus the error bound. Where the k-th
    float64 score found here or before is above that, the result is proven; the other queries are scanned again.
    """
    scores_BM, at_BM = _shortlist(scorer, mask, settings, num_kept)
    found = _rescore(scorer, scores_BM, at_BM, running, settings.k)
    if scores_BM.shape[1] < num_kept:
        return found  # nothing was left out
    beyond_B = scores_BM[:, -1] + scorer.error_bound
    threshold_B = torch.maximum(found.scores_BK[:, -1], running.scores_BK[:, -1])
    open_queries = ((beyond_B >= threshold_B) & (scores_BM[:, -1] > -torch.inf)).nonzero()[:, 0]
    if not len(open_queries):
        return found
    again = _search(
        scorer.take(open_queries), mask.take(open_queries), running.take(open_queries), settings, num_kept * WIDEN
    )
    scores_BK = found.scores_BK.index_copy(0, open_queries, again.scores_BK)
    return TopK(scores_BK, found.rows_BK.index_copy(0, open_queries, again.rows_BK))


def _shortlist(scorer: Scorer, mask: ShardMask, settings: SearchSettings, num_kept: int) -> tuple[Tensor, Tensor]:
    """The best by float32 score, descending: (B, M) scores and items, M = min(num_kept, all there are)."""
    if settings.method == "exact":
        return _scan(scorer.tile, mask, num_kept, settings.item_tile)
    coarse_BM, at_BM = _scan(scorer.coarse_tile, mask, settings.num_preselected, settings.item_tile)
    fine_BM = _in_steps(scorer, at_BM, torch.float32).masked_fill(coarse_BM == -torch.inf, -torch.inf)
    scores_BM, best_BM = fine_BM.topk(min(num_kept, fine_BM.shape[1]), dim=1)
    return scores_BM, at_BM.gather(1, best_BM)


def _scan(
    tile_of: Callable[[int, int], Tensor], mask: ShardMask, num_kept: int, item_tile: int
) -> tuple[Tensor, Tensor]:
    """The `num_kept` best of all items by their tile scores, in descending order."""
    scores_BM, at_BM = torch.empty(0), torch.empty(0)
    for low in range(0, mask.num_items, item_tile):
        tile_BN = mask.hide(tile_of(low, min(low + item_tile, mask.num_items)), low)
        tile_BM, in_tile_BM = tile_BN.topk(min(num_kept, tile_BN.shape[1]), dim=1)
        in_tile_BM += low
        if low:
            tile_BM = torch.cat([scores_BM, tile_BM], dim=1)
            in_tile_BM = torch.cat([at_BM, in_tile_BM], dim=1)
            tile_BM, best_BM = tile_BM.topk(min(num_kept, tile_BM.shape[1]), dim=1)
            in_tile_BM = in_tile_BM.gather(1, best_BM)
        scores_BM, at_BM = tile_BM, in_tile_BM
    return scores_BM, at_BM


def _rescore(scorer: Scorer, scores_BM: Tensor, at_BM: Tensor, running: TopK, k: int) -> TopK:
    """The k best by float64 score of candidates in descending order of their float32 score.

    Only those that can still beat the query's running k-th score are scored again.
    """
    if scores_BM.isnan().any():  # topk puts them first, so none can have been left out
        raise ValueError("a score is not a number: the queries or the item shard hold non-finite values")
    hopeful_BM = scores_BM + scorer.error_bound >= running.scores_BK[:, -1:]
    hopeful_BM &= scores_BM > -torch.inf
    num_hopeful = int(hopeful_BM.sum(dim=1).max())
    hopeful_BM, at_BM = hopeful_BM[:, :num_hopeful], at_BM[:, :num_hopeful]
    exact_BM = _in_steps(scorer, at_BM, torch.float64).float()
    return select_topk(exact_BM.masked_fill(~hopeful_BM, -torch.inf), at_BM, k)


def _in_steps(scorer: Scorer, at_BM: Tensor, dtype: torch.dtype) -> Tensor:
    """`scorer.pairs`, a bounded number of pairs at a time."""
    width = max(1, PAIRS_PER_STEP // len(at_BM))
    steps = [scorer.pairs(at_BM[:, low : low + width], dtype) for low in range(0, at_BM.shape[1], width)]
    return torch.cat(steps, dim=1) if steps else torch.empty(at_BM.shape, dtype=dtype, device=at_BM.device)
