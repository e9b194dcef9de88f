"""Another way from a query to its vector for the low-rank table: exact scores against a few landmark items.

Legend: B queries, S landmark items, R rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.model.mol import ItemSide, MixtureOfLogits, QuerySide
from pipeline.retrieval.low_rank import LowRank


@dataclass(frozen=True)
class LandmarkMap:
    """The map from a query to the vector that fits its exact scores against the landmarks best."""

    mol: MixtureOfLogits
    landmarks: ItemSide
    centre_S: Tensor
    weights_SR: Tensor
    bias_R: Tensor

    def __call__(self, queries: QuerySide) -> Tensor:
        scores_BS = self.mol(queries, self.landmarks)
        vectors_BR: Tensor = (scores_BS - self.centre_S) @ self.weights_SR + self.bias_R
        return vectors_BR


def fit_landmarks(
    mol: MixtureOfLogits,
    low_rank: LowRank,
    sample: QuerySide,
    landmarks: ItemSide,
    mean_weight: float,
    ridge: float = 0.01,
) -> LandmarkMap:
    """Fit by least squares on the landmarks, for the table of `low_rank`, which was fitted on `sample`."""
    vectors_SR = low_rank.item_vectors(mol(low_rank.anchors, landmarks))
    # The sample queries' mean score: it gives the direction of the mean in the rotated table.
    mean_S = mol(sample, landmarks).mean(dim=0)
    gram_RR = vectors_SR.T @ vectors_SR
    ridge_RR = ridge * gram_RR.diagonal().mean() * torch.eye(len(gram_RR))
    weights_SR = torch.linalg.solve(gram_RR + ridge_RR, vectors_SR.T).T
    return LandmarkMap(mol, landmarks, mean_S, weights_SR, mean_weight * (mean_S - mean_S.mean()) @ weights_SR)
