from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.studies.search import worlds
from jobs.studies.search.market import Market, MarketRecipe, draw_histories, make_market
from jobs.studies.search.reference import ReferenceSearch
from jobs.studies.search.training import ModelRecipe, train_model
from jobs.studies.searches import exact_scores, ranks_of
from pipeline.model.inputs import Events, QueryInput
from pipeline.model.model import RetrievalModel
from pipeline.settings import MolSettings

MARKET = MarketRecipe(num_items=600, num_values=(8, 60), aspect_shares=(0.3, 0.7), max_tastes=2, dim=16, max_length=8)
TINY = ModelRecipe(
    market=MARKET,
    num_query_components=3,
    num_item_components=2,
    component_dim=8,
    num_steps=30,
    start="aligned",
    gate_preference=0.1,
    users_per_step=32,
    num_negatives=32,
    query_hidden_dim=24,
    gate_hidden_dim=12,
)
MOL = MolSettings(
    num_query_components=3, num_item_components=2, component_dim=8, query_hidden_dim=24, gate_hidden_dim=12
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def world(cache: Path) -> worlds.BenchWorld:
    return worlds.trained_world("tiny", TINY, cache, num_queries=200, num_sample=300)


def make_again(cache: Path, recipe: ModelRecipe = TINY) -> worlds.BenchWorld:
    return worlds.trained_world("tiny", recipe, cache, num_queries=200, num_sample=300)


def test_a_world_is_made_once_and_read_from_the_cache(world, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(worlds, "train_model", lambda *_: pytest.fail("trained again"))
    again = make_again(cache)
    assert torch.equal(world.items.components_NXD, again.items.components_NXD)
    assert torch.equal(world.queries.gate_BP, again.queries.gate_BP)
    np.testing.assert_array_equal(world.exclusions.values, again.exclusions.values)
    with pytest.raises(pytest.fail.Exception):
        make_again(cache, replace(TINY, learning_rate=0.001))  # another recipe is another file


def test_a_training_that_dies_leaves_nothing_behind_that_is_taken_for_a_world(tmp_path: Path, monkeypatch):
    def die(tensors, path: Path) -> None:
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(worlds, "save_file", die)
    with pytest.raises(KeyboardInterrupt):
        make_again(tmp_path, replace(TINY, num_steps=1))
    monkeypatch.undo()
    assert len(make_again(tmp_path, replace(TINY, num_steps=1)).items.gate_NP) == MARKET.num_items


def test_the_same_recipe_gives_the_same_world(world, tmp_path: Path):
    again = make_again(tmp_path)
    torch.testing.assert_close(world.queries.components_BQD, again.queries.components_BQD)


def test_what_excludes_an_item_is_that_the_user_has_had_it(world):
    histories = draw_histories(make_market(MARKET), 200, worlds.QUERY_STREAM)
    np.testing.assert_array_equal(world.exclusions.offsets, histories.offsets)
    np.testing.assert_array_equal(world.exclusions.values, histories.values)


def test_queries_and_sample_are_different_users(world):
    assert len(world.sample.gate_BP) == 300
    assert not torch.allclose(world.sample.gate_BP[:200], world.queries.gate_BP)


def test_the_cached_sides_score_as_the_raw_rows_do(world):
    result = ReferenceSearch(world.mol, world.item_rows_NE).brute_force(world.encodings_BE[:5], 10)
    scores_BN = exact_scores(world.mol, world.queries.take(slice(0, 5)), world.items)
    torch.testing.assert_close(result.scores_BK, scores_BN.topk(10, dim=1).values, atol=1e-4, rtol=0)


def test_training_ranks_a_users_next_item_higher_than_its_warm_start_does():
    """The last event of new users, from the events before it; by chance one half of the items are above it."""
    market = make_market(MARKET)
    before, after = (share_above(train_model(replace(TINY, num_steps=n), market), market) for n in (1, 60))
    assert before < 0.5
    assert after < before - 0.05


def share_above(model: RetrievalModel, market: Market) -> float:
    histories = draw_histories(market, 400, stream=7)
    rows_BL, lengths_B = histories.last(MARKET.max_length)
    users = np.flatnonzero(lengths_B >= 2)
    rows_BL, last_B1 = torch.from_numpy(rows_BL[users]).long(), torch.from_numpy(lengths_B[users]).long()[:, None] - 1
    targets_B1 = rows_BL.gather(1, last_B1)
    with torch.inference_mode():
        before = Events(rows_BL.scatter(1, last_B1, -1))
        queries = model.query_side(QueryInput(before, torch.zeros(len(rows_BL), dtype=torch.int64)))
        scores_BN = model.mol(queries, model.item_side(torch.arange(MARKET.num_items)))
    return float((scores_BN > scores_BN.gather(1, targets_B1)).float().mean())


class TestSynthetic:
    def make(self, sharpness: float) -> worlds.BenchWorld:
        return worlds.synthetic_world(MARKET, MOL, sharpness, num_queries=40, num_sample=8)

    def test_uniform_gates_make_the_mean_exact_and_sharper_ones_make_it_miss(self):
        needed = []
        for sharpness in (0.0, 0.3):
            world = self.make(sharpness)
            best_BK = exact_scores(world.mol, world.queries, world.items).topk(10, dim=1).indices
            ranks_BK = ranks_of(world.queries.mean_BD @ world.items.mean_ND.T, best_BK)
            needed.append(1 + int(ranks_BK.flatten().float().quantile(0.99)))
        assert needed[0] == 10
        assert needed[1] > 50

    def test_a_users_own_items_score_above_most_others(self):
        world = self.make(0.3)
        scores_BN = exact_scores(world.mol, world.queries, world.items)
        last = world.exclusions.values[world.exclusions.offsets[1:] - 1]
        own_B1 = scores_BN.gather(1, torch.from_numpy(last).long()[:, None])
        assert float((scores_BN < own_B1).float().mean()) > 0.8

    def test_a_gate_too_narrow_for_its_pairs_is_refused(self):
        with pytest.raises(ValueError, match="gate_hidden_dim"):
            worlds.synthetic_world(MARKET, MOL.model_copy(update={"gate_hidden_dim": 5}), num_queries=2, num_sample=2)

    def test_its_size_is_what_was_asked_for(self):
        world = worlds.load_bench_world("synthetic", num_items=20_000)
        assert world.items.components_NXD.shape == (20_000, 8, 32)
