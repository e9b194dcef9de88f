"""Item-to-item counts: how often one item follows another in a history, and the items that follow each item most.

Where the order of a history means nothing, an item follows every other one, and all of them count the same. Shapes: N
items, B queries. Counts are whole numbers, so that their sums are the same in any order.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pipeline.data.columns import Mask
from pipeline.data.histories import Bucket
from pipeline.data.lists import Float32, Int64, Lists, offsets_of, ranges
from pipeline.settings import CountedPairs

UNIT = 6  # of a count: the least number that 1, 2 and 3 divide
WEIGHT_STEPS = 1_024  # an event's weight counts in steps of 1/1024, up to MAX_WEIGHT
MAX_WEIGHT = 1e6
COUNT = UNIT * WEIGHT_STEPS  # of an item of weight 1 that is one place later
PRIOR_EVENTS = 10  # added to the events of each item, so that two rare items are not near each other by one chance
EVENTS_AT_ONCE = 5_120  # bounds the memory of scoring: num_neighbours numbers for each
PAIRS_AT_ONCE = 8_000_000  # bounds the memory of counting
QUERIES_AT_ONCE = 512  # bounds the memory of what is made of the scores


@dataclass(frozen=True)
class Counting:
    """Which events of a history are a pair, and which of its events score items."""

    parts: tuple[int, ...]  # in 1 / UNIT: what an item counts that is one place later, two places, and so on
    # Also for the items that are as many places before. Then the pairs of an event count 1 together, by weight 1: their
    # number grows with the length of a history, and the long ones would drown the others.
    both_ways: bool
    num_last_events: int  # of a history, which score items
    decay: float  # of the score from one event to the event before it

    @property
    def pairs_per_event(self) -> int:
        """The most pairs that have one event as their first."""
        return len(self.parts) * (2 if self.both_ways else 1)


COUNTINGS: Mapping[CountedPairs, Counting] = {
    "following": Counting(parts=(6, 3, 2), both_ways=False, num_last_events=10, decay=0.8),
    # A longer history is as good as a hundred of its events around each, because their order means nothing.
    "together": Counting(parts=(6,) * 100, both_ways=True, num_last_events=200, decay=1.0),
}
FOLLOWING = COUNTINGS["following"]


@dataclass(frozen=True)
class ScoredLists:
    """Lists with a score for each value, in the same order."""

    items: Lists
    scores: Float32

    def __len__(self) -> int:
        return len(self.items)

    @staticmethod
    def concat(parts: Iterable["ScoredLists"]) -> "ScoredLists":
        """Join the owners of all parts, one part after the other."""
        all_parts = list(parts)
        scores = np.concatenate([np.empty(0, np.float32), *(part.scores for part in all_parts)])
        return ScoredLists(Lists.concat(part.items for part in all_parts), scores)

    def where(self, is_kept: Mask) -> "ScoredLists":
        """Keep only the marked values of each owner, in their order."""
        return ScoredLists(self.items.where(is_kept), self.scores[is_kept])


@dataclass(frozen=True)
class Neighbours(ScoredLists):
    """For each item the items that follow it, with their scores."""

    counting: Counting = FOLLOWING


@dataclass(frozen=True)
class PairCounts:
    """Counts of ordered pairs of items. The code of a pair is `first * N + second`; codes ascend and are distinct."""

    codes: Int64
    counts: Int64  # in units of 1 / COUNT

    @staticmethod
    def of(codes: Int64, counts: Int64) -> "PairCounts":
        """Add up the counts of equal codes; a pair whose sum is 0 is left out."""
        order = np.argsort(codes, kind="stable")
        codes, counts = codes[order], counts[order]
        starts = np.flatnonzero(np.diff(codes, prepend=-1))
        sums = np.add.reduceat(counts, starts) if len(starts) else counts
        return PairCounts(codes[starts][sums > 0], sums[sums > 0])

    @staticmethod
    def sum(parts: Iterable["PairCounts"]) -> "PairCounts":
        """Add up counts over the same items; the order of the parts changes nothing."""
        all_parts = list(parts)
        empty = np.empty(0, np.int64)
        return PairCounts.of(
            np.concatenate([empty, *(part.codes for part in all_parts)]),
            np.concatenate([empty, *(part.counts for part in all_parts)]),
        )

    def within(self, low: int, high: int, num_items: int) -> "PairCounts":
        """The pairs whose first item is in rows `low` to `high` (exclusive)."""
        start, stop = np.searchsorted(self.codes, [low * num_items, high * num_items])
        return PairCounts(self.codes[start:stop], self.counts[start:stop])


def count_pairs(bucket: Bucket, part: str, num_items: int, counting: Counting = FOLLOWING) -> PairCounts:
    """Count, in each history `bucket.cut(part)`, the items that come a few places after each item.

    A count is that of its place in `counting`, times the weight of the event that is counted: an event of weight 0 is
    context for the others, and nothing to recommend.
    """
    histories = bucket.cut(part)
    rows, owners = histories.values.astype(np.int64), histories.owners
    weights = bucket.weights[ranges(bucket.offsets[:-1], histories.lengths)].astype(np.float64)
    steps_of_event = np.rint(np.clip(weights, 0, MAX_WEIGHT) * WEIGHT_STEPS).astype(np.int64)
    longest = int(histories.lengths.max(initial=0))
    num_paired = _num_paired(histories, len(counting.parts)) if counting.both_ways else np.ones(len(rows), np.int64)
    sums, parts, num_pairs = PairCounts.sum([]), [], 0
    for distance, share in enumerate(counting.parts[: max(0, longest - 1)], start=1):
        earlier = np.flatnonzero(owners[:-distance] == owners[distance:])
        later = earlier + distance
        for first, second in [(earlier, later), (later, earlier)][: 1 + counting.both_ways]:
            is_counted = steps_of_event[second] > 0
            first, second = first[is_counted], second[is_counted]
            counts = np.maximum(1, steps_of_event[second] * share // num_paired[first])
            parts.append(PairCounts(rows[first] * num_items + rows[second], counts))
            num_pairs += len(first)
        if num_pairs > PAIRS_AT_ONCE:
            sums, parts, num_pairs = PairCounts.sum([sums, *parts]), [], 0
    return PairCounts.sum([sums, *parts])


def _num_paired(histories: Lists, num_places: int) -> Int64:
    """For each event the number of other events within so many places of it, at least 1."""
    before = np.arange(len(histories.values)) - np.repeat(histories.offsets[:-1], histories.lengths)
    after = np.repeat(histories.lengths, histories.lengths) - 1 - before
    num_paired: Int64 = np.minimum(before, num_places) + np.minimum(after, num_places)
    return np.maximum(1, num_paired)


def cut_items(num_events_N: Int64, max_pairs: int, counting: Counting = FOLLOWING) -> list[tuple[int, int]]:
    """Cut the items into ranges of rows (from, to exclusive) that hold at most `max_pairs` pairs by their first item.

    An item with more pairs than that is alone.
    """
    pairs_before = offsets_of(np.maximum(1, counting.pairs_per_event * num_events_N.astype(np.int64)))
    bounds = [0]
    while bounds[-1] < len(num_events_N):
        end = int(np.searchsorted(pairs_before, pairs_before[bounds[-1]] + max_pairs, side="right")) - 1
        bounds.append(max(end, bounds[-1] + 1))
    return list(pairwise(bounds))


def nearest_neighbours(pairs: PairCounts, num_events_N: Int64, low: int, high: int, num_neighbours: int) -> ScoredLists:
    """For each item from row `low` to `high` (exclusive), the items that follow it with the highest scores.

    The score of b after a is count(a, b) / √(n_a + 10) / √(n_b + 10), where n is an item's number of events. At most
    `num_neighbours` are kept, best first, of equal scores the lower row; `pairs` are all pairs of these items.
    """
    num_items = len(num_events_N)
    first, second = np.divmod(pairs.codes, num_items)
    norms_N = np.sqrt(num_events_N + PRIOR_EVENTS)
    scores = pairs.counts / COUNT / norms_N[first] / norms_N[second]
    lists = Lists(_offsets_in(first - low, high - low), second.astype(np.int32))
    return best_of(ScoredLists(lists, scores.astype(np.float32)), num_neighbours)


def best_of(scored: ScoredLists, k: int) -> ScoredLists:
    """The k values of each list with the highest scores, best first; of equal scores the lower item row.

    The values of each list must ascend, and the scores be positive: then their bits have their order.
    """
    return _kept(scored, _best_places(scored, k))


def best_by_row(scored: ScoredLists, k: int) -> ScoredLists:
    """The same values as `best_of`, in ascending order of row."""
    return _kept(scored, np.sort(_best_places(scored, k)))


def _best_places(scored: ScoredLists, k: int) -> Int64:
    owners, offsets = scored.items.owners, scored.items.offsets
    falling = np.int64(2**32) - scored.scores.view(np.int32)
    order = np.argsort(owners << 33 | falling, kind="stable")  # every owner's values stay in its own places
    return order[np.arange(len(order)) - offsets[owners] < k]


def _kept(scored: ScoredLists, places: Int64) -> ScoredLists:
    """The values at these places, of which each owner's stand together."""
    lengths = np.bincount(scored.items.owners[places], minlength=len(scored)).astype(np.int64)
    return ScoredLists(Lists(offsets_of(lengths), scored.items.values[places]), scored.scores[places])


