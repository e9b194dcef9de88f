"""The steps of the low-rank fit, each against its definition."""

import pytest
import torch
from torch import Tensor

from pipeline.retrieval import low_rank_fit
from pipeline.retrieval.low_rank_fit import NUM_WANTED, RANK_RECALL, WITHIN, fit_low_rank
from tests.retrieval.worlds import make_world


def scores_of_rank(rank: int, num_queries: int = 40, num_items: int = 60, noise: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(num_queries, rank, generator=generator)
    right = torch.randn(rank, num_items, generator=generator)
    return left @ right + noise * torch.randn(num_queries, num_items, generator=generator)


@pytest.mark.parametrize("top_weight", [0.0, 10.0, 1_000.0])
def test_a_querys_coefficients_are_those_of_weighted_least_squares(top_weight, monkeypatch):
    """Item by item: a row per item, times the root of its weight; also when the queries are fitted a few at a time."""
    scores_LS = scores_of_rank(5, noise=0.5)
    directions = low_rank_fit._directions(scores_LS, 6)
    values_LT, best_LT = scores_LS.topk(7, dim=1)
    monkeypatch.setattr(low_rank_fit, "QUERIES_AT_ONCE", 16)
    ours = low_rank_fit._top_coefficients(directions, values_LT, best_LT, top_weight)
    vectors_SR = (directions.vectors_SR + directions.centre_R)[:, :-1].double()
    mean_S = scores_LS.mean(dim=0)
    for query in range(len(scores_LS)):
        root_S1 = torch.ones(scores_LS.shape[1], 1, dtype=torch.float64)
        root_S1[best_LT[query]] = (1 + top_weight) ** 0.5
        deviations_S1 = (scores_LS[query] - mean_S).double()[:, None]
        expected_R = torch.linalg.lstsq(root_S1 * vectors_SR, root_S1 * deviations_S1).solution[:, 0]
        # The whole mean is taken off here; the fit takes off a share of it, the weight of the mean.
        coefficients_R = (ours[0][query] - ours[1][query]).double()
        torch.testing.assert_close(coefficients_R, expected_R, rtol=1e-3, atol=1e-3 * float(expected_R.norm()))
    assert bool(ours[1].abs().max() == 0) == (top_weight == 0), "without a top weight the mean has its own direction"


def test_the_directions_are_the_singular_vectors_of_the_scores_without_their_mean():
    scores_LS = scores_of_rank(30, noise=0.1)
    directions = low_rank_fit._directions(scores_LS, 9)
    vectors_SR = directions.vectors_SR + directions.centre_R
    deviations_LS = scores_LS - scores_LS.mean(dim=0)
    _, _, right = torch.linalg.svd(deviations_LS, full_matrices=False)
    # Each of the eight is a singular vector, up to its sign and to what the mean score adds along it.
    along = deviations_LS.T @ directions.basis_LR[:, :-1]
    assert torch.allclose((right[:8] @ along).abs(), torch.eye(8), atol=1e-3)
    assert torch.allclose(vectors_SR[:, -1], scores_LS.mean(dim=0) / directions.mean_size, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 4, 11])
def test_pivots_end_where_the_rows_before_explain_all(rank):
    scores_LS = scores_of_rank(rank).double()
    pivots = low_rank_fit._pivots(scores_LS @ scores_LS.T, 20).tolist()
    assert len(pivots) == len(set(pivots)) == rank
    assert torch.linalg.matrix_rank(scores_LS[pivots]) == rank
    assert pivots[0] == int(scores_LS.norm(dim=1).argmax())


def test_each_pivot_is_the_row_that_those_before_it_explain_least():
    scores_LS = scores_of_rank(12).double()
    pivots = low_rank_fit._pivots(scores_LS @ scores_LS.T, 6).tolist()
    for number in range(1, 6):
        basis, _ = torch.linalg.qr(scores_LS[pivots[:number]].T)
        unexplained_L = (scores_LS - scores_LS @ basis @ basis.T).norm(dim=1)
        assert pivots[number] == int(unexplained_L.argmax())


def test_a_constant_score_leaves_one_pivot_and_a_finite_table():
    """No score says anything: whatever the table holds, it must be finite."""
    world = make_world(num_queries=40, num_items=60)
    fit = fit_low_rank(world.queries, torch.ones(40, 60), [3])
    assert torch.isfinite(fit.low_rank.item_vectors(torch.ones(len(fit.low_rank.at_A), 60))).all()
    assert torch.isfinite(fit.query_map(world.queries)).all()
    assert low_rank_fit._pivots(torch.zeros(5, 5, dtype=torch.float64), 3).tolist() == [0]


@pytest.mark.parametrize("item_share", [1.0, 0.25])
def test_the_candidates_needed_are_the_rank_below_which_hardly_a_best_item_is(item_share):
    """Counted one by one: the smallest number of first items by prediction that hold RANK_RECALL of the best."""
    world = make_world(num_queries=96, num_items=300)
    scores_LS = world.mol(world.queries, world.items).detach()
    held = low_rank_fit._held_out(world.queries, scores_LS, 84, item_share)
    assert held.num_wanted == min(round(NUM_WANTED * item_share), 300 // max(WITHIN))
    predicted_HS = scores_LS[84:] + torch.randn(12, 300, generator=torch.Generator().manual_seed(3))
    best = [set(row.topk(held.num_wanted).indices.tolist()) for row in scores_LS[84:]]
    orders = [row.argsort(descending=True).tolist() for row in predicted_HS]

    def share_within(num_first: int) -> float:
        hits = sum(len(mine & set(order[:num_first])) for mine, order in zip(best, orders, strict=True))
        return hits / (12 * held.num_wanted)

    needed = held.num_needed(predicted_HS)
    assert share_within(needed) >= RANK_RECALL > share_within(needed - 1)


def test_the_rotation_keeps_every_product():
    rotation_RR = low_rank_fit._rotation(17, seed=4)
    torch.testing.assert_close(rotation_RR @ rotation_RR.T, torch.eye(17), rtol=0, atol=1e-6)
    assert torch.equal(rotation_RR, low_rank_fit._rotation(17, seed=4))
    assert not torch.allclose(rotation_RR, low_rank_fit._rotation(17, seed=5))
