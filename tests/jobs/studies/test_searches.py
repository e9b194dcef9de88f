"""The judge of the studies: exact scores and the ranks of the true best."""

import torch

from jobs.studies.searches import exact_scores, ranks_of
from tests.retrieval.worlds import all_scores, make_world


def test_exact_scores_are_those_of_the_model_in_float64():
    world = make_world(max_excluded=0)
    torch.testing.assert_close(
        exact_scores(world.mol, world.queries, world.items), all_scores(world), atol=1e-4, rtol=0
    )


def test_a_rank_is_the_number_of_items_that_are_predicted_above():
    predicted_BN = torch.tensor([[0.1, 0.9, 0.5, 0.7], [4.0, 3.0, 2.0, 1.0]])
    best_BK = torch.tensor([[2, 1], [3, 0]])
    assert ranks_of(predicted_BN, best_BK).tolist() == [[2, 0], [3, 0]]
