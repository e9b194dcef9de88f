"""What every backend promises (`ShardIndex`), against the slow way: all scores in a rectangle, and Python's sort."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.lists import NO_ITEM, Lists
from pipeline.retrieval.filters import Eligibility, Rules, ShardMask
from pipeline.retrieval.index import ShardIndex, Shortlist, hide_missing
from pipeline.retrieval.shard import Shard, make_shard
from pipeline.settings import SearchSettings
from tests.retrieval.worlds import World, all_scores, make_world, open_index

pytestmark = pytest.mark.usefixtures("backend")

EXACT_TABLES = SearchSettings(table_dtype="float32")
TABLES = ["mean", "low_rank", 0, 1]


def opened(world: World, first_row: int = 40) -> tuple[ShardIndex, Shard]:
    """All items as one shard that does not begin the corpus, with a low-rank table of six random numbers each."""
    numbers = torch.randn(len(world.items.gate_NP), 6, generator=torch.Generator().manual_seed(1))
    shard = make_shard(first_row, world.items, numbers)
    return open_index(world.mol, shard, EXACT_TABLES), shard


def table_of(shard: Shard, table: str | int) -> torch.Tensor:
    named = {"mean": shard.mean_ND, "low_rank": shard.low_rank_NR}
    return named[table] if isinstance(table, str) else shard.items.components_NXD[:, table]


def mask_of(world: World, seed: int) -> ShardMask:
    """Each query's own exclusions, and a third of the items for nobody."""
    num_queries, num_items = len(world.excluded), len(world.items.gate_NP)
    is_eligible = torch.rand(1, 40 + num_items, generator=torch.Generator().manual_seed(seed)) > 0.3
    excluded = Lists(world.excluded.offsets, world.excluded.values + np.int32(40))
    return Rules(excluded, Eligibility(is_eligible, np.zeros(num_queries, dtype=np.int64))).for_shard(40, num_items)


def kept(found: Shortlist) -> list[list[tuple[float, int]]]:
    """What a shortlist holds, best first."""
    rows = zip(found.scores_BM.tolist(), found.at_BM.tolist(), strict=True)
    pairs = ([pair for pair in zip(*row, strict=True) if pair[1] != NO_ITEM] for row in rows)
    return [sorted(row, key=lambda pair: (-pair[0], pair[1])) for row in pairs]


@pytest.mark.parametrize("table", TABLES)
@settings(max_examples=12)
@given(seed=st.integers(0, 1_000), num_items=st.integers(1, 90), num_kept=st.integers(1, 100))
def test_stage_1_keeps_the_allowed_items_with_the_largest_inner_products(table, seed, num_items, num_kept):
    world = make_world(num_queries=5, num_items=num_items, seed=seed)
    index, shard = opened(world)
    mask = mask_of(world, seed)
    rows_ND = table_of(shard, table)
    queries_BD = torch.randn(5, rows_ND.shape[1], generator=torch.Generator().manual_seed(seed))
    queries_BD = queries_BD / queries_BD.norm(dim=1, keepdim=True)
    products_BN = mask.hide((queries_BD.double() @ rows_ND.double().T), 0)
    found = index.preselect(table, queries_BD, num_kept, mask)
    assert found.at_BM.dtype == torch.int64
    for query, pairs in enumerate(kept(found)):
        allowed = products_BN[query][products_BN[query] > -torch.inf].sort(descending=True).values
        assert len(pairs) == min(num_kept, len(allowed))
        assert len({item for _, item in pairs}) == len(pairs)
        for (score, item), best in zip(pairs, allowed.tolist(), strict=False):
            assert score == pytest.approx(float(products_BN[query, item]), abs=2e-5)
            assert score == pytest.approx(best, abs=2e-5)


