"""Laws that one-line faults in the search, the tuning and the low-rank fit would break."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.model.mol import QuerySide
from pipeline.retrieval import search as search_module
from pipeline.retrieval import tuning
from pipeline.retrieval.filters import ShardMask, no_exclusions
from pipeline.retrieval.index import Shortlist, Table, hide_missing
from pipeline.retrieval.low_rank_fit import HELD_OUT_SHARE, WITHIN, fit_low_rank
from pipeline.retrieval.search import search_shard
from pipeline.retrieval.topk import NO_ITEM, TopK
from pipeline.retrieval.tuning import overlaps, tune
from pipeline.settings import SearchSettings, TableDtype
from tests.retrieval.worlds import as_lists, brute_force, make_world, open_index

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

    @property
    def is_eligible_N(self) -> Tensor:
        return torch.ones(len(self), dtype=torch.bool)

    def __len__(self) -> int:
        return self.exact_BN.shape[1]

    def preselect(self, table: Table, queries_BD: Tensor, num_kept: int, mask: ShardMask) -> Shortlist:
        """Items in order of their numbers, which says nothing of their scores."""
        at_BM = torch.arange(min(num_kept, len(self))).repeat(len(queries_BD), 1)
        return Shortlist(torch.zeros(at_BM.shape), at_BM)

    def score(self, queries: QuerySide, at_BM: Tensor, is_quick: bool = False) -> Tensor:
        return hide_missing(self.noisy_BN[rows_of(queries)].gather(1, at_BM.clamp_min(0)), at_BM)

    def rescore(self, queries: QuerySide, at_BM: Tensor) -> Tensor:
        return hide_missing(self.exact_BN[rows_of(queries)].gather(1, at_BM.clamp_min(0)), at_BM)

    def scan(
        self, queries: QuerySide, num_kept: int, mask: ShardMask, floor_B: Tensor, max_scored: int
    ) -> tuple[Shortlist, Tensor]:
        noisy_BN = self.noisy_BN[rows_of(queries)]
        scores_BM, at_BM = noisy_BN.topk(min(num_kept, len(self)), dim=1)
        is_below_BM = scores_BM < floor_B[:, None]
        kept = Shortlist(scores_BM.masked_fill(is_below_BM, -torch.inf), at_BM.masked_fill(is_below_BM, NO_ITEM))
        return kept, torch.full_like(floor_B, -torch.inf)


def rows_of(queries: QuerySide) -> Tensor:
    return queries.gate_BP[:, 0].long()


@settings(max_examples=150, deadline=None)
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
    found = search_shard(index, queries, no_exclusions(NUM_QUERIES), config)
    assert as_lists(found) == brute_force(exact_BN, K)


def test_how_many_queries_are_held_at_once_changes_nothing(monkeypatch):
    world = make_world(num_queries=9)
    config = SearchSettings(k=10)
    index = open_index(world.mol, world.shards(1)[0], config)
    whole = search_shard(index, world.queries, world.excluded, config)
    monkeypatch.setattr(search_module, "QUERIES_AT_ONCE", 4)
    parts = search_shard(index, world.queries, world.excluded, config)
    assert torch.equal(parts.rows_BK, whole.rows_BK)
    assert torch.equal(parts.scores_BK, whole.scores_BK)


def test_an_exact_scan_on_the_portable_backend_scores_every_item():
    world = make_world(num_items=300, max_excluded=0)
    config = SearchSettings(k=300, backend="torch")
    index = open_index(world.mol, world.shards(1)[0], config)
    found = search_shard(index, world.queries, world.excluded, config)
    assert (found.rows_BK.sort(dim=1).values == torch.arange(300)).all()


def test_a_list_is_not_proven_when_what_was_missed_can_tie_with_its_last_score():
    """A missed item of score 1 and a lower row would be in the list."""
    scores_BK, rows_BK = torch.tensor([[2.0, 1.0]] * 4), torch.tensor([[3, 7]] * 4)
    found = TopK(scores_BK, rows_BK, torch.tensor([0.99, 1.0, 1.5, -torch.inf]))
    assert found.is_proven_B.tolist() == [True, False, False, True]
    assert found.gaps_B.tolist() == [0.0, 0.0, 0.5, 0.0]


def test_a_trials_lower_bound_is_the_recall_less_two_standard_errors_or_by_the_rule_of_three(monkeypatch):
    """Each trial is run again, by its settings, and its recall's bound is worked out by Python."""
    monkeypatch.setattr(tuning, "_seconds", lambda *_: 1e-6)  # no method is too slow: all are tried to the end
    monkeypatch.setattr(tuning, "MAX_SHARE", 1.0)
    world = make_world(num_queries=30, num_items=60)
    config = SearchSettings(k=8, method="tuned", target_recall=1.0)
    index = open_index(world.mol, world.shards(1)[0], config)
    choice = tune(lambda _: index, world.queries, world.excluded, config, None, max_seconds=60)
    exact = search_shard(index, world.queries, world.excluded, config.model_copy(update={"method": "exact"}))
    assert {trial.recall == 1 for trial in choice.trials[1:]} == {True, False}
    for trial in choice.trials[1:]:
        again = config.model_copy(update=trial.settings)
        found = search_shard(index, world.queries, world.excluded, again)
        recalls = overlaps(found.rows_BK, exact.rows_BK).tolist()
        mean = sum(recalls) / 30
        deviation = math.sqrt(sum((recall - mean) ** 2 for recall in recalls) / 29)
        margin = 1.959964 * deviation / math.sqrt(30) if mean < 1 else 3 / (30 * 8)
        assert trial.recall == pytest.approx(mean)
        assert trial.recall_low == pytest.approx(mean - margin)


