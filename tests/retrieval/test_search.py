from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.lists import Lists
from pipeline.errors import InputError
from pipeline.model.mol import ItemSide, QuerySide
from pipeline.native.loader import Kernels
from pipeline.retrieval import backends
from pipeline.retrieval import search as search_module
from pipeline.retrieval.backends.torch import index as torch_index
from pipeline.retrieval.backends.torch.index import TorchIndex
from pipeline.retrieval.search import search_shard
from pipeline.retrieval.shard import Shard, make_shard, shard_bounds
from pipeline.retrieval.topk import TopK
from pipeline.settings import SearchSettings
from tests.retrieval.worlds import World, all_scores, as_lists, brute_force, make_world, open_index

BACKENDS = ["torch", "native", pytest.param("triton", marks=pytest.mark.slow)]
pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.parametrize("backend", BACKENDS, indirect=True)]


def search(
    world: World, num_shards: int, config: SearchSettings, order: int = 1, tiles: tuple[int, int] = (4, 32)
) -> TopK:
    found = None
    with mock.patch.multiple(torch_index, QUERY_TILE=tiles[0], ITEM_TILE=tiles[1]):
        for shard in world.shards(num_shards)[::order]:
            index = open_index(world.mol, shard, config)
            found = search_shard(index, world.queries, world.rules, config, found)
    assert found is not None
    return found


def config(k: int = 10, method: str = "exact", preselected: int = 1_000) -> SearchSettings:
    return SearchSettings(k=k, method=method, num_preselected=preselected)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 200), st.integers(1, 60), st.integers(1, 9), st.integers(1, 90))
def test_exact_search_equals_brute_force_in_float64(seed, num_items, k, query_tile, item_tile):
    world = make_world(num_queries=5, num_items=num_items, seed=seed)
    found = search(world, 1, config(k), tiles=(query_tile, item_tile))
    assert as_lists(found) == brute_force(all_scores(world), k)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7])
@pytest.mark.parametrize("tiles", [(1, 1), (2, 64), (64, 1_024)])
def test_shards_and_tiles_do_not_change_a_bit(num_shards, tiles):
    world = make_world(num_queries=6, num_items=97)
    whole = search(world, 1, config())
    for order in (1, -1):
        parts = search(world, num_shards, config(), order, tiles)
        assert torch.equal(parts.scores_BK, whole.scores_BK)
        assert torch.equal(parts.rows_BK, whole.rows_BK)


def test_the_other_queries_of_a_batch_do_not_change_a_bit():
    world = make_world(num_queries=8)
    together = search(world, 2, config())
    for query in range(8):
        alone = replace(
            world, queries=world.queries.take(slice(query, query + 1)), excluded=world.excluded.narrow(query, query + 1)
        )
        assert as_lists(search(alone, 2, config()))[0] == as_lists(together)[query]


def test_how_many_queries_are_held_at_once_changes_nothing(monkeypatch):
    world = make_world(num_queries=9)
    whole = search(world, 2, config())
    monkeypatch.setattr(search_module, "QUERIES_AT_ONCE", 4)
    parts = search(world, 2, config())
    assert torch.equal(parts.rows_BK, whole.rows_BK)
    assert torch.equal(parts.scores_BK, whole.scores_BK)


def test_topk_avg_that_preselects_everything_is_exact():
    world = make_world()
    assert as_lists(search(world, 3, config(method="topk_avg"))) == as_lists(search(world, 3, config()))


def test_topk_avg_keeps_the_best_of_what_the_mean_component_preselects():
    world = make_world(num_items=120)
    found = as_lists(search(world, 1, config(k=5, method="topk_avg", preselected=20)))
    scores_BN = all_scores(world)
    mean_BN = world.queries.components_BQD.mean(dim=1) @ world.items.components_NXD.mean(dim=1).T
    preselected = mean_BN.masked_fill(scores_BN.isneginf(), -torch.inf).topk(20, dim=1).indices
    outside_BN = torch.ones_like(scores_BN, dtype=torch.bool).scatter(1, preselected, False)
    assert found == brute_force(scores_BN.masked_fill(outside_BN, -torch.inf), 5)


