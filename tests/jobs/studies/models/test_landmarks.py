import torch

from jobs.studies.models.landmarks import fit_landmarks
from jobs.studies.searches import table_of
from pipeline.retrieval.low_rank_fit import fit_low_rank
from tests.retrieval.worlds import make_world


def test_exact_scores_against_a_quarter_of_the_items_find_far_more_than_the_mean_component():
    world = make_world(num_queries=330, num_items=400, max_excluded=0)
    queries, sample = world.queries.take(slice(0, 30)), world.queries.take(slice(30, None))
    scores_LN = world.mol(sample, world.items).detach()
    fit = fit_low_rank(sample, scores_LN, [12])
    landmarks = fit_landmarks(
        world.mol, fit.low_rank, sample, world.items.take(torch.arange(0, 400, 4)), fit.mean_weight
    )
    truth_BK = world.mol(queries, world.items).topk(6, dim=1).indices

    def recall(predicted_BN: torch.Tensor) -> float:
        kept_BM = predicted_BN.topk(40, dim=1).indices
        return float((truth_BK[:, :, None] == kept_BM[:, None, :]).any(dim=2).float().mean())

    by_landmarks = landmarks(queries) @ table_of(fit.low_rank, scores_LN).T
    by_mean = queries.mean_BD @ world.items.mean_ND.T
    assert recall(by_landmarks) > recall(by_mean) + 0.25
