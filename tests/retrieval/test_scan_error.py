"""Exact search on an index whose scans are as wrong as they may be."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.data.lists import NO_ITEM, Lists
from pipeline.model.mol import QuerySide
from pipeline.retrieval.bonuses import Bonuses
from pipeline.retrieval.filters import Rules, ShardMask
from pipeline.retrieval.index import Shortlist, Table, hide_missing
from pipeline.retrieval.search import search_shard
from pipeline.settings import SearchSettings, TableDtype
from tests.retrieval.worlds import as_lists, brute_force

NUM_QUERIES, NUM_ITEMS, K = 4, 150, 5


@dataclass(frozen=True)
class NoisyIndex:
    """A `ShardIndex` whose scans are off by up to `scan_error`. The gate of a query holds its row in the tables."""

    exact_BN: Tensor
    noisy_BN: Tensor
    scan_error: float
    first_row: int = 0
    num_item_components: int = 1
    temperature: float = 1.0
    table_dtypes: tuple[TableDtype, ...] = ("float32",)
    product_error: float = 0.0
    scan_skips: bool = False

    @property
    def bytes_of(self) -> Mapping[str, int]:
        return {}

    def __len__(self) -> int:
        return self.exact_BN.shape[1]

    def preselect(self, table: Table, queries_BD: Tensor, num_kept: int, mask: ShardMask) -> Shortlist:
        """Items in order of their numbers, which says nothing of their scores."""
        at_BM = torch.arange(min(num_kept, len(self))).repeat(len(queries_BD), 1)
        scores_BM = mask.hide(torch.zeros(at_BM.shape), 0)
        return Shortlist(scores_BM, at_BM.masked_fill(scores_BM.isneginf(), NO_ITEM))

    def score(self, queries: QuerySide, at_BM: Tensor, is_quick: bool = False) -> Tensor:
        return hide_missing(self.noisy_BN[rows_of(queries)].gather(1, at_BM.clamp_min(0)), at_BM)

    def rescore(self, queries: QuerySide, at_BM: Tensor) -> Tensor:
        return hide_missing(self.exact_BN[rows_of(queries)].gather(1, at_BM.clamp_min(0)), at_BM)

    def scan(
        self, queries: QuerySide, num_kept: int, mask: ShardMask, floor_B: Tensor, max_scored: int
    ) -> tuple[Shortlist, Tensor]:
        noisy_BN = mask.hide(self.noisy_BN[rows_of(queries)].clone(), 0)
        scores_BM, at_BM = noisy_BN.topk(min(num_kept, len(self)), dim=1)
        is_below_BM = (scores_BM < floor_B[:, None]) | scores_BM.isneginf()
        kept = Shortlist(scores_BM.masked_fill(is_below_BM, -torch.inf), at_BM.masked_fill(is_below_BM, NO_ITEM))
        return kept, torch.full_like(floor_B, -torch.inf)


def rows_of(queries: QuerySide) -> Tensor:
    return queries.gate_BP[:, 0].long()


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10_000),
    error=st.floats(0.05, 2.0),
    method=st.sampled_from(["exact", "exact_two_stage", "topk_avg"]),
    kind=st.sampled_from(["any", "worst"]),
)
def test_errors_of_a_scan_within_its_bound_never_reach_the_list(seed, error, method, kind):
    """Even when every item of the true list is scanned too low and every other one too high."""
    torch.manual_seed(seed)
    exact_BN = 3 * torch.rand(NUM_QUERIES, NUM_ITEMS)
    noise_BN = error * (2 * torch.rand(NUM_QUERIES, NUM_ITEMS) - 1)
    if kind == "worst":
        noise_BN = torch.full_like(exact_BN, error).scatter(1, exact_BN.topk(K, dim=1).indices, -error)
    index = NoisyIndex(exact_BN, exact_BN + noise_BN, error + 1e-6)
    rows_B1 = torch.arange(NUM_QUERIES, dtype=torch.float32)[:, None]
    queries = QuerySide(rows_B1[:, None], rows_B1)
    config = SearchSettings(k=K, method=method, num_preselected=NUM_ITEMS)
    nothing = Lists.of([np.empty(0, np.int32)] * NUM_QUERIES)
    found = search_shard(index, queries, Rules(nothing), config)
    assert as_lists(found) == brute_force(exact_BN, K)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10_000),
    error=st.floats(0.05, 2.0),
    method=st.sampled_from(["exact", "exact_two_stage", "topk_avg"]),
    largest=st.sampled_from([0.0, 1.0, 3.0, 1e8]),
    num_bonuses=st.sampled_from([3, 20, NUM_ITEMS]),
)
def test_errors_of_a_score_within_its_bound_never_reach_the_list_of_items_with_a_bonus(
    seed, error, method, largest, num_bonuses
):
    """In two shards; every item of the true list is scored too low and every other one too high. A bonus of 1e8
    rounds the scores to steps of 8."""
    torch.manual_seed(seed)
    exact_BN = 3 * torch.rand(NUM_QUERIES, NUM_ITEMS)
    rows_BM = torch.rand(NUM_QUERIES, NUM_ITEMS).argsort(dim=1)[:, :num_bonuses].sort(dim=1).values
    amounts_BM = largest * torch.rand(rows_BM.shape) if largest < 10 else torch.full(rows_BM.shape, largest)
    sums_BN = exact_BN.scatter_add(1, rows_BM, amounts_BM)
    expected = brute_force(sums_BN, K)
    best_BK = torch.tensor([[row for _, row in entries] for entries in expected])
    noisy_BN = exact_BN + torch.full_like(exact_BN, error).scatter(1, best_BK, -error)
    bonuses = Bonuses(Lists.of(rows_BM.numpy()), amounts_BM.flatten().numpy(), NUM_ITEMS)
    queries_B1 = torch.arange(NUM_QUERIES, dtype=torch.float32)[:, None]
    config = SearchSettings(k=K, method=method, num_preselected=NUM_ITEMS)
    found = None
    for part in (slice(0, 75), slice(75, NUM_ITEMS)):
        index = NoisyIndex(exact_BN[:, part], noisy_BN[:, part], error + 1e-6, part.start)
        rules = Rules(Lists.empty(NUM_QUERIES), bonuses=bonuses)
        found = search_shard(index, QuerySide(queries_B1[:, None], queries_B1), rules, config, found)
    assert as_lists(found) == expected
