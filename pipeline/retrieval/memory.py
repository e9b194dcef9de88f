"""Memory: item-to-item counts as a part of the score, and how good each weight of it is.

score = MoL + weight · log(1 + count score / scale), for the items that follow the last events of a history. Shapes: B
queries, M candidates, K kept, T memories.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.data.batches import ValidationUsers
from pipeline.data.lists import NO_ITEM, Float32, Lists
from pipeline.data.neighbours import QUERIES_AT_ONCE, Neighbours, ScoredLists, best_by_row, score_by_counts
from pipeline.evaluation.metrics import Floats, MeanSum, find_hits, ndcg_at_k
from pipeline.model.model import RetrievalModel
from pipeline.model.mol import QuerySide
from pipeline.retrieval.all_items import item_indexes, quick_and_exact, search_all_items
from pipeline.retrieval.bonuses import Bonuses
from pipeline.retrieval.filters import Rules
from pipeline.retrieval.index import ShardIndex
from pipeline.retrieval.search import search_shard
from pipeline.retrieval.topk import TopK, empty_topk, merge_topk, select_topk
from pipeline.settings import SearchBackend

STANDARD_ERRORS = 2.0  # of the mean gain, by which a weight must be better than 0


@dataclass(frozen=True)
class Memory:
    """The part of counts in a score; with weight 0 they have none."""

    weight: float
    scale: float

    def amounts(self, count_scores: Float32) -> Float32:
        """What is added to the MoL scores of items with these count scores."""
        return np.asarray(self.weight * np.log1p(count_scores.astype(np.float64) / self.scale), dtype=np.float32)


def best_counts(neighbours: Neighbours, histories: Lists, seen: Lists, max_items: int) -> ScoredLists:
    """(B,) lists in ascending order of row: the `max_items` items with the highest scores by `score_by_counts`, without
    those of `seen`."""
    parts = []
    for start in range(0, max(1, len(histories)), QUERIES_AT_ONCE):  # bounds the memory of scores that are not kept
        stop = min(start + QUERIES_AT_ONCE, len(histories))
        scored = score_by_counts(neighbours, histories.narrow(start, stop))
        parts.append(best_by_row(scored.where(~scored.items.is_in(seen.narrow(start, stop))), max_items))
    return ScoredLists.concat(parts)


@dataclass(frozen=True)
class MemoryBonuses:
    """Gives each query the bonuses of the items that follow its history."""

    memory: Memory
    neighbours: Neighbours
    max_items: int  # with a bonus, per query

    def __call__(self, histories: Lists, seen: Lists) -> Bonuses:
        counts = best_counts(self.neighbours, histories, seen, self.max_items)
        return Bonuses(counts.items, self.memory.amounts(counts.scores), len(self.neighbours))


@torch.inference_mode()
def ndcg_with_each(
    memories: Sequence[Memory],
    model: RetrievalModel,
    queries: QuerySide,
    users: ValidationUsers,
    counts: ScoredLists,
    cutoff: int,
    backend: SearchBackend,
    needs_count_N: Tensor | None = None,
) -> Floats:
    """(T, B) for T memories: NDCG@cutoff of the users' held-out items among all that may be shown to them.

    `counts` has no item that they have seen, and the queries, all finite, are on the model's device. Items with a
    count, and held-out items, are scored one by one. No memory changes the order of the others, so that the `cutoff`
    best of these by MoL are enough. An item of `needs_count_N`, bool on the CPU, is found only by a memory of a weight
    above 0 that has a count for it. Raises as `search_all_items`.
    """
    quick, exact = quick_and_exact(cutoff, backend)
    special = counts.items.union(users.held_out)
    rows_BM, counts_BM = Bonuses(special, _scores_of(special, counts), model.num_items).as_tensors(model.device)
    needs_count_BM = torch.zeros_like(rows_BM, dtype=torch.bool)
    if needs_count_N is not None:
        needs_count_BM = needs_count_N.to(model.device)[rows_BM.clamp_min(0)]
    scored = _Scored(rows_BM, torch.full_like(counts_BM, -torch.inf), counts_BM, needs_count_BM)
    rules = Rules(users.seen.union(special), needs_bonus_N=needs_count_N)
    others = empty_topk(len(users), cutoff, model.device)
    for index in item_indexes(model, quick):
        scored = scored.by(index, queries)
        others = search_shard(index, queries, rules, quick, others)
    ndcg_TB = _ndcgs(memories, scored, others, users)
    # With the true others a user without a hit has none either: they are as good as these, or better.
    likely = np.flatnonzero(ndcg_TB.max(axis=0) > 0)
    at = torch.from_numpy(likely).to(model.device)
    others = search_all_items(model, queries.take(at), rules.take(likely), exact)
    ndcg_TB[:, likely] = _ndcgs(memories, scored.take(at), others, users.take(likely))
    return ndcg_TB


@dataclass(frozen=True)
class _Scored:
    """(B, M) items of each query, in ascending order, with their MoL scores and count scores; NO_ITEM pads."""

    rows_BM: Tensor
    scores_BM: Tensor  # -inf where unknown
    counts_BM: Tensor
    needs_count_BM: Tensor  # bool: found only with a part of the counts

    def take(self, queries: Tensor) -> "_Scored":
        return _Scored(*(part[queries] for part in vars(self).values()))

    def by(self, index: ShardIndex, queries: QuerySide) -> "_Scored":
        """The same items; those of the index with their scores, where these are numbers."""
        at_BM = self.rows_BM - index.first_row
        is_here_BM = (self.rows_BM != NO_ITEM) & (at_BM >= 0) & (at_BM < len(index))
        scores_BM = index.rescore(queries, at_BM.where(is_here_BM, NO_ITEM))
        is_known_BM = is_here_BM & ~scores_BM.isnan()
        return replace(self, scores_BM=scores_BM.where(is_known_BM, self.scores_BM))

    def best_with(self, memory: Memory, others: TopK, k: int) -> TopK:
        """The k best sums among these and the others, which have no count."""
        amounts_BM = torch.from_numpy(memory.amounts(self.counts_BM.cpu().numpy())).to(self.scores_BM.device)
        sums_BM = (self.scores_BM + amounts_BM).masked_fill(self.needs_count_BM & (amounts_BM == 0), -torch.inf)
        return merge_topk(others, select_topk(sums_BM, self.rows_BM, k), k)


def _scores_of(lists: Lists, counts: ScoredLists) -> Float32:
    """The count score of each value of `lists`, which ascend and hold all that `counts` has; 0 where there is none."""
    scores = np.zeros(len(lists.values), np.float32)
    scores[lists.is_in(counts.items)] = counts.scores
    return scores


def _ndcgs(memories: Sequence[Memory], scored: _Scored, others: TopK, users: ValidationUsers) -> Floats:
    """(T, B) for T memories: the NDCG of the K best of the scored items and the others."""
    ndcgs, k = [], others.scores_BK.shape[1]
    for memory in memories:
        best = scored.best_with(memory, others, k)
        is_hit_BK = find_hits(best.rows_BK.cpu().numpy(), users.held_out)
        ndcgs.append(ndcg_at_k(is_hit_BK, users.held_out.lengths, k))
    return np.stack(ndcgs)


def grid(weights: Sequence[float], scales: Sequence[float]) -> Iterator[Memory]:
    """The memories to try beside weight 0, the smallest weight first, without repeats."""
    for weight in sorted({weight for weight in weights if weight > 0}):
        for scale in sorted(set(scales)):
            yield Memory(weight, scale)


def choose(memories: Sequence[Memory], gains: Sequence[MeanSum]) -> int | None:
    """The index of the memory with the largest mean gain over weight 0, the first of equal ones.

    `gains` are the differences by user. None when the best is not better than 0 by two standard errors.
    """
    best = max(range(len(memories)), key=lambda number: gains[number].mean, default=None)
    if best is None or gains[best].count < 2:
        return None
    gain = gains[best]
    variance = max(0.0, (gain.squares - gain.total * gain.mean) / (gain.count - 1))
    return best if gain.mean > STANDARD_ERRORS * float(np.sqrt(variance / gain.count)) else None
