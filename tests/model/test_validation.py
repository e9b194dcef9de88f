import math

import numpy as np
import pytest
import torch

from pipeline.data.batches import ValidationUsers, validation_users
from pipeline.data.lists import Lists
from pipeline.model import validation
from pipeline.model.inputs import Events, QueryInput
from pipeline.model.model import RetrievalModel
from pipeline.model.validation import RankingSums
from tests.model.planted import NUM_ITEMS, SMALL_MODEL


def make_users(num_users: int = 60) -> ValidationUsers:
    rng = np.random.default_rng(5)
    histories = [rng.integers(NUM_ITEMS, size=rng.integers(0, 12)) for _ in range(num_users)]
    held_out = [rng.integers(NUM_ITEMS, size=rng.integers(0, 4)) for _ in range(num_users)]
    return validation_users(Lists.of(histories), Lists.of(held_out), np.arange(num_users))


def slow_sums(scores_BN: torch.Tensor, users: ValidationUsers, k: int) -> RankingSums:
    """Sort everything that each user has not seen; ties by row."""
    hits, ndcg = 0, 0.0
    for scores_N, user in zip(scores_BN, users.tiles(1), strict=True):
        unseen = [row for row in range(NUM_ITEMS) if row not in user.histories.values]
        best = sorted(unseen, key=lambda row: (-scores_N[row].item(), row))[:k]
        wanted = set(user.held_out.values.tolist())
        gains = [1 / math.log2(rank + 1) for rank in range(1, k + 1)]
        hits += bool(set(best) & wanted)
        ndcg += sum(g for g, row in zip(gains, best, strict=False) if row in wanted) / sum(gains[: len(wanted)])
    return RankingSums(hits, ndcg)


def assert_same(left: RankingSums, right: RankingSums) -> None:
    assert left.num_hits == right.num_hits
    assert left.ndcg == pytest.approx(right.ndcg)


@pytest.mark.parametrize(("query_tile", "item_tile"), [(128, 128), (7, 9), (1, 1)])
def test_the_ranks_of_the_model_are_those_of_sorting_all_unseen_items(monkeypatch, query_tile, item_tile):
    monkeypatch.setattr(validation, "QUERY_TILE", query_tile)
    monkeypatch.setattr(validation, "ITEM_TILE", item_tile)
    torch.manual_seed(0)
    model = RetrievalModel(SMALL_MODEL, NUM_ITEMS).eval().requires_grad_(False)
    users = make_users()
    rows_BL, _ = users.histories.last(SMALL_MODEL.max_length)
    query = model.query_side(QueryInput(Events(torch.from_numpy(rows_BL)), torch.from_numpy(users.user_keys)))
    scores_BN = model.mol(query, model.item_side(torch.arange(NUM_ITEMS)))
    for k in (1, 5, 20):
        model.train()  # as it comes from an epoch
        assert_same(validation.rank_by_model(model, users, k), slow_sums(scores_BN, users, k))


def test_ranks_by_popularity_settle_ties_by_row():
    users = make_users()
    counts = torch.tensor(np.random.default_rng(1).integers(5, size=NUM_ITEMS))
    scores_BN = counts.expand(len(users), -1)
    for k in (1, 5, 20):
        assert_same(validation.rank_by_counts(counts, users, k), slow_sums(scores_BN, users, k))


def test_no_users_no_hits():
    nobody = make_users().take(np.empty(0, dtype=np.int64))
    assert validation.rank_by_counts(torch.ones(NUM_ITEMS), nobody, 10) == RankingSums()


def test_a_score_that_is_not_a_number_finds_nothing():
    users = make_users()
    scores = torch.full((NUM_ITEMS,), torch.nan)
    assert validation.rank_by_counts(scores, users, 10) == RankingSums()
