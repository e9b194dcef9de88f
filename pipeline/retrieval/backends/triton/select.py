"""Exact top-k of inner products on a GPU: a threshold from a sample, a list of items above it, a proof or else a sweep.

B queries, N items, M candidates, C capacity of a list, K kept, Q/X query/item components, D width.

Matrix units pick the items to list; listed items are scored again in plain float32, which adds up in another order.
`margin_B` bounds the difference between the two, so that the result is exact for the plain scores.
"""

import torch
from torch import Tensor

from pipeline.data.lists import NO_ITEM
from pipeline.retrieval.backends.triton.launch import Allowed, ItemLists, allow, bin_maxima, collect, gathered_products
from pipeline.retrieval.backends.triton.layout import padded_size
from pipeline.retrieval.filters import ShardMask
from pipeline.retrieval.index import Shortlist

SAMPLE_STEP = 16  # every 16th item is in the sample
SIGMAS = 4  # standard deviations that the sampled threshold stays on the safe side
BINS_PER_RANK = 16  # bins per wanted item of the sample, so that few of its best share a bin
MIN_CAPACITY = 4_096
SWEEP_ITEMS = 65_536
SWEEP_QUERIES = 128
NO_KEY = torch.iinfo(torch.int64).min
LOW_BITS = 0xFFFFFFFF


class Kept:
    """The `num_kept` best items so far: score descending, then item ascending, each pair as one integer key."""

    def __init__(self, num_queries: int, num_kept: int, device: torch.device) -> None:
        self._keys_BK = torch.full((num_queries, num_kept), NO_KEY, dtype=torch.int64, device=device)

    def add(self, scores_BM: Tensor, lists: ItemLists) -> None:
        """Add each list with the scores of its items; no item may be added twice."""
        width = min(scores_BM.shape[1], int(lists.counts_B.max()))
        if not width:
            return
        keys_BM = _keys(scores_BM[:, :width], lists.at_BC[:, :width])
        is_listed_BM = torch.arange(width, device=keys_BM.device) < lists.counts_B[:, None]
        all_BM = torch.cat([self._keys_BK, keys_BM.where(is_listed_BM, NO_KEY)], dim=1)
        self._keys_BK = all_BM.topk(self._keys_BK.shape[1], dim=1).values

    @property
    def worst_B(self) -> Tensor:
        """Each query's worst kept score; -inf while it has fewer than `num_kept` items."""
        return _scores_of(self._keys_BK[:, -1])

    def result(self) -> Shortlist:
        """The kept items, best first, padded at the end."""
        at_BK = LOW_BITS - (self._keys_BK & LOW_BITS)
        return Shortlist(_scores_of(self._keys_BK), at_BK.masked_fill(self._keys_BK == NO_KEY, NO_ITEM))


def best_products(
    queries_BQD: Tensor, items_NXD: Tensor, mask: ShardMask, num_kept: int, margin_B: Tensor
) -> Shortlist:
    """The `num_kept` allowed items with the largest inner products, exact; queries are padded with zeros."""
    allowed, num_queries = allow(mask, items_NXD.device), len(mask)
    floor_B, capacity = _sampled_floor(queries_BQD, items_NXD, mask, num_kept)
    lists = collect(queries_BQD, items_NXD, allowed, floor_B, capacity)
    kept = Kept(num_queries, num_kept, items_NXD.device)
    kept.add(gathered_products(queries_BQD, items_NXD, lists), lists)
    # An item that is not listed scores below floor + margin. A list that overflowed has lost entries.
    is_proven_B = (lists.counts_B <= capacity) & ((floor_B == -torch.inf) | (kept.worst_B >= floor_B + margin_B))
    best = kept.result()
    open_B = (~is_proven_B).nonzero()[:, 0]
    for start in range(0, len(open_B), SWEEP_QUERIES):
        some_B = open_B[start : start + SWEEP_QUERIES]
        part = mask.take(some_B.cpu().numpy())
        swept = _sweep(queries_BQD[some_B], items_NXD, allow(part, items_NXD.device), num_kept, margin_B[some_B])
        best.scores_BM[some_B], best.at_BM[some_B] = swept.scores_BM, swept.at_BM
    return best


def _sampled_floor(queries_BQD: Tensor, items_NXD: Tensor, mask: ShardMask, num_kept: int) -> tuple[Tensor, int]:
    """(B,) a floor that somewhat more than the wanted number of items should reach, and the capacity of their lists."""
    num_eligible, sampled = mask.num_items, torch.arange(0, mask.num_items, SAMPLE_STEP, device=items_NXD.device)
    if mask.is_eligible_N is not None:
        eligible = mask.is_eligible_N.nonzero()[:, 0]
        num_eligible, sampled = len(eligible), eligible[::SAMPLE_STEP]
    everything_B = torch.full((len(queries_BQD),), -torch.inf, device=items_NXD.device)
    capacity = max(MIN_CAPACITY, padded_size(2 * SAMPLE_STEP * int(_rank(torch.tensor(num_kept)))))
    if num_eligible <= capacity:
        return everything_B, max(1, num_eligible)
    sample_SD = items_NXD[sampled, 0]
    num_wanted_B = num_kept + torch.from_numpy(mask.excluded.lengths)
    # A higher rank would overflow a list; a query with that many exclusions is swept unless it is lucky.
    rank_B = _rank(num_wanted_B).clamp_max(capacity // SAMPLE_STEP * 5 // 8).to(items_NXD.device)
    maxima_BM = bin_maxima(queries_BQD[:, 0], sample_SD, BINS_PER_RANK * int(rank_B.max()))
    largest_BM = maxima_BM.topk(min(int(rank_B.max()), maxima_BM.shape[1]), dim=1).values
    return largest_BM.gather(1, (rank_B - 1).clamp_max(largest_BM.shape[1] - 1)[:, None])[:, 0], capacity


def _rank(num_wanted: Tensor) -> Tensor:
    """The rank in the sample of a product that, but for bad luck, at least `num_wanted` of all items reach."""
    expected = num_wanted / SAMPLE_STEP
    return (expected + SIGMAS * expected.sqrt() + SIGMAS).ceil().long()


def _sweep(queries_BQD: Tensor, items_NXD: Tensor, allowed: Allowed, num_kept: int, margin_B: Tensor) -> Shortlist:
    """Find the best products, whatever the scores are like: one range of items after the other, with room for all."""
    kept = Kept(len(queries_BQD), num_kept, items_NXD.device)
    for low in range(0, len(items_NXD), SWEEP_ITEMS):
        high = min(low + SWEEP_ITEMS, len(items_NXD))
        lists = collect(queries_BQD, items_NXD, allowed, kept.worst_B - margin_B, high - low, low, high)
        kept.add(gathered_products(queries_BQD, items_NXD, lists), lists)
    return kept.result()


def _keys(scores: Tensor, at: Tensor) -> Tensor:
    """Integers that sort like results: the score's bits, made to sort like numbers, above the item's complement."""
    bits = (scores + 0.0).view(torch.int32).long()  # -0.0 becomes 0.0, its equal
    return (bits.where(bits >= 0, bits ^ 0x7FFFFFFF) << 32) | (LOW_BITS - at.long())


def _scores_of(keys: Tensor) -> Tensor:
    ordered = keys >> 32
    bits = ordered.where(ordered >= 0, ordered ^ 0x7FFFFFFF)
    return bits.to(torch.int32).view(torch.float32).masked_fill(keys == NO_KEY, -torch.inf)