def test_the_recall_of_a_fit_is_that_on_the_queries_that_were_held_out_of_it():
    """96 queries: the last 12 judge; the 84 before them are all anchors, so that the table is that of the fit."""
    num_items, rank = 300, 12
    world = make_world(num_queries=96, num_items=num_items)
    scores_LS = world.mol(world.queries, world.items).detach()
    fit = fit_low_rank(world.queries, scores_LS, [rank])
    num_fitted = 96 - round(96 * HELD_OUT_SHARE)
    assert fit.low_rank.at_A.tolist() == list(range(num_fitted))
    table_SR = fit.low_rank.place(scores_LS[fit.low_rank.at_A])

    def recall(part: slice) -> float:
        predicted = fit.query_map(world.queries.take(part)) @ table_SR.T
        num_wanted = num_items // max(WITHIN)
        shares = []
        for query_S, true_S in zip(predicted, scores_LS[part], strict=True):
            best = set(true_S.topk(num_wanted).indices.tolist())
            shares += [len(best & set(query_S.topk(num_wanted * n).indices.tolist())) / num_wanted for n in WITHIN]
        return sum(shares) / len(shares)

    assert fit.chosen.recall == pytest.approx(recall(slice(num_fitted, None)), abs=2e-3)
    assert abs(fit.chosen.recall - recall(slice(0, 96 - num_fitted))) > 0.02


def test_of_a_share_of_the_items_as_many_more_candidates_are_needed_in_the_whole_corpus():
    world = make_world(num_queries=400, num_items=600)
    scores_LS = world.mol(world.queries, world.items).detach()
    (whole,) = fit_low_rank(world.queries, scores_LS, [4], item_share=1.0, pair_cost=1).trials
    (half,) = fit_low_rank(world.queries, scores_LS, [4], item_share=0.6, pair_cost=1).trials
    assert whole.num_needed > 100
    assert half.num_needed == pytest.approx(whole.num_needed / 0.6)
    assert half.multiply_adds == pytest.approx(4 * 600 / 0.6 + half.num_needed)
