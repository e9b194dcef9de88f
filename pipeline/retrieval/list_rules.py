"""Rules for a list as a whole: at most so many items of a kind, at least so many, none below a score, and variety.

A list is chosen from a ranking, one item after the other: always the best that is still allowed. An item's worth is its
score, less `diversity` times its cosine to the nearest item that is in the list already (maximal marginal relevance,
Carbonell & Goldstein, SIGIR 1998, with the score on its own scale). While as many places are left as items are owed to
the needs, only items that fulfil one are allowed.

Shapes: N items of the index, B queries, M items of a ranking, K places, W needs, V values of an item, D dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt

from pipeline.data.columns import Mask
from pipeline.data.lists import NO_ITEM, Float32, Int64, Lists, ranges

NUMBERS_AT_ONCE = 4_000_000  # bounds the memory of choosing: a few arrays of (B, M), with diversity one of (B, M, D)

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Quota:
    """At most `most` items of a list have the same value; an item may have several values, or none."""

    name: str
    most: int
    values: Lists  # (N,): the values of each item, as distinct whole numbers from 0


@dataclass(frozen=True)
class Need:
    """At least `least` items of a list are among those that fulfil it."""

    name: str
    least: int
    fulfils_N: Mask


@dataclass(frozen=True)
class Chosen:
    """A list for each query, in the order of the ranking. Lists of queries that are open have no meaning."""

    places_BK: Int64  # in the ranking; -1 pads the end
    is_open_B: Bools  # whether the ranking ended before the list was settled
    needed_B: npt.NDArray[np.float64]  # an item that scores less would have changed nothing; -inf: any might have
    num_fulfilling_BW: Int64  # items of the list that fulfil each need

    def rows_of(self, rows_BM: Int64) -> Int64:
        """(B, K) item rows; NO_ITEM pads."""
        rows_BK = np.take_along_axis(rows_BM, np.maximum(self.places_BK, 0), axis=1)
        return np.where(self.places_BK < 0, NO_ITEM, rows_BK)

    def scores_of(self, scores_BM: Float32) -> Float32:
        """(B, K) scores; -inf pads."""
        scores_BK = np.take_along_axis(scores_BM, np.maximum(self.places_BK, 0), axis=1)
        return np.where(self.places_BK < 0, np.float32(-np.inf), scores_BK)


@dataclass(frozen=True)
class ListRules:
    """The rules that a list must keep to; without any, the best K are the list."""

    quotas: tuple[Quota, ...] = ()
    needs: tuple[Need, ...] = ()
    min_score: float | None = None
    diversity: float = 0.0
    vectors_ND: Float32 | None = field(default=None, repr=False)  # of norm 1; needed where there is diversity

    def choose(self, scores_BM: Float32, rows_BM: Int64, k: int, is_whole: bool) -> Chosen:
        """Choose lists of K from rankings of M ≥ K: scores fall, ties by row; NO_ITEM and -inf pad the end.

        A ranking with padding has all items that there are; one without goes on after its end, unless `is_whole`.
        """
        num_queries, depth = rows_BM.shape
        width = self.vectors_ND.shape[1] if self.diversity and self.vectors_ND is not None else 1
        step = max(1, NUMBERS_AT_ONCE // (depth * width))
        parts = [
            _Choice(self, scores_BM[first : first + step], rows_BM[first : first + step], k, is_whole).made()
            for first in range(0, max(num_queries, 1), step)
        ]
        return Chosen(*(np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(Chosen)))


class _Choice:
    """The lists of some queries while they are chosen; b of these B queries are under way."""

    def __init__(self, rules: ListRules, scores_BM: Float32, rows_BM: Int64, k: int, is_whole: bool) -> None:
        self._rules, self._rows_BM, self._k = rules, rows_BM, k
        num_queries = len(rows_BM)
        self._free_BM = rows_BM != NO_ITEM
        self._ends_B = ~self._free_BM[:, -1] | is_whole
        if rules.min_score is not None:
            self._free_BM &= scores_BM >= rules.min_score
            self._ends_B |= scores_BM[:, -1] < rules.min_score
        self._worth_BM = np.where(self._free_BM, scores_BM, -np.inf).astype(np.float64)
        self._scores_BM = self._worth_BM.copy() if rules.diversity else self._worth_BM
        self._vectors_BMD: Float32 | None = None
        if rules.diversity:
            assert rules.vectors_ND is not None, "diversity compares the items' vectors"
            self._vectors_BMD = rules.vectors_ND[np.maximum(rows_BM, 0)]
        self._nearest_BM = np.zeros(rows_BM.shape if rules.diversity else 0)
        # A worth is at most the score, so that what comes after the ranking is worth no more than this.
        self._after_B = np.where(self._ends_B, -np.inf, scores_BM[:, -1])
        at_BM = np.maximum(rows_BM, 0)
        self._fulfils_WBM = [need.fulfils_N[at_BM] & self._free_BM for need in rules.needs]
        self._owed_BW = np.tile(np.array([need.least for need in rules.needs], dtype=np.int64), (num_queries, 1))
        self._quotas = [_Counted(quota, rows_BM) for quota in rules.quotas]
        self._places_BK = np.full((num_queries, k), -1, dtype=np.int64)
        self._is_open_B = np.zeros(num_queries, dtype=bool)
        self._needed_B = np.full(num_queries, np.inf)

    def made(self) -> Chosen:
        active = np.arange(len(self._rows_BM))
        for place in range(self._k):
            active = self._fill(active, place)
        places_BK = np.sort(self._places_BK.view(np.uint64), axis=1).view(np.int64)  # as such -1, the padding, is last
        num_fulfilling_BW = np.empty((len(places_BK), len(self._fulfils_WBM)), dtype=np.int64)
        for number, fulfils_BM in enumerate(self._fulfils_WBM):
            is_fulfilling_BK = np.take_along_axis(fulfils_BM, np.maximum(places_BK, 0), axis=1)
            num_fulfilling_BW[:, number] = (is_fulfilling_BK & (places_BK >= 0)).sum(axis=1)
        return Chosen(places_BK, self._is_open_B, self._needed_B, num_fulfilling_BW)

    def _fill(self, active: Int64, place: int) -> Int64:
        """Fill one place of the lists under way, and return those that go on."""
        allowed_bM = self._free_BM[active]
        if self._fulfils_WBM:
            must_b = self._owed_BW[active].sum(axis=1) >= self._k - place
            helps_bM = np.zeros_like(allowed_bM)
            for number, fulfils_BM in enumerate(self._fulfils_WBM):
                helps_bM |= fulfils_BM[active] & (self._owed_BW[active, number] > 0)[:, None]
            allowed_bM &= helps_bM | ~must_b[:, None]
            # What is owed and is not to be had is waived.
            waived = np.flatnonzero(must_b & ~allowed_bM.any(axis=1) & self._ends_B[active])
            allowed_bM[waived] = self._free_BM[active[waived]]
            self._owed_BW[active[waived]] = 0
            self._needed_B[active[waived]] = -np.inf
        worth_bM = np.where(allowed_bM, self._worth_BM[active], -np.inf)
        picks_b = worth_bM.argmax(axis=1)
        worth_b = worth_bM[np.arange(len(active)), picks_b]
        is_found_b = worth_b > -np.inf
        is_sure_b = is_found_b & (worth_b >= self._after_B[active])
        self._is_open_B[active[~is_sure_b & ~self._ends_B[active]]] = True
        self._needed_B[active[~is_found_b]] = -np.inf
        goes_on_b = is_found_b & ~self._is_open_B[active]
        going_on: Int64 = active[goes_on_b]
        self._needed_B[going_on] = np.minimum(self._needed_B[going_on], worth_b[goes_on_b])
        self._take(going_on, picks_b[goes_on_b], place)
        return going_on

    def _take(self, queries: Int64, picks: Int64, place: int) -> None:
        self._places_BK[queries, place] = picks
        self._free_BM[queries, picks] = False
        for number, fulfils_BM in enumerate(self._fulfils_WBM):
            owed = self._owed_BW[queries, number] - fulfils_BM[queries, picks]
            self._owed_BW[queries, number] = np.maximum(owed, 0)
        for counted in self._quotas:
            counted.take(queries, picks, self._free_BM)
        if self._vectors_BMD is not None:
            are_all = len(queries) == len(self._vectors_BMD)  # then they are not copied
            vectors_bMD = self._vectors_BMD if are_all else self._vectors_BMD[queries]
            picked_bD1 = vectors_bMD[np.arange(len(queries)), picks][:, :, None]
            self._nearest_BM[queries] = np.maximum(self._nearest_BM[queries], (vectors_bMD @ picked_bD1)[:, :, 0])
            self._worth_BM[queries] = self._scores_BM[queries] - self._rules.diversity * self._nearest_BM[queries]


class _Counted:
    """The items of each list by a value that a quota limits."""

    def __init__(self, quota: Quota, rows_BM: Int64) -> None:
        self._most, self._depth = quota.most, rows_BM.shape[1]
        values = quota.values.take(rows_BM.ravel())
        self._offsets = values.offsets  # of the values of each place
        places = values.owners
        num_codes = int(values.values.max(initial=0)) + 1
        # A pair is a query and a value that one of its items has.
        pairs, self._pairs = np.unique(places // self._depth * num_codes + values.values, return_inverse=True)
        by_pair = np.argsort(self._pairs, kind="stable")
        self._places_by_pair = places[by_pair]
        self._pair_offsets = np.searchsorted(self._pairs[by_pair], np.arange(len(pairs) + 1))
        self._counts = np.zeros(len(pairs), dtype=np.int64)

    def take(self, queries: Int64, picks: Int64, free_BM: Bools) -> None:
        """Count the picked items; the others with a value of which there are enough are no longer free."""
        places = queries * self._depth + picks
        starts = self._offsets[places]
        pairs = self._pairs[ranges(starts, self._offsets[places + 1] - starts)]
        self._counts[pairs] += 1  # each pair once: the values of an item are distinct
        full = pairs[self._counts[pairs] >= self._most]
        starts = self._pair_offsets[full]
        free_BM.reshape(-1)[self._places_by_pair[ranges(starts, self._pair_offsets[full + 1] - starts)]] = False


def in_words(rules: ListRules, chosen: Chosen, is_whole_B: Sequence[bool] | Bools, depth: int) -> list[str]:
    """(B,) why a list is short, or owes something to a need; "" where it does not.

    `is_whole_B` says whether all items that there are were looked at, and not only the best `depth`.
    """
    lengths_B = (chosen.places_BK >= 0).sum(axis=1)
    k, notes = chosen.places_BK.shape[1], []
    for query, length in enumerate(lengths_B):
        of = "" if is_whole_B[query] else f" of the best {depth:,}"
        parts = [f"only {length} items{of} keep to the rules for lists"] if length < k else []
        for number, need in enumerate(rules.needs):
            found = int(chosen.num_fulfilling_BW[query, number])
            if found < need.least:
                parts.append(f"{found} of {need.least} items for {need.name}{of}")
        notes.append("; ".join(parts))
    return notes
