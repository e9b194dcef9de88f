"""Top-k of one shard under MoL, by any of the algorithms. B queries, N items, M candidates, K kept.

A published score is the float64 score rounded once to float32, plus the pair's bonus (`bonuses.py`), so it depends
neither on how the corpus was cut, tiled or batched, nor on the backend. Every earlier step only decides which items are
worth a float64 score.

Items with a bonus go a way of their own: each is a candidate, and the search of the other items does not meet it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.lists import NO_ITEM
from pipeline.model.mol import QuerySide
from pipeline.retrieval import stage1
from pipeline.retrieval.bonuses import Bonuses
from pipeline.retrieval.filters import Rules, ShardMask
from pipeline.retrieval.index import NotFiniteError, ShardIndex, Shortlist
from pipeline.retrieval.stage1 import Candidates, QueryMap
from pipeline.retrieval.topk import TopK, concat_queries, empty_topk, merge_topk, select_topk
from pipeline.settings import SearchSettings

# A scan keeps k + SLACK items. If more lie within its error of the k-th, it is repeated with WIDEN times more.
SLACK, WIDEN = 28, 4
# With at most 1.5 k candidates, skip the float32 pass: nearly all would be scored again in float64 anyway.
FEW = 1.5
# Queries that are searched at once: with CombTopK's thousands of candidates for each, tens of megabytes.
QUERIES_AT_ONCE = 1_024
# Pairs with a bonus that are scored at once, about 40 bytes each.
BONUSES_AT_ONCE = 1_048_576


@torch.inference_mode()
def search_shard(
    index: ShardIndex,
    queries: QuerySide,
    rules: Rules,
    settings: SearchSettings,
    running: TopK | None = None,
    query_map: QueryMap | None = None,
) -> TopK:
    """Improve each query's running top-k with the best items of one shard that the rules allow.

    Shapes: queries (B, Q, D) and (B, P); returns (B, k). Every score is the exact MoL score of its pair plus the pair's
    bonus, and `bounds_B` limits the score of a missed item, which has no bonus. `running` must come from other shards.
    `query_map` belongs to the low-rank table. Memory does not grow with B × N. Raises NotFiniteError when a query or a
    score is not finite.
    """
    device = queries.gate_BP.device
    if len(rules) != len(queries.gate_BP):
        raise ValueError(f"there are rules for {len(rules)} queries, but {len(queries.gate_BP)} queries")
    so_far = empty_topk(len(rules), settings.k, device) if running is None else running
    if not len(rules) or not len(index):
        return so_far
    if not queries.is_finite_B.all():
        raise NotFiniteError("a query holds a value that is not a number; leave the query out and report it")
    search = _Search(index, settings, query_map)
    parts = list(rules.parts(QUERIES_AT_ONCE))
    improved = []
    for part in parts:
        chosen = torch.from_numpy(part)
        asking, before, asked = queries.take(chosen), so_far.take(chosen), rules.take(part)
        mask = asked.for_shard(index.first_row, len(index))
        bonuses = asked.bonuses_for_shard(index.first_row, len(index))
        if bonuses is not None:
            before = search.with_bonuses(asking, bonuses.where(mask.allows(bonuses.rows)), before)
            mask = mask.without(bonuses.rows)
        if rules.needs_bonus_N is not None:
            mask = mask.without_for_all(rules.needs_bonus_N[index.first_row : index.first_row + len(index)])
        improved.append(merge_topk(before, search(asking, mask.to(device), before.scores_BK[:, -1]), settings.k))
    order = torch.from_numpy(np.argsort(np.concatenate(parts)))
    return concat_queries(improved).take(order)


@dataclass(frozen=True)
class _Search:
    """One way to search one shard. Candidates are numbered within the shard, results have rows of the whole index.

    `reached_B` is each query's k-th score in other shards.
    """

    index: ShardIndex
    settings: SearchSettings
    query_map: QueryMap | None

    def __call__(self, queries: QuerySide, mask: ShardMask, reached_B: Tensor) -> TopK:
        method, k = self.settings.method, self.settings.k
        if method == "exact_two_stage":
            return self._exact(queries, mask, reached_B, stage1.topk_per_embd(self.index, queries, k, mask)[0])
        if method == "exact":
            seeds_BM = self._seeds(queries, mask) if self.index.scan_skips else None
            return self._exact(queries, mask, reached_B, seeds_BM)
        at_BM, bound_B = self._candidates(queries, mask)
        best = self._best_of(queries, at_BM, reached_B, bound_B)
        return self._escalate(queries, mask, reached_B, best) if self.settings.max_escalated else best

    def with_bonuses(self, queries: QuerySide, bonuses: Bonuses, before: TopK) -> TopK:
        """Improve `before`, of other items, with the items that have a bonus; the rules must allow them all."""
        lengths = bonuses.rows.lengths
        receiving = np.flatnonzero(lengths)
        if not len(receiving):
            return before
        num_parts = -(-len(receiving) * int(lengths.max()) // BONUSES_AT_ONCE)
        improved = []
        for part in np.array_split(receiving, min(num_parts, len(receiving))):
            chosen = torch.from_numpy(part)
            known = before.take(chosen)
            best = self._best_with_bonus(queries.take(chosen), bonuses.take(part), known.scores_BK[:, -1])
            improved.append(merge_topk(known, best, self.settings.k))
        return before.put(torch.from_numpy(receiving), concat_queries(improved))

    def _best_with_bonus(self, queries: QuerySide, bonuses: Bonuses, reached_B: Tensor) -> TopK:
        """The best items with a bonus; items that score less than `reached_B` may be left out."""
        at_BM, amounts_BM = bonuses.as_tensors(reached_B.device)
        if at_BM.shape[1] > FEW * self.settings.k or not reached_B.isneginf().all():
            at_BM, amounts_BM = self._hopeful(queries, at_BM, amounts_BM, reached_B)
        scores_BM = _checked(self.index.rescore(queries, at_BM)) + amounts_BM
        return select_topk(scores_BM, self._rows(at_BM), self.settings.k)

    def _hopeful(
        self, queries: QuerySide, at_BM: Tensor, amounts_BM: Tensor, reached_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The items, and their bonuses, that may be among the k best and reach `reached_B`, by their float32 scores."""
        k, error = self.settings.k, self.index.scan_error
        scores_BM = _checked(self.index.score(queries, at_BM))
        # The published score lies between the two, as large as a bonus may be, because rounding never swaps numbers.
        low_BM, high_BM = scores_BM - error + amounts_BM, scores_BM + error + amounts_BM
        needed_B = torch.maximum(reached_B, low_BM.topk(k, dim=1).values[:, -1]) if low_BM.shape[1] > k else reached_B
        is_hopeful_BM = (high_BM >= needed_B[:, None]) & (high_BM > -torch.inf)
        num_kept = int(is_hopeful_BM.sum(dim=1).max())
        kept_BM = is_hopeful_BM.float().topk(num_kept, dim=1).indices
        at_BM = at_BM.masked_fill(~is_hopeful_BM, NO_ITEM)
        return at_BM.gather(1, kept_BM), amounts_BM.gather(1, kept_BM)

    def _candidates(self, queries: QuerySide, mask: ShardMask) -> Candidates:
        settings, index = self.settings, self.index
        match settings.method:
            case "topk_avg":
                return stage1.topk_avg(index, queries, settings.num_preselected, mask)
            case "topk_per_embd":
                return stage1.topk_per_embd(index, queries, settings.num_per_embd, mask, at_least=settings.k)
            case "comb_topk":
                return stage1.comb_topk(index, queries, settings.num_per_embd, settings.num_preselected, mask)
            case "topk_low_rank" if self.query_map is not None:
                return stage1.topk_low_rank(index, queries, settings.num_preselected, mask, self.query_map)
        raise ValueError(f"no stage 1 for method {settings.method!r}")

    def _seeds(self, queries: QuerySide, mask: ShardMask) -> Tensor:
        """Items that are probably good: their k-th score lets the scan skip most of the others."""
        if self.query_map is not None:
            return stage1.topk_low_rank(self.index, queries, self.settings.num_preselected, mask, self.query_map)[0]
        return stage1.topk_avg(self.index, queries, self.settings.num_preselected, mask)[0]

    def _exact(self, queries: QuerySide, mask: ShardMask, reached_B: Tensor, seeds_BM: Tensor | None) -> TopK:
        """The paper's exact two-stage algorithm: the k-th score of the seeds is a floor for all items.

        An item of the true top-k reaches the floor, and so does its largest logit. The scan scores every item whose
        largest logit reaches the floor.
        """
        num_kept = self.settings.k + SLACK
        if seeds_BM is None:
            return self._scan(queries, mask, reached_B, num_kept)
        unknown_B = torch.full_like(reached_B, torch.inf)
        seeds = self._best_of(queries, seeds_BM, reached_B, unknown_B)
        return self._scan(queries, mask, torch.maximum(reached_B, seeds.scores_BK[:, -1]), num_kept)

    def _scan(self, queries: QuerySide, mask: ShardMask, reached_B: Tensor, num_kept: int) -> TopK:
        """Search exactly: scan, and scan again for the queries whose kept items may lack one of the true top-k."""
        best = self._scanned(queries, mask, reached_B, num_kept, max_scored=len(self.index))
        needed_B = torch.maximum(best.scores_BK[:, -1], reached_B)
        is_open_B = (best.bounds_B >= needed_B) & (best.bounds_B > -torch.inf)
        bounds_B = torch.full_like(best.bounds_B, -torch.inf)
        if not is_open_B.any() or num_kept >= len(self.index):
            return TopK(best.scores_BK, best.rows_BK, bounds_B)
        open_B = is_open_B.nonzero()[:, 0]
        part = mask.take(open_B.cpu().numpy().astype(np.int64))
        again = self._scan(queries.take(open_B), part, reached_B[open_B], num_kept * WIDEN)
        scores_BK = best.scores_BK.index_copy(0, open_B, again.scores_BK)
        return TopK(scores_BK, best.rows_BK.index_copy(0, open_B, again.rows_BK), bounds_B)

    def _scanned(self, queries: QuerySide, mask: ShardMask, reached_B: Tensor, num_kept: int, max_scored: int) -> TopK:
        """The best of one scan, and a bound on the scores of all items that it did not keep."""
        error = self.index.scan_error
        kept, unscored_B = self.index.scan(queries, num_kept, mask, reached_B - error, max_scored)
        is_full_B = (kept.at_BM != NO_ITEM).all(dim=1) & (kept.at_BM.shape[1] == num_kept)
        dropped_B = (kept.scores_BM.amin(dim=1) + error).where(is_full_B, -torch.inf)
        bounds_B = torch.maximum(dropped_B, unscored_B)
        return self._rescored(queries, kept, reached_B, bounds_B)

    def _escalate(self, queries: QuerySide, mask: ShardMask, reached_B: Tensor, best: TopK) -> TopK:
        """Prove or improve an approximate result: scan items that can still reach its k-th score, up to a budget."""
        k = self.settings.k
        floor_B = torch.maximum(best.scores_BK[:, -1], reached_B)
        more = self._scanned(queries, mask, floor_B, k + SLACK, self.settings.max_escalated)
        scores_BM = torch.cat([best.scores_BK, more.scores_BK], dim=1)
        rows_BM, by_row_BM = torch.cat([best.rows_BK, more.rows_BK], dim=1).sort(dim=1)
        is_repeated_BM = (rows_BM == rows_BM.roll(1, dims=1)).index_fill(1, rows_BM.new_zeros(1), False)
        scores_BM = scores_BM.gather(1, by_row_BM).masked_fill(is_repeated_BM, -torch.inf)
        return select_topk(scores_BM, rows_BM, k, torch.minimum(more.bounds_B, best.bounds_B))

    def _best_of(self, queries: QuerySide, at_BM: Tensor, reached_B: Tensor, bound_B: Tensor) -> TopK:
        """Stage 2: the best of the candidates by exact score."""
        if at_BM.shape[1] <= FEW * self.settings.k and reached_B.isneginf().all():
            return self._select(queries, at_BM, bound_B)
        return self._rescored(queries, Shortlist(self.index.score(queries, at_BM), at_BM), reached_B, bound_B)

    def _rescored(self, queries: QuerySide, scored: Shortlist, reached_B: Tensor, bounds_B: Tensor) -> TopK:
        """The k best by float64 score of candidates whose scores are right to within `scan_error`.

        Only candidates that can be among the k best and beat `reached_B` are scored again.
        """
        k, error = self.settings.k, self.index.scan_error
        scores_BM, needed_B = _checked(scored.scores_BM), reached_B - error
        if scores_BM.shape[1] > k:
            needed_B = torch.maximum(needed_B, scores_BM.topk(k, dim=1).values[:, -1] - 2 * error)
        hopeful = _above(scored, needed_B)
        return self._select(queries, hopeful.at_BM, bounds_B)

    def _select(self, queries: QuerySide, at_BM: Tensor, bounds_B: Tensor) -> TopK:
        """The k best of the candidates by float64 score."""
        scores_BM = _checked(self.index.rescore(queries, at_BM))
        return select_topk(scores_BM, self._rows(at_BM), self.settings.k, bounds_B)

    def _rows(self, at_BM: Tensor) -> Tensor:
        """The items' rows in the whole index."""
        return torch.where(at_BM == NO_ITEM, NO_ITEM, at_BM + self.index.first_row)


def _checked(scores_BM: Tensor) -> Tensor:
    """Return the scores, or raise NotFiniteError when one is NaN."""
    if scores_BM.isnan().any():
        raise NotFiniteError("a score is not a number: the queries or the item shard hold non-finite values")
    return scores_BM


def _above(scored: Shortlist, needed_B: Tensor) -> Shortlist:
    """Keep the candidates that score at least `needed_B`, in as few columns as hold them."""
    is_hopeful_BM = (scored.scores_BM >= needed_B[:, None]) & (scored.scores_BM > -torch.inf)
    return Shortlist(
        scored.scores_BM.masked_fill(~is_hopeful_BM, -torch.inf), scored.at_BM.masked_fill(~is_hopeful_BM, NO_ITEM)
    ).squeeze(int(is_hopeful_BM.sum(dim=1).max()))
