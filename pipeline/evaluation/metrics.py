"""How good ranked lists are: one small function per metric, and sums that can be added over units.

Arrays end in their shape: B queries, K places of a list (best first), N items. A ranked list is int rows (B, K) padded
with -1. Targets are the distinct rows that a good list holds: one list per query, none of them empty.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.lists import NO_ITEM, Int32, Lists, offsets_of
from pipeline.evaluation.results import Estimate

Z95 = 1.959963984540054  # standard normal quantile of a two-sided 95 % interval

Floats = NDArray[np.float64]
Rows = NDArray[np.integer]
Bools = NDArray[np.bool_]


def measured_cutoffs(cutoffs: Iterable[int], k: int) -> tuple[int, ...]:
    """The cutoffs that a list of k places can answer, ascending; k itself when none can."""
    return tuple(sorted({cutoff for cutoff in cutoffs if cutoff <= k} or {k}))


def find_hits(ranked_BK: Rows, targets: Lists) -> Bools:
    """(B, K): whether this place of the list holds one of the query's targets."""
    span = 1 + max(int(ranked_BK.max(initial=0)), int(targets.values.max(initial=0)))
    wanted = targets.owners * span + targets.values
    shown_BK = np.arange(len(ranked_BK))[:, None] * span + ranked_BK
    return np.asarray(np.isin(shown_BK, wanted) & (ranked_BK != NO_ITEM))


def target_ranks(ranked_BK: Rows, targets: Lists) -> Int32:
    """The place, from 1, of each of the targets' values in its query's list; 0 where it is not in the list."""
    span = 1 + max(int(ranked_BK.max(initial=0)), int(targets.values.max(initial=0)))
    rank_BK = np.broadcast_to(np.arange(1, 1 + ranked_BK.shape[1], dtype=np.int32), ranked_BK.shape)
    shown = (np.arange(len(ranked_BK))[:, None] * span + ranked_BK)[ranked_BK != NO_ITEM]
    ranks = rank_BK[ranked_BK != NO_ITEM]
    order = np.argsort(shown, kind="stable")
    shown, ranks = np.append(shown[order], -1), np.append(ranks[order], np.int32(0))
    wanted = targets.owners * span + targets.values
    at = np.searchsorted(shown[:-1], wanted)
    return np.where(shown[at] == wanted, ranks[at], np.int32(0))


def hits_at(ranks: Int32, targets: Lists, k: int) -> Bools:
    """(B, k): `find_hits` of lists of k places, from the ranks of the targets."""
    is_hit_BK = np.zeros((len(targets), k), dtype=np.bool_)
    is_found = (ranks > 0) & (ranks <= k)
    is_hit_BK[targets.owners[is_found], ranks[is_found] - 1] = True
    return is_hit_BK


def hit_rate_at_k(is_hit_BK: Bools, k: int) -> Floats:
    """(B,): 1 if at least one of the first k places is a hit, else 0."""
    return np.asarray(is_hit_BK[:, :k].any(axis=1), dtype=np.float64)


def recall_at_k(is_hit_BK: Bools, num_targets_B: NDArray[np.int64], k: int) -> Floats:
    """(B,): share of the query's targets, all of them, within the first k places."""
    return np.asarray(is_hit_BK[:, :k].sum(axis=1) / num_targets_B)


def ndcg_at_k(is_hit_BK: Bools, num_targets_B: NDArray[np.int64], k: int) -> Floats:
    """(B,): gain 1/log2(1 + rank) of the hits within k, over that of the best list: min(k, targets) hits on top."""
    discounts_K: Floats = 1.0 / np.log2(np.arange(2, k + 2))
    depth = min(k, is_hit_BK.shape[1])
    gain_B = np.asarray(is_hit_BK[:, :depth] @ discounts_K[:depth])
    ideal_B = np.cumsum(discounts_K)[np.minimum(num_targets_B, k) - 1]
    return np.asarray(gain_B / ideal_B)


def reciprocal_rank(is_hit_BK: Bools) -> Floats:
    """(B,): 1/rank of the first hit, 0 for a miss. Its mean is the MRR.

    The papers of HSTU and MoL give a miss the rank after their list of 2,500, so their MRR has a floor of 1/2501;
    ours has none, and is cut at the length of the list.
    """
    if not is_hit_BK.shape[1]:
        return np.zeros(is_hit_BK.shape[0])
    return np.where(is_hit_BK.any(axis=1), 1.0 / (1 + is_hit_BK.argmax(axis=1)), 0.0)


