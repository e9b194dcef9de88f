"""The yardstick scores as our model does, and its algorithms obey the laws that follow from the paper."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.studies.search.reference import ReferenceSearch
from pipeline.data.lists import NO_ITEM, Lists
from pipeline.model.mol import MixtureOfLogits
from pipeline.retrieval import brute_force as baselines
from pipeline.retrieval.filters import Rules
from pipeline.retrieval.shard import make_shard
from pipeline.retrieval.topk import TopK
from pipeline.settings import MolSettings

NUM_ITEMS, NUM_QUERIES, K = 120, 5, 7
METHODS = [
    ("topk_avg", {"num_kept": 12}),
    ("topk_per_embd", {"num_per_embd": 9}),
    ("comb_topk", {"num_per_embd": 4, "num_kept": 12}),
]


class World:
    """Random gates, sharp enough that the mean logit misleads."""

    def __init__(self, seed: int = 0, stage1_dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(seed)
        mol_settings = MolSettings(
            num_query_components=3, num_item_components=2, component_dim=8, query_hidden_dim=16, gate_hidden_dim=12
        )
        self.mol = MixtureOfLogits(10, mol_settings).eval()
        self.queries_BE = torch.randn(NUM_QUERIES, 10) * 3
        self.rows_NE = torch.randn(NUM_ITEMS, 10) * 3
        self.search = ReferenceSearch(self.mol, self.rows_NE, stage1_dtype)
        with torch.inference_mode():
            shard = make_shard(0, self.mol.item_side(self.rows_NE))
            queries = self.mol.query_side(self.queries_BE)
        self.scores_BN, self.rows_BN = baselines.brute_force(
            self.mol, queries, [shard], Rules(Lists.empty(NUM_QUERIES)), NUM_ITEMS
        )

    def recall(self, result: TopK) -> float:
        hits = [len(set(a[a >= 0]) & set(b)) for a, b in zip(result.rows_BK.numpy(), self.rows_BN[:, :K], strict=True)]
        return sum(hits) / (K * NUM_QUERIES)


def test_brute_force_is_that_of_the_oracle():
    world = World()
    result = world.search.brute_force(world.queries_BE, K)
    np.testing.assert_array_equal(result.rows_BK.numpy(), world.rows_BN[:, :K])
    np.testing.assert_allclose(result.scores_BK.numpy(), world.scores_BN[:, :K], atol=1e-4)


@pytest.mark.parametrize(
    ("method", "numbers"),
    [
        ("topk_avg", {"num_kept": NUM_ITEMS}),
        ("topk_per_embd", {"num_per_embd": NUM_ITEMS}),
        ("comb_topk", {"num_per_embd": 1, "num_kept": NUM_ITEMS}),
    ],
)
def test_a_first_stage_that_keeps_everything_is_exact(method: str, numbers: dict[str, int]):
    world = World(stage1_dtype=torch.bfloat16)
    result = getattr(world.search, method)(world.queries_BE, K, **numbers)
    np.testing.assert_array_equal(result.rows_BK.numpy(), world.rows_BN[:, :K])


@settings(max_examples=20)
@given(seed=st.integers(0, 1_000))
def test_more_candidates_never_lower_recall_and_both_lists_find_more_than_either(seed: int):
    world = World(seed)
    queries_BE = world.queries_BE
    averages = [world.recall(world.search.topk_avg(queries_BE, K, kept)) for kept in (K, 12, 30, 70)]
    per_embd = [world.recall(world.search.topk_per_embd(queries_BE, K, kept)) for kept in (1, 4, 9, 30)]
    assert averages == sorted(averages)
    assert per_embd == sorted(per_embd)
    both = world.recall(world.search.comb_topk(queries_BE, K, 4, 12))
    assert both >= max(averages[1], per_embd[1])


@pytest.mark.parametrize(("method", "numbers"), METHODS)
def test_what_is_found_is_found_once_in_order_and_has_its_true_score(method: str, numbers: dict[str, int]):
    world = World(stage1_dtype=torch.bfloat16)
    result = getattr(world.search, method)(world.queries_BE, K, **numbers)
    for query in range(NUM_QUERIES):
        true = dict(zip(world.rows_BN[query].tolist(), world.scores_BN[query].tolist(), strict=True))
        rows = result.rows_BK[query].tolist()
        assert len(set(rows)) == K
        assert result.scores_BK[query].tolist() == sorted(result.scores_BK[query].tolist(), reverse=True)
        np.testing.assert_allclose(result.scores_BK[query].numpy(), [true[row] for row in rows], atol=1e-4)


def test_a_heuristic_can_miss_so_the_laws_above_could_fail():
    world = World()
    assert world.recall(world.search.topk_avg(world.queries_BE, K, K)) < 1


def test_too_few_candidates_are_padded_and_never_repeated():
    world = World()
    result = world.search.topk_per_embd(world.queries_BE, NUM_ITEMS, num_per_embd=2)
    for rows, scores in zip(result.rows_BK.tolist(), result.scores_BK.tolist(), strict=True):
        items = [row for row in rows if row != NO_ITEM]
        assert len(items) == len(set(items)) <= 2 * 6
        assert rows == items + [NO_ITEM] * (NUM_ITEMS - len(items))
        assert scores[len(items) :] == [-np.inf] * (NUM_ITEMS - len(items))


def test_the_same_query_alone_and_one_among_many_score_alike():
    world = World()
    alone = world.search.brute_force(world.queries_BE[:1], K)
    np.testing.assert_array_equal(alone.rows_BK.numpy(), world.rows_BN[:1, :K])


def test_a_model_with_a_user_component_is_refused():
    mol = MixtureOfLogits(10, MolSettings(num_user_hashes=5)).eval()
    with pytest.raises(ValueError, match="user component"):
        ReferenceSearch(mol, torch.randn(4, 10))
