"""The low-rank table: its fit on a sample of queries, and what a search with it finds."""

from dataclasses import replace

import pytest
import torch

from pipeline.model.mol import QuerySide
from pipeline.retrieval.low_rank import (
    DistilledMap,
    LowRank,
    low_rank_table,
    pair_multiply_adds,
    query_features,
    score_all,
)
from pipeline.retrieval.low_rank_fit import HELD_OUT_SHARE, WITHIN, fit_low_rank
from pipeline.retrieval.search import search_shard
from pipeline.retrieval.shard import make_shard
from pipeline.settings import SearchSettings
from tests.retrieval.test_algorithms import K, ask, search
from tests.retrieval.worlds import World, as_lists, make_world, open_index


@pytest.mark.usefixtures("backend")
def test_the_low_rank_table_of_a_shard_comes_from_its_exact_scores():
    world = make_world(num_items=70)
    sample = make_world(num_queries=40, seed=5).queries
    scores = world.mol(sample, world.items).detach()
    found = fit_low_rank(sample, scores, [6]).low_rank
    parts = [low_rank_table(open_index(world.mol, shard, SearchSettings()), found) for shard in world.shards(3)]
    expected = found.item_vectors(scores[found.at_A])
    assert (torch.cat(parts) - expected).norm() < 0.01 * expected.norm()  # stage 2 may score in bfloat16


def test_scores_of_low_rank_are_recovered_up_to_what_the_sample_spans():
    """With nearly as many directions as queries their scores come back, up to a constant per query."""
    sample, world = make_world(num_queries=24, seed=1).queries, make_world(num_items=300)
    scores = world.mol(sample, world.items).detach()
    fit = fit_low_rank(sample, scores, [20])
    assert len(fit.low_rank.at_A) == 21  # the other three chose between the fits
    vectors = fit.low_rank.item_vectors(scores[:21])
    wanted = scores[:21] - scores[:21].mean(dim=1, keepdim=True)
    solved = torch.linalg.lstsq(vectors.double(), wanted.T.double())
    error = (vectors.double() @ solved.solution - wanted.T).norm() / wanted.norm()
    assert error < 0.15


def products_of(world: World) -> torch.Tensor:
    """(B, N): inner products of one pair of components, of rank 8."""
    return 20 * world.queries.components_BQD[:, 0] @ world.items.components_NXD[:, 0].T


def test_scores_against_the_anchors_give_the_vectors_that_those_against_all_queries_give(monkeypatch):
    """Exactly where scores are of low rank, and nearly so under MoL, whose scores are not."""
    world = make_world(num_queries=400, num_items=900)
    for scores, most in ((products_of(world), 1e-2), (world.mol(world.queries, world.items).detach(), 0.35)):
        tables = {}
        for per_rank in (8, 1_000):
            monkeypatch.setattr("pipeline.retrieval.low_rank_fit.ANCHORS_PER_RANK", per_rank)
            fit = fit_low_rank(world.queries, scores[:, :600], [12])
            assert fit.low_rank.at_A.unique().numel() == len(fit.low_rank.at_A)
            assert torch.equal(fit.low_rank.anchors.gate_BP, world.queries.gate_BP[fit.low_rank.at_A])
            tables[len(fit.low_rank.at_A)] = fit.low_rank.item_vectors(scores[fit.low_rank.at_A])[600:]
        few, many = sorted(tables)
        assert few <= 12 * 8 < many == 350
        assert (tables[few] - tables[many]).norm() < most * tables[many].norm()


def test_a_rank_above_the_sample_is_refused():
    sample, world = make_world(num_queries=10).queries, make_world(num_items=300)
    with pytest.raises(ValueError, match="rank 64 is too much for 9 queries"):
        fit_low_rank(sample, world.mol(sample, world.items).detach(), [8, 64])


def test_a_larger_rank_is_chosen_where_it_saves_more_candidates_than_it_costs():
    """On the same scores: cheap candidates make the small rank the best, dear ones the large."""
    world = make_world(num_queries=400, num_items=600)
    scores = world.mol(world.queries, world.items).detach()
    fits = {price: fit_low_rank(world.queries, scores, [4, 16, 48], pair_cost=price) for price in (0, 1_000_000)}
    needed = [trial.num_needed for trial in fits[0].trials]
    assert needed[0] > needed[1] >= needed[2] >= 100
    assert fits[0].chosen.rank == 4
    assert fits[1_000_000].chosen.rank == (16 if needed[1] == needed[2] else 48)
    for price, fit in fits.items():
        assert [trial.rank for trial in fit.trials] == [4, 16, 48]
        assert all(t.multiply_adds == 600 * t.rank + price * t.num_needed for t in fit.trials)