def overlap_at_k(ranked_BK: Rows, exact_BK: Rows, k: int) -> Floats:
    """(B,): share of exact search's first k that the first k of the list hold too, in any order.

    An exact list may be shorter than k (few items are left for the query); an empty one counts as 1.
    """
    is_item_BK = exact_BK[:, :k] != NO_ITEM
    counts_B = is_item_BK.sum(axis=1)
    targets = Lists(offsets_of(counts_B), exact_BK[:, :k][is_item_BK].astype(np.int32))
    hits_B = find_hits(ranked_BK[:, :k], targets).sum(axis=1)
    return np.where(counts_B > 0, hits_B / np.maximum(counts_B, 1), 1.0)


def catalogue_coverage(exposure_N: NDArray[np.int64]) -> float:
    """Share of the catalogue that is in at least one list."""
    return float((exposure_N > 0).mean()) if exposure_N.size else 0.0


def gini(exposure_N: NDArray[np.int64]) -> float:
    """Inequality of exposure over the whole catalogue: 0 when all items are shown equally often, (N-1)/N when one
    item has everything. 0 when nothing is shown."""
    num_items, shown = exposure_N.size, int(exposure_N.sum())
    if not shown:
        return 0.0
    ascending = np.sort(exposure_N).astype(np.float64)
    rank_N = np.arange(1, num_items + 1)
    return float(((2 * rank_N - num_items - 1) @ ascending) / (num_items * shown))


@dataclass(frozen=True)
class MeanSum:
    """Sums that give the mean of values and, where they are in [0, 1], its interval; sums of disjoint groups of queries
    can be added."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    @staticmethod
    def of(values_B: Floats) -> "MeanSum":
        return MeanSum(values_B.size, float(values_B.sum()), float(np.square(values_B).sum()))

    def __add__(self, other: "MeanSum") -> "MeanSum":
        return MeanSum(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    def normal_interval(self) -> tuple[float, float]:
        """95 % interval of the mean over queries by the normal approximation, within [0, 1].

        Fewer than two values say nothing about their spread: the interval is then all of [0, 1].
        """
        if self.count < 2:
            return 0.0, 1.0
        variance = max(0.0, (self.squares - self.total * self.mean) / (self.count - 1))
        margin = Z95 * float(np.sqrt(variance / self.count))
        return max(0.0, self.mean - margin), min(1.0, self.mean + margin)

    def wilson_interval(self) -> tuple[float, float]:
        """95 % Wilson score interval of a proportion (values 0 or 1): right also at 0 and 1, where the normal
        approximation would give an interval of width 0."""
        if not self.count:
            return 0.0, 1.0
        ratio = Z95**2 / self.count
        centre = (self.mean + ratio / 2) / (1 + ratio)
        spread = self.mean * (1 - self.mean) / self.count + ratio / (4 * self.count)
        margin = Z95 * float(np.sqrt(spread)) / (1 + ratio)
        return max(0.0, centre - margin), min(1.0, centre + margin)


RankingSums = Mapping[str, MeanSum]


def ranking_values(is_hit_BK: Bools, num_targets_B: NDArray[np.int64], cutoffs: Sequence[int]) -> dict[str, Floats]:
    """(B,) each: `hr@c`, `ndcg@c` and `recall@c` for each cutoff, and `mrr`."""
    values = {}
    for cutoff in cutoffs:
        values[f"hr@{cutoff}"] = hit_rate_at_k(is_hit_BK, cutoff)
        values[f"ndcg@{cutoff}"] = ndcg_at_k(is_hit_BK, num_targets_B, cutoff)
        values[f"recall@{cutoff}"] = recall_at_k(is_hit_BK, num_targets_B, cutoff)
    values["mrr"] = reciprocal_rank(is_hit_BK)
    return values


def ranking_sums(ranked_BK: Rows, targets: Lists, cutoffs: Sequence[int]) -> dict[str, MeanSum]:
    """`ranking_values`, each summed over the queries."""
    values = ranking_values(find_hits(ranked_BK, targets), targets.lengths, cutoffs)
    return {name: MeanSum.of(values_B) for name, values_B in values.items()}


def add_sums(parts: Iterable[RankingSums]) -> dict[str, MeanSum]:
    """Add up units, name by name; the order of the parts decides the last bits, so give them in a fixed one."""
    total: dict[str, MeanSum] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, MeanSum()) + value
    return total


def summarise(sums: RankingSums) -> dict[str, Estimate]:
    """The estimate of each metric: Wilson's interval for hit rates, the normal one for all other means."""
    estimates = {}
    for name, value in sums.items():
        low, high = value.wilson_interval() if name.startswith("hr@") else value.normal_interval()
        estimates[name] = Estimate(mean=value.mean, low=low, high=high)
    return estimates