def test_recall_of_topk_avg_rises_with_what_it_preselects():
    world = make_world(num_queries=40, num_items=400, max_excluded=0)
    exact = [{row for _, row in found} for found in as_lists(search(world, 1, config()))]
    recalls = []
    for preselected in (10, 50, 200, 400):
        found = as_lists(search(world, 1, config(method="topk_avg", preselected=preselected)))
        recalls.append(sum(len({r for _, r in f} & e) for f, e in zip(found, exact, strict=True)))
    assert recalls == sorted(recalls)
    assert recalls[0] < recalls[-1] == 40 * 10


def test_items_that_are_the_same_are_ordered_by_row():
    world = make_world(num_items=3, max_excluded=0)
    copies = torch.arange(3).repeat(200)
    twins = replace(world, items=world.items.take(copies))
    found = search(twins, 2, config(k=50))
    assert as_lists(found) == brute_force(all_scores(twins), 50)  # 200-fold ties, far more than the slack


def test_a_query_that_has_seen_everything_gets_nothing_and_one_left_item_is_found():
    world = make_world(num_queries=2, num_items=30)
    seen = replace(world, excluded=Lists.of([np.arange(30), np.delete(np.arange(30), 17)]))
    for method in ("exact", "topk_avg"):
        found = as_lists(search(seen, 3, config(method=method)))
        assert found[0] == []
        assert [row for _, row in found[1]] == [17]


def test_an_empty_shard_and_no_queries_change_nothing():
    world = make_world(num_items=5, max_excluded=0)
    assert as_lists(search(world, 9, config())) == as_lists(search(world, 1, config()))
    none = replace(world, queries=world.queries.take(slice(0, 0)), excluded=world.excluded.narrow(0, 0))
    assert len(search(none, 2, config())) == 0


def test_a_score_that_is_not_a_number_stops_the_search():
    world = make_world(num_items=40, max_excluded=0)
    components = world.items.components_NXD.clone()
    components[23] = torch.nan
    shard = make_shard(0, ItemSide(components, world.items.gate_NP))
    with pytest.raises(ValueError, match="not a number"):
        open_index(world.mol, shard, config())
    broken = QuerySide(world.queries.components_BQD * torch.inf, world.queries.gate_BP)
    index = open_index(world.mol, world.shards(1)[0], config())
    with pytest.raises(ValueError, match="not a number"):
        search_shard(index, broken, world.rules, config())


def test_float32_scores_stay_within_the_error_bound():
    worst = 0.0
    for seed in range(20):
        world = make_world(num_queries=20, num_items=200, max_excluded=0, seed=seed)
        with torch.inference_mode():
            error = (world.mol(world.queries, world.items) - all_scores(world)).abs().max()
        worst = max(worst, float(error) * world.mol.temperature)
    assert worst < 1e-5 / 2


def test_shard_bounds_cover_every_item_once():
    for num_items in (0, 1, 10, 97):
        bounds = shard_bounds(num_items, 7)
        assert [row for low, high in bounds for row in range(low, high)] == list(range(num_items))


def test_scores_do_not_depend_on_the_number_of_threads():
    world = make_world(num_queries=30, num_items=300)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = search(world, 2, config())
        torch.set_num_threads(2)
        two = search(world, 2, config())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.scores_BK, two.scores_BK)
    assert torch.equal(one.rows_BK, two.rows_BK)


def test_a_shard_moves_as_a_whole():
    shard = make_world().shards(1)[0]
    moved: Shard = shard.to("cpu")
    assert torch.equal(moved.mean_ND, shard.items.components_NXD.mean(dim=1))
    assert len(moved) == 150


@pytest.mark.parametrize("name", ["native", "triton"])
def test_a_backend_that_cannot_run_here_is_refused_by_name(name, monkeypatch):
    monkeypatch.setattr(backends, "native_kernels", lambda: Kernels(None, reason="none"))
    world = make_world(0, num_items=30)
    with pytest.raises(InputError, match=f"search.backend={name}.*search.backend=auto"):
        open_index(world.mol, world.shards(1)[0], config().model_copy(update={"backend": name}))


def test_the_portable_backend_can_be_asked_for():
    world = make_world(0, num_items=30)
    index = open_index(world.mol, world.shards(1)[0], config().model_copy(update={"backend": "torch"}))
    assert isinstance(index, TorchIndex)