def score_by_counts(neighbours: Neighbours, histories: Lists) -> ScoredLists:
    """Score the items that follow the last events of each history; (B,) lists of items in ascending order of row.

    The score of an item is the sum over the last events, counted back from j = 0, of decay^j times its score as a
    neighbour of the event's item (`neighbours` has one list per item). Items without a score are left out; items of
    the history are not.
    """
    at_once = max(1, EVENTS_AT_ONCE // neighbours.counting.num_last_events)
    parts = range(0, max(1, len(histories)), at_once)
    return ScoredLists.concat(
        _score(neighbours, histories.narrow(start, min(start + at_once, len(histories)))) for start in parts
    )


def _score(neighbours: Neighbours, histories: Lists) -> ScoredLists:
    num_items = len(neighbours)
    lengths = np.minimum(histories.lengths, neighbours.counting.num_last_events)
    last = ranges(histories.offsets[1:] - lengths, lengths)
    events = histories.values[last]
    ages = np.repeat(histories.offsets[1:], lengths) - 1 - last
    starts = neighbours.items.offsets[events]
    counts = neighbours.items.offsets[events + 1] - starts
    at = ranges(starts, counts)
    queries = np.repeat(np.repeat(np.arange(len(histories)), lengths), counts)
    codes = queries * num_items + neighbours.items.values[at]
    parts = neighbours.scores[at].astype(np.float64) * np.repeat(neighbours.counting.decay**ages, counts)
    order = np.argsort(codes, kind="stable")  # stable: the parts of a sum are added in the order of the events
    codes = codes[order]
    firsts = np.flatnonzero(np.diff(codes, prepend=-1))
    sums = np.add.reduceat(parts[order], firsts) if len(firsts) else parts
    queries, rows = np.divmod(codes[firsts], num_items)
    return ScoredLists(Lists(_offsets_in(queries, len(histories)), rows.astype(np.int32)), sums.astype(np.float32))


def _offsets_in(owners: Int64, num_owners: int) -> Int64:
    """The offsets of the lists of `num_owners` owners, given the owner of each value in ascending order."""
    return np.searchsorted(owners, np.arange(num_owners + 1)).astype(np.int64)