@settings(max_examples=12)
@given(seed=st.integers(0, 1_000), num_items=st.integers(1, 90), num_candidates=st.integers(0, 40))
def test_stage_2_scores_the_pairs_it_is_given_and_nothing_where_there_is_none(seed, num_items, num_candidates):
    """In any order, repeated or missing."""
    world = make_world(num_queries=4, num_items=num_items, max_excluded=0, seed=seed)
    index, _ = opened(world)
    rng = np.random.default_rng(seed)
    at_BM = torch.from_numpy(rng.integers(-1, num_items, (4, num_candidates)))
    true_BM = hide_missing(all_scores(world).gather(1, at_BM.clamp_min(0)), at_BM)
    rescored_BM = index.rescore(world.queries, at_BM)
    assert torch.equal(rescored_BM, true_BM), "float64, rounded once"
    for is_quick, error in ((False, index.scan_error), (True, 0.03 / index.temperature)):
        scores_BM = index.score(world.queries, at_BM, is_quick)
        assert torch.equal(scores_BM.isneginf(), at_BM == NO_ITEM)
        differences = (scores_BM - true_BM)[at_BM != NO_ITEM].abs()
        assert differences.numel() == 0 or float(differences.max()) <= error


@settings(max_examples=15)
@given(
    seed=st.integers(0, 1_000),
    num_items=st.integers(1, 90),
    num_kept=st.integers(1, 40),
    share=st.sampled_from([None, 0.0, 0.5, 0.95]),
    budget=st.sampled_from([0, 3, 1_000]),
)
def test_a_scan_holds_or_bounds_every_item_that_reaches_the_floor(seed, num_items, num_kept, share, budget):
    """Nothing that reaches the floor is lost: it is kept, or beaten by as many as are kept, or under the bound."""
    world = make_world(num_queries=4, num_items=num_items, seed=seed)
    index, _ = opened(world)
    mask, error = mask_of(world, seed), index.scan_error
    true_BN = mask.hide(all_scores(world), 0)
    allowed = true_BN.masked_fill(true_BN.isneginf(), torch.nan)
    floor_B = torch.full((4,), -torch.inf) if share is None else allowed.nanquantile(share, dim=1).nan_to_num(0.0)
    found, bound_B = index.scan(world.queries, num_kept, mask, floor_B, budget)
    for query, pairs in enumerate(kept(found)):
        held = {item for _, item in pairs}
        assert len(held) == len(pairs) <= num_kept
        assert all(score == pytest.approx(float(true_BN[query, item]), abs=error) for score, item in pairs)
        assert all(score >= float(floor_B[query]) - error for score, _ in pairs)
        worst = min((score for score, _ in pairs), default=-np.inf)
        for item, score in enumerate(true_BN[query].tolist()):
            if item not in held and score > max(-np.inf, float(floor_B[query]) + error):
                is_beaten = len(pairs) == num_kept and score <= worst + 2 * error
                assert is_beaten or score <= float(bound_B[query]) + error
    if budget >= num_items:
        assert bound_B.isneginf().all()


def test_an_index_says_how_many_items_it_holds_and_in_how_many_bytes():
    index, shard = opened(make_world(num_items=70), first_row=13)
    assert (len(index), index.first_row, index.num_item_components) == (70, 13, 2)
    assert index.bytes_of.keys() >= {"mean", "low_rank"}
    assert all(size >= 0 for size in index.bytes_of.values())
    assert sum(index.bytes_of.values()) >= 70 * 4 * (2 * 8 + shard.items.gate_NP.shape[1])  # a whole item in float32
    assert index.scan_error * index.temperature < 1e-3


def test_a_shortlist_is_squeezed_to_its_best():
    found = Shortlist(torch.tensor([[1.0, 5.0, -torch.inf, 3.0]]), torch.tensor([[7, 2, NO_ITEM, 9]]))
    assert kept(found.squeeze(2)) == [[(5.0, 2), (3.0, 9)]]
    assert found.squeeze(4) is found
    assert found.squeeze(0).at_BM.shape == (1, 0)


def test_the_model_is_left_as_it_was():
    """An index may keep copies in other precisions; the model that it was made of is somebody else's too."""
    world = make_world(num_items=30)
    before = {name: value.clone() for name, value in world.mol.state_dict().items()}
    opened(world)[0].rescore(world.queries, torch.zeros(9, 3, dtype=torch.int64))
    after = world.mol.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
