"""Memory: the counts that become bonuses, and the choice of their weight against an oracle that sorts everything."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.batches import ValidationUsers, validation_users
from pipeline.data.lists import Lists
from pipeline.data.neighbours import Neighbours, score_by_counts
from pipeline.evaluation.metrics import MeanSum
from pipeline.model.inputs import Events, QueryInput
from pipeline.model.model import RetrievalModel
from pipeline.model.mol import ItemSide, MixtureOfLogits, QuerySide
from pipeline.retrieval import all_items, memory
from pipeline.retrieval.memory import Memory, MemoryBonuses, best_counts, choose, grid, ndcg_with_each
from tests.model.planted import NUM_ITEMS, SMALL_MODEL

MEMORIES = [Memory(0.0, 1.0), *grid([0.5, 4.0, 100.0], [0.01, 1.0])]


def make_neighbours(rng: np.random.Generator, num_items: int = NUM_ITEMS) -> Neighbours:
    lists = [np.sort(rng.choice(num_items, size=rng.integers(0, 9), replace=False)) for _ in range(num_items)]
    items = Lists.of(lists)
    # Few different scores, so that many are equal.
    return Neighbours(items, rng.choice(np.array([0.01, 0.25, 0.5], np.float32), len(items.values)))


def make_users(rng: np.random.Generator, num_users: int) -> ValidationUsers:
    histories = [rng.integers(NUM_ITEMS, size=rng.integers(0, 12)) for _ in range(num_users)]
    held_out = [rng.integers(NUM_ITEMS, size=rng.integers(0, 4)) for _ in range(num_users)]
    return validation_users(Lists.of(histories), Lists.of(held_out), np.arange(num_users))


def query_of(model: RetrievalModel, users: ValidationUsers) -> QuerySide:
    rows_BL, _ = users.histories.last(SMALL_MODEL.max_length)
    return model.query_side(QueryInput(Events(torch.from_numpy(rows_BL)), torch.from_numpy(users.user_keys)))


def slow_ndcg(
    scores_N: np.ndarray, counts: dict[int, float], user: ValidationUsers, of: Memory, k: int, needs_count: set[int]
) -> float:
    """Sort every item that the user has not seen by its sum; ties by row. Some items need a count in the sum."""
    sums = {}
    hidden = needs_count - set(counts) if of.weight else needs_count
    for row in set(range(NUM_ITEMS)) - set(user.histories.values.tolist()) - hidden:
        bonus = np.float32(of.weight * math.log1p(counts.get(row, 0.0) / of.scale))
        sums[row] = np.float32(scores_N[row]) + bonus
    best = sorted(sums, key=lambda row: (-sums[row], row))[:k]
    wanted = set(user.held_out.values.tolist())
    gains = [1 / math.log2(rank + 1) for rank in range(1, k + 1)]
    return sum(g for g, row in zip(gains, best, strict=False) if row in wanted) / sum(gains[: len(wanted)])


class TableMol(MixtureOfLogits):
    """Scores that are whole numbers, of which many are equal: the gate of a query has its score of each item."""

    def forward(self, query: QuerySide, items: ItemSide) -> torch.Tensor:
        return query.gate_BP @ items.gate_NP.mT


class TableModel(RetrievalModel):
    def __init__(self) -> None:
        super().__init__(SMALL_MODEL, NUM_ITEMS)
        self.mol = TableMol(SMALL_MODEL.dim, SMALL_MODEL.mol)

    def item_side(self, rows: torch.Tensor) -> ItemSide:
        return ItemSide(torch.zeros(len(rows), 2, 8), torch.eye(NUM_ITEMS)[rows])


def assert_ranked_as_sorted(
    model: RetrievalModel,
    query: QuerySide,
    users: ValidationUsers,
    neighbours: Neighbours,
    cutoff: int,
    backend="torch",
    needs_count_N: torch.Tensor | None = None,
) -> None:
    counts = best_counts(neighbours, users.histories, users.seen, 300)
    found = ndcg_with_each(MEMORIES, model, query, users, counts, cutoff, backend, needs_count_N)
    needs_count = set() if needs_count_N is None else set(needs_count_N.nonzero().flatten().tolist())
    scores_BN = model.mol(query, model.item_side(torch.arange(NUM_ITEMS))).numpy()
    for number, user in enumerate(users.tiles(1)):
        first, end = counts.items.offsets[number : number + 2]
        of_user = dict(zip(counts.items[number].tolist(), counts.scores[first:end].tolist(), strict=True))
        for each, ndcg_B in zip(MEMORIES, found, strict=True):
            expected = slow_ndcg(scores_BN[number], of_user, user, each, cutoff, needs_count)
            assert ndcg_B[number] == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 3, 10]), st.sampled_from([7, 64]), st.integers(1, 8))
def test_the_ranks_of_every_memory_are_those_of_sorting_all_items(seed, cutoff, tile, num_scores):
    rng = np.random.default_rng(seed)
    users = make_users(rng, 8)
    scores_BN = torch.from_numpy(rng.integers(num_scores, size=(len(users), NUM_ITEMS))).float()
    query = QuerySide(torch.zeros(len(users), 3, 8), scores_BN)
    needs_count_N = None if seed % 2 else torch.from_numpy(rng.random(NUM_ITEMS) < 0.3)
    model = TableModel().eval().requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(all_items, "ITEMS_AT_ONCE", tile)
        patch.setattr(all_items, "NUM_SEEDS", 1)
        assert_ranked_as_sorted(model, query, users, make_neighbours(rng), cutoff, needs_count_N=needs_count_N)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_the_ranks_are_those_of_the_models_scores(backend, monkeypatch):
    monkeypatch.setattr(all_items, "ITEMS_AT_ONCE", 17)
    monkeypatch.setattr(all_items, "NUM_SEEDS", 1)
    torch.manual_seed(0)
    model = RetrievalModel(SMALL_MODEL, NUM_ITEMS).eval().requires_grad_(False)
    model.item_embedding.weight *= 30  # scores that differ
    rng = np.random.default_rng(1)
    users = make_users(rng, 60)
    assert_ranked_as_sorted(model, query_of(model, users), users, make_neighbours(rng), 10, backend)


def test_only_the_best_counts_of_items_not_seen_are_kept(monkeypatch):
    monkeypatch.setattr(memory, "QUERIES_AT_ONCE", 3)
    rng = np.random.default_rng(2)
    neighbours, histories = make_neighbours(rng), Lists.of(rng.integers(NUM_ITEMS, size=n) for n in range(8))
    seen = Lists.of(rng.integers(NUM_ITEMS, size=9 - n) for n in range(8))
    kept, scored = best_counts(neighbours, histories, seen, 5), score_by_counts(neighbours, histories)
    assert len(kept) == 8
    for query in range(8):
        (first, end), (start, stop) = (each.items.offsets[query : query + 2] for each in (kept, scored))
        scores = dict(zip(scored.items[query].tolist(), scored.scores[start:stop].tolist(), strict=True))
        new = sorted(set(scores) - set(seen[query].tolist()), key=lambda row: (-scores[row], row))
        assert kept.items[query].tolist() == sorted(new[:5])
        assert kept.scores[first:end].tolist() == [scores[row] for row in sorted(new[:5])]


def test_a_bonus_is_the_weight_times_the_logarithm_of_the_count():
    neighbours = Neighbours(Lists.of([[2], [0, 3], [], []]), np.array([0.5, 0.25, 3.0], np.float32))
    histories = Lists.of([[0], [2], [0, 1]])
    bonuses = MemoryBonuses(Memory(2.0, 0.25), neighbours, 10)(histories, histories)
    assert [bonuses.rows[query].tolist() for query in range(3)] == [[2], [], [2, 3]]
    expected = [2 * math.log(3.0), 2 * math.log(1 + 0.8 * 0.5 / 0.25), 2 * math.log(13.0)]
    assert bonuses.amounts.tolist() == pytest.approx(expected)
    assert bonuses.num_items == 4


def test_a_weight_must_be_better_than_none_by_more_than_chance():
    memories = list(grid([2, 1, 0], [0.5, 0.1]))
    assert memories == [Memory(1, 0.1), Memory(1, 0.5), Memory(2, 0.1), Memory(2, 0.5)]
    certain, likely = MeanSum.of(np.array([0.1, 0.2, 0.1, 0.2])), MeanSum.of(np.array([0.9, -0.5, 0.5, -0.3]))
    worse, nothing = MeanSum.of(np.full(4, -0.1)), MeanSum.of(np.zeros(4))
    assert choose(memories, [worse, certain, certain, nothing]) == 1, "the smaller weight of equal ones"
    assert choose(memories, [worse, likely, worse, worse]) is None
    assert choose(memories, [nothing] * 4) is None
    assert choose(memories, [MeanSum()] * 4) is None, "there are no users"
    assert choose([], []) is None
