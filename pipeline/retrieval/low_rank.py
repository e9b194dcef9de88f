"""TopKLowRank: stage 1 by one inner product per item that predicts the MoL score.

The matrix of scores, queries × items, is close to low rank, though a score is no inner product. Exact scores of all
items against a sample of tonight's queries give each item a short vector (ANNCUR, Yadav et al. 2022, for
cross-encoders); a query's own vector is a linear map of its features, fitted on the same sample. The fit uses the
scores of all sample queries for a share of the items. Every other item is scored only against some of these queries,
the anchors, which tell nearly as much.

Legend: A anchors, B queries, N items, R rank, Z features, P pairs of components, Q query components, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.model.mol import MixtureOfLogits, QuerySide
from pipeline.retrieval.index import ShardIndex

ITEMS_AT_ONCE = 2_048


@dataclass(frozen=True)
class DistilledMap:
    """The map from a query to its vector, linear in features of components and gate, without any exact score."""

    centre_Z: Tensor
    weights_ZR: Tensor

    def to(self, device: torch.device | str) -> "DistilledMap":
        """The same map on a device."""
        return DistilledMap(self.centre_Z.to(device), self.weights_ZR.to(device))

    def __call__(self, queries: QuerySide) -> Tensor:
        vectors_BR: Tensor = (query_features(queries) - self.centre_Z) @ self.weights_ZR
        return vectors_BR


@dataclass(frozen=True)
class LowRank:
    """Makes the low-rank table: an item's vector is its scores against the anchors times the basis, less a centre.

    A random rotation of the basis spreads every direction over all columns, so that one scale serves the whole table in
    8 bits.
    """

    anchors: QuerySide  # (A, Q, D) and (A, P)
    at_A: Tensor  # numbers of the anchors in the sample
    basis_AR: Tensor
    centre_R: Tensor

    def to(self, device: torch.device | str) -> "LowRank":
        """The same table maker on a device."""
        tables = (table.to(device) for table in (self.at_A, self.basis_AR, self.centre_R))
        return LowRank(self.anchors.to(device), *tables)

    def item_vectors(self, scores_AN: Tensor) -> Tensor:
        """(N, R): the vectors of items from their exact scores against the anchors."""
        vectors_NR: Tensor = scores_AN.T @ self.basis_AR - self.centre_R
        return vectors_NR


@dataclass(frozen=True)
class RankTrial:
    """The quality and cost of a fit of one rank, measured on the held-out queries."""

    rank: int
    recall: float  # mean share of a query's n best items that are among the first WITHIN · n by prediction
    num_needed: float  # K' that gives RANK_RECALL in the whole corpus
    multiply_adds: float  # per query: stage 1 over all items, and stage 2 for `num_needed` candidates


@dataclass(frozen=True)
class Fit:
    """A fitted low-rank stage 1, with the weights that were chosen on held-out queries (low_rank_fit.py)."""

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
    """Multiply-adds of one exact score: the component products and the two layers of the gate."""
    hidden, pairs = mol.cross_hidden.weight.shape
    return int(pairs * (mol.settings.component_dim + 2 * hidden))


def low_rank_table(index: ShardIndex, low_rank: LowRank) -> Tensor:
    """(N, R): the vectors of a shard's items, a tile of quick scores (A, N) at a time."""
    tiles = [low_rank.item_vectors(scores_AN) for scores_AN in _score_tiles(index, low_rank.anchors)]
    return torch.cat([low_rank.centre_R.new_empty(0, len(low_rank.centre_R)), *tiles])


def score_all(index: ShardIndex, queries: QuerySide) -> Tensor:
    """(B, N): quick scores of all items of a shard."""
    return torch.cat(list(_score_tiles(index, queries)), dim=1)


def _score_tiles(index: ShardIndex, queries: QuerySide) -> Iterator[Tensor]:
    for low in range(0, len(index), ITEMS_AT_ONCE):
        at_N = torch.arange(low, min(low + ITEMS_AT_ONCE, len(index)), device=queries.gate_BP.device)
        yield index.score(queries, at_N.expand(len(queries.gate_BP), -1).contiguous(), is_quick=True)