@pytest.mark.parametrize("rank", [2, 7, 31])
def test_a_rank_among_others_is_fitted_as_it_is_alone(rank):
    world = make_world(num_queries=150, num_items=300)
    scores = world.mol(world.queries, world.items).detach()
    alone = fit_low_rank(world.queries, scores, [rank], pair_cost=0)
    among = fit_low_rank(world.queries, scores, [rank, 32], pair_cost=0)
    assert among.chosen == alone.chosen
    torch.testing.assert_close(among.low_rank.basis_AR, alone.low_rank.basis_AR)
    torch.testing.assert_close(among.query_map.weights_ZR, alone.query_map.weights_ZR, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("is_same_for_all", [False, True])
def test_scores_of_a_lower_rank_than_asked_for_are_found_again(is_same_for_all):
    """One pair of components is a plain inner product, here of eight numbers; the other directions say nothing."""
    world = make_world(num_queries=400, num_items=300)
    products = products_of(world)
    scores = products[:1].expand(400, -1) if is_same_for_all else products
    fit = fit_low_rank(world.queries, scores, [64])
    table = fit.low_rank.item_vectors(scores[fit.low_rank.at_A])
    predicted = fit.query_map(world.queries) @ table.T
    best, found = scores.topk(10, dim=1).indices, predicted.topk(20, dim=1).indices
    assert (best[:, :, None] == found[:, None, :]).any(dim=2).float().mean() > 0.98
    assert table.abs().max() < 100 * table.std()


@pytest.mark.usefixtures("backend")
def test_the_fitted_map_finds_far_more_than_the_mean_component():
    everybody = make_world(num_queries=330, num_items=400, max_excluded=0)
    sample, few = everybody.queries.take(slice(30, None)), everybody.excluded.narrow(0, 30)
    world = replace(everybody, queries=everybody.queries.take(slice(0, 30)), excluded=few)
    scores = world.mol(sample, world.items).detach()
    fit = fit_low_rank(sample, scores, [12])
    table = fit.low_rank.item_vectors(scores[fit.low_rank.at_A])
    index = open_index(world.mol, make_shard(0, world.items, table), ask("topk_low_rank", 40))
    exact = [{row for _, row in entries} for entries in as_lists(search(world, ask("exact")))]

    def recall(method: str) -> float:
        found = as_lists(search_shard(index, world.queries, world.rules, ask(method, 40), query_map=fit.query_map))
        return sum(len({row for _, row in f} & e) for f, e in zip(found, exact, strict=True)) / (30 * K)

    assert recall("topk_low_rank") > recall("topk_avg") + 0.2


def test_the_recall_of_a_fit_is_that_on_the_queries_that_were_held_out_of_it():
    """96 queries: the last 12 judge; the 84 before them are all anchors, so that the table is that of the fit."""
    num_items, rank = 300, 12
    world = make_world(num_queries=96, num_items=num_items)
    scores_LS = world.mol(world.queries, world.items).detach()
    fit = fit_low_rank(world.queries, scores_LS, [rank])
    num_fitted = 96 - round(96 * HELD_OUT_SHARE)
    assert fit.low_rank.at_A.tolist() == list(range(num_fitted))
    table_SR = fit.low_rank.item_vectors(scores_LS[fit.low_rank.at_A])

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


def test_a_querys_features_and_its_vector_by_hand():
    """Components 1 and -2, gate 3: they, their sizes, and 1; less a centre, times the weights."""
    queries = QuerySide(torch.tensor([[[1.0], [-2.0]]]), torch.tensor([[3.0]]))
    assert query_features(queries).tolist() == [[1.0, -2.0, 3.0, 1.0, 2.0, 3.0, 1.0]]
    weights = torch.zeros(7, 2)
    weights[1, 0], weights[4, 1], weights[6, 1] = 10.0, 1.0, 0.5
    query_map = DistilledMap(torch.tensor([0.0, -1.0, 0.0, 0.0, 0.5, 0.0, 0.0]), weights).to("cpu")
    assert query_map(queries).tolist() == [[-10.0, 2.0]]


def test_an_items_vector_by_hand():
    """Two anchors, rank 1: twice the first score less the second, less a centre of 3."""
    anchors = make_world(num_queries=2).queries
    low_rank = LowRank(anchors, torch.tensor([0, 1]), torch.tensor([[2.0], [-1.0]]), torch.tensor([3.0]))
    assert low_rank.to("cpu").item_vectors(torch.tensor([[5.0, 0.0, 1.0], [1.0, 4.0, 0.0]])).tolist() == [
        [6.0],
        [-7.0],
        [-1.0],
    ]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("at_once", [1, 7, 100])
def test_items_scored_a_tile_at_a_time_are_scored_as_at_once(monkeypatch, at_once):
    world = make_world(num_queries=4, num_items=30)
    index = open_index(world.mol, world.shards(1)[0], SearchSettings())
    whole = score_all(index, world.queries)
    monkeypatch.setattr("pipeline.retrieval.low_rank.ITEMS_AT_ONCE", at_once)
    assert whole.shape == (4, 30)
    torch.testing.assert_close(score_all(index, world.queries), whole, rtol=0, atol=0.01 / world.mol.temperature)
    assert (whole - world.mol(world.queries, world.items).detach()).abs().max() < 0.03 / world.mol.temperature


def test_the_price_of_a_pair_counts_every_multiplication():
    """Each of 6 pairs of components: a product of 8 numbers, and both layers of the gate's network."""
    mol = make_world().mol
    assert pair_multiply_adds(mol) == 6 * 8 + mol.cross_hidden.weight.numel() + mol.cross_out.weight.numel()
