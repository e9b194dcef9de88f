"""TopKLowRank: one inner product per item that follows MoL itself, instead of its mean component.

The score matrix of queries and items is close to low rank though a score is no inner product. Exact scores of all items
against a sample of tonight's queries give each item a short vector (ANNCUR, Yadav et al. 2022, for cross-encoders); a
query finds its own either by a linear map of its features, fitted on the sample (distilled), or by its exact scores
against a few landmark items (landmark). The fit sees all queries of the sample with a share of the items; for the other
items the scores against a few of the queries, the anchors, tell nearly as much.

Legend: L sample queries, A anchors, B queries, S sampled items, N items, R rank, Z features, Q/X query/item components,
D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.model.mol import ItemSide, MixtureOfLogits, QuerySide
from pipeline.retrieval.index import ShardIndex

ITEMS_AT_ONCE = 2_048


@dataclass(frozen=True)
class DistilledMap:
    """A query's vector from its own components and gate: no exact score is needed."""

    centre_Z: Tensor
    weights_ZR: Tensor

    def to(self, device: torch.device | str) -> "DistilledMap":
        """The same map on a device."""
        return DistilledMap(self.centre_Z.to(device), self.weights_ZR.to(device))

    def __call__(self, queries: QuerySide) -> Tensor:
        vectors_BR: Tensor = (query_features(queries) - self.centre_Z) @ self.weights_ZR
        return vectors_BR


@dataclass(frozen=True)
class LandmarkMap:
    """A query's vector from its exact scores against S landmark items: what fits them best."""

    mol: MixtureOfLogits
    landmarks: ItemSide
    centre_S: Tensor
    weights_SR: Tensor
    bias_R: Tensor

    def __call__(self, queries: QuerySide) -> Tensor:
        scores_BS = self.mol(queries, self.landmarks)
        vectors_BR: Tensor = (scores_BS - self.centre_S) @ self.weights_SR + self.bias_R
        return vectors_BR


@dataclass(frozen=True)
class LowRank:
    """What makes the low-rank table: an item's vector is its scores against the anchors times the basis, less a centre.

    The last direction before the rotation is the mean score. The rotation spreads every direction over all columns, so
    that one scale serves the whole table in 8 bits.
    """

    anchors: QuerySide  # (A, Q, D) and (A, P)
    at_A: Tensor  # which queries of the sample they are
    basis_AR: Tensor
    centre_R: Tensor

    def to(self, device: torch.device | str) -> "LowRank":
        """The same on a device."""
        tables = (table.to(device) for table in (self.at_A, self.basis_AR, self.centre_R))
        return LowRank(self.anchors.to(device), *tables)

    def place(self, scores_AN: Tensor) -> Tensor:
        """(N, R): the vectors of items from their exact scores against the anchors."""
        vectors_NR: Tensor = scores_AN.T @ self.basis_AR - self.centre_R
        return vectors_NR


@dataclass(frozen=True)
class RankTrial:
    """What a fit of one rank did on the held-out queries."""

    rank: int
    recall: float  # mean share of the best items within WITHIN times their number
    num_needed: float  # K' for RANK_RECALL, in the whole corpus
    multiply_adds: float  # per query: of stage 1 over all items, and of stage 2 for so many candidates


@dataclass(frozen=True)
class Fit:
    """A fitted low-rank stage 1, and what was chosen on queries that were held out of the fit."""

    low_rank: LowRank
    query_map: DistilledMap
    ridge: float
    mean_weight: float
    top_weight: float
    trials: tuple[RankTrial, ...]

    @property
    def chosen(self) -> RankTrial:
        """The trial of this fit's rank."""
        return next(trial for trial in self.trials if trial.rank == len(self.low_rank.centre_R))


def query_features(queries: QuerySide) -> Tensor:
    """(B, Z): components, gate, their absolute values, and 1."""
    values_BV = torch.cat([queries.components_BQD.flatten(1), queries.gate_BP], dim=1)
    return torch.cat([values_BV, values_BV.abs(), torch.ones_like(values_BV[:, :1])], dim=1)


def pair_multiply_adds(mol: MixtureOfLogits) -> int:
    """Of one exact score: the component products and the two layers of the gate."""
    hidden, pairs = mol.cross_hidden.weight.shape
    return int(pairs * (mol.settings.component_dim + 2 * hidden))


def fit_landmarks(
    mol: MixtureOfLogits,
    low_rank: LowRank,
    sample: QuerySide,
    landmarks: ItemSide,
    mean_weight: float,
    ridge: float = 0.01,
) -> LandmarkMap:
    """The other way to place a query among the vectors of the same table: least squares on S landmark items."""
    vectors_SR = low_rank.place(mol(low_rank.anchors, landmarks))
    # The direction of the mean in the rotated table: what all queries of the sample add up to.
    mean_S = mol(sample, landmarks).mean(dim=0)
    gram_RR = vectors_SR.T @ vectors_SR
    gram_RR += ridge * gram_RR.diagonal().mean() * torch.eye(len(gram_RR))
    weights_SR = torch.linalg.solve(gram_RR, vectors_SR.T).T
    return LandmarkMap(mol, landmarks, mean_S, weights_SR, mean_weight * (mean_S - mean_S.mean()) @ weights_SR)


def low_rank_table(index: ShardIndex, low_rank: LowRank) -> Tensor:
    """(N, R): the vectors of a shard's items, a tile of quick scores (A, N) at a time."""
    tiles = [low_rank.place(scores_AN) for scores_AN in _score_tiles(index, low_rank.anchors)]
    return torch.cat([low_rank.centre_R.new_empty(0, len(low_rank.centre_R)), *tiles])


def score_all(index: ShardIndex, queries: QuerySide) -> Tensor:
    """(B, N): quick scores of all items of a shard."""
    return torch.cat(list(_score_tiles(index, queries)), dim=1)


def _score_tiles(index: ShardIndex, queries: QuerySide) -> Iterator[Tensor]:
    for low in range(0, len(index), ITEMS_AT_ONCE):
        at_N = torch.arange(low, min(low + ITEMS_AT_ONCE, len(index)), device=queries.gate_BP.device)
        yield index.score(queries, at_N.expand(len(queries.gate_BP), -1).contiguous(), is_quick=True)
