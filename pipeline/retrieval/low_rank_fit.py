"""Fit the low-rank table on a sample of queries.

Legend: L sample queries, A anchors, H held-out queries, S sampled items, N items, R rank, Z features, T best items of a
query, K wanted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.model.mol import QuerySide
from pipeline.retrieval.low_rank import DistilledMap, Fit, LowRank, RankTrial, query_features

# How much of an item's mean score to add back to the low-rank prediction, which shrinks it. 1 would bury niche items
# (low mean, high peak). Chosen on held-out queries.
MEAN_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Extra least-squares weight of a sample query's best items when its vector is fitted. 0 fits all items alike; 1,000
# fits almost only the best. A weight helps real models and harms models far from low rank. Chosen alike.
TOP_WEIGHTS = (0.0, 10.0, 1_000.0)
RIDGES = (0.01, 0.001, 0.1, 1.0)  # as a share of the features' mean square; the weights are chosen with the first
HELD_OUT_SHARE = 0.125  # of the sample queries; the held-out ones choose ridge, weights and rank
QUERIES_AT_ONCE = 64  # fitted together: their best items' vectors take 16 MB at rank 64
# Directions per sample query: with as many directions as queries the fit follows their noise.
MAX_RANK_SHARE = 0.25
# A direction whose squared size is a smaller share of the largest one's is lost in the rounding of float32 sums.
NEGLIGIBLE = 1e-6
# Anchors per direction. With all queries as anchors, recall@100 of real models at K' = 200 is at most .001 higher at
# rank 64 and 128, and .005 at rank 32; half as many anchors cost .021 at rank 32.
ANCHORS_PER_RANK = 8
ITEMS_PER_ANCHOR = 4  # with fewer sampled items, all queries are anchors
ANCHOR_RIDGE = 1e-3  # as a share of an anchor's mean square
# A fit is judged by how many of a query's NUM_WANTED best items are among the first WITHIN · NUM_WANTED by prediction.
NUM_WANTED = 100
WITHIN = (2, 5, 10)
RANK_RECALL = 0.99  # the recall that each rank must reach; the candidates needed for it count as its cost


def fit_low_rank(
    sample: QuerySide,
    scores_LS: Tensor,
    ranks: Sequence[int],
    item_share: float = 1.0,
    pair_cost: int = 20_000,
    seed: int = 0,
) -> Fit:
    """Fit table and query map on exact scores (L, S) of sample queries against a share of the items, drawn uniformly.

    Some of the queries are held out; at every rank, the ridge and the weights of mean and top are chosen for the recall
    on the held-out queries. The rank is the one that reaches RANK_RECALL with the fewest multiply-adds, where one exact
    score takes `pair_cost` of them: a larger rank costs more for every item and leaves fewer candidates to score.
    Raises ValueError when there are not more fitted queries and items than directions.
    """
    num_fitted = len(scores_LS) - max(1, round(HELD_OUT_SHARE * len(scores_LS)))
    if max(ranks) > min(num_fitted - 1, scores_LS.shape[1]):
        raise ValueError(f"rank {max(ranks)} is too much for {num_fitted} queries and {scores_LS.shape[1]} items")
    held = _held_out(sample, scores_LS, num_fitted, item_share)
    everything = _directions(scores_LS[:num_fitted], max(ranks))
    fits: list[tuple[_Directions, _Chosen]] = []
    trials: list[RankTrial] = []
    for rank in ranks:
        directions = everything.first(rank)
        chosen = _fit_rank(held, directions)
        num_needed = max(NUM_WANTED, held.num_needed(chosen.predicted_HS) / item_share)
        cost = rank * scores_LS.shape[1] / item_share + num_needed * pair_cost
        fits.append((directions, chosen))
        trials.append(RankTrial(rank, chosen.recall, num_needed, cost))
    best = min(range(len(ranks)), key=lambda number: trials[number].multiply_adds)
    directions, chosen = fits[best]
    rotation_RR = _rotation(ranks[best], seed)
    at_A, basis_AR, centre_R = _anchors(scores_LS[:num_fitted], directions)
    low_rank = LowRank(sample.take(at_A), at_A, basis_AR @ rotation_RR, centre_R @ rotation_RR)
    query_map = DistilledMap(chosen.query_map.centre_Z, chosen.query_map.weights_ZR @ rotation_RR)
    return Fit(low_rank, query_map, chosen.ridge, chosen.mean_weight, chosen.top_weight, tuple(trials))


@dataclass(frozen=True)
class _Directions:
    """R directions of the sampled scores: R - 1 of the deviations from the items' mean scores, then the mean itself."""

    basis_LR: Tensor
    centre_R: Tensor
    vectors_SR: Tensor
    deviations_LR: Tensor  # products of the fitted queries' deviations with the R - 1 directions
    mean_size: Tensor  # a query's coefficient of the last direction is this times the weight of the mean

    def first(self, rank: int) -> "_Directions":
        """The `rank` - 1 most important deviations, and the mean."""
        columns = [*range(rank - 1), -1]
        return _Directions(
            self.basis_LR[:, columns],
            self.centre_R[columns],
            self.vectors_SR[:, columns],
            self.deviations_LR[:, : rank - 1],
            self.mean_size,
        )


@dataclass(frozen=True)
class _HeldOut:
    """The sample in two parts: L fitted queries with their best items, and H held-out queries, the judges."""

    fitted: QuerySide
    top_scores_LT: Tensor  # scores of the best items of each fitted query
    top_items_LT: Tensor  # numbers of these items among the sampled ones
    judges: QuerySide
    truth_HK: Tensor  # numbers of the best items of each judge

    @property
    def num_wanted(self) -> int:
        """K: `NUM_WANTED` times the share of the items that was sampled."""
        return self.truth_HK.shape[1]

    def recall(self, predicted_HS: Tensor) -> float:
        """Mean share of the K best items that are among the first WITHIN · K by prediction."""
        nums_kept = [min(self.num_wanted * times, predicted_HS.shape[1]) for times in WITHIN]
        best_HM = predicted_HS.topk(max(nums_kept), dim=1).values
        thresholds_HT = best_HM[:, [num - 1 for num in nums_kept]]
        is_among_HKT = predicted_HS.gather(1, self.truth_HK)[:, :, None] >= thresholds_HT[:, None, :]
        return float(is_among_HKT.float().mean())

    def num_needed(self, predicted_HS: Tensor) -> int:
        """Number of first items by prediction that hold the share RANK_RECALL of the best items."""
        ascending_HS = predicted_HS.sort(dim=1).values
        num_below_HK = torch.searchsorted(ascending_HS, predicted_HS.gather(1, self.truth_HK))
        ranks = (predicted_HS.shape[1] - num_below_HK).flatten().sort().values
        return int(ranks[math.ceil(RANK_RECALL * len(ranks)) - 1])


def _held_out(sample: QuerySide, scores_LS: Tensor, num_fitted: int, item_share: float) -> _HeldOut:
    num_items = scores_LS.shape[1]
    num_wanted = max(1, min(round(NUM_WANTED * item_share), num_items // max(WITHIN)))
    values_LT, best_LT = scores_LS[:num_fitted].topk(min(num_wanted * max(WITHIN), num_items), dim=1)
    return _HeldOut(
        sample.take(slice(0, num_fitted)),
        values_LT,
        best_LT,
        sample.take(slice(num_fitted, None)),
        scores_LS[num_fitted:].topk(num_wanted, dim=1).indices,
    )


@dataclass(frozen=True)
class _Chosen:
    """The map with the best recall on the held-out queries, and its predictions for them."""

    recall: float
    query_map: DistilledMap
    ridge: float
    mean_weight: float
    top_weight: float
    predicted_HS: Tensor


def _fit_rank(held: _HeldOut, directions: _Directions) -> _Chosen:
    """Try each top weight: choose the mean weight with the first ridge, then the ridge. Return the best map of all."""
    features_LZ = query_features(held.fitted)

    def tried(top_weight: float, mean_weight: float, ridge: float, pair: tuple[Tensor, Tensor]) -> _Chosen:
        coefficients_LR, of_mean_LR = pair
        wanted_LR = coefficients_LR - mean_weight * of_mean_LR
        query_map = _ridge_map(features_LZ, wanted_LR, ridge, mean_weight * directions.mean_size)
        predicted_HS = query_map(held.judges) @ directions.vectors_SR.T
        return _Chosen(held.recall(predicted_HS), query_map, ridge, mean_weight, top_weight, predicted_HS)

    best: list[_Chosen] = []
    for top in TOP_WEIGHTS:
        pair = _top_coefficients(directions, held.top_scores_LT, held.top_items_LT, top)
        by_mean = max((tried(top, mean, RIDGES[0], pair) for mean in MEAN_WEIGHTS), key=lambda each: each.recall)
        by_ridge = (tried(top, by_mean.mean_weight, ridge, pair) for ridge in RIDGES[1:])
        best.append(max([by_mean, *by_ridge], key=lambda each: each.recall))
    return max(best, key=lambda each: each.recall)


def _directions(scores_LS: Tensor, rank: int) -> _Directions:
    num_queries = len(scores_LS)
    mean_S = scores_LS.mean(dim=0)
    deviations_LS = scores_LS - mean_S
    values_L, vectors_LL = torch.linalg.eigh((deviations_LS @ deviations_LS.T).double())
    top = values_L.argsort(descending=True)[: rank - 1]
    # Where the scores are of a lower rank than was asked for, the remaining directions are nothing but rounding.
    is_real = values_L[top] > NEGLIGIBLE * values_L.max() + 1e-30
    inverse_scales = torch.where(is_real, values_L[top].clamp_min(1e-30).rsqrt(), 0.0)
    size = (mean_S - mean_S.mean()).norm()
    size = torch.where(size > 1e-6, size, 1.0)  # a corpus of one item has no spread
    mean_L1 = torch.full((num_queries, 1), 1 / num_queries) / size
    basis_LR = torch.cat([(vectors_LL[:, top] * inverse_scales).float(), mean_L1], dim=1)
    vectors_SR = scores_LS.T @ basis_LR
    centre_R = vectors_SR.mean(dim=0)
    return _Directions(basis_LR, centre_R, vectors_SR - centre_R, deviations_LS @ vectors_SR[:, :-1], size)


def _top_coefficients(
    directions: _Directions, scores_LT: Tensor, best_LT: Tensor, top_weight: float
) -> tuple[Tensor, Tensor]:
    """(L, R - 1) each: coefficients of each sample query's scores, and of the items' mean score.

    The caller subtracts the second, times the weight of the mean, from the first. Weighted least squares, in which an
    item of a query weighs 1 + top_weight if it is one of the query's `best_LT`, else 1: solve
    (V'V + top_weight · B'B) c = V'y + top_weight · B'y_best, with V all items' vectors and B the best items'.
    V is orthonormal, so V'V = 1, and V'y, up to the mean's part, is `deviations_LR`.
    """
    vectors_SR = directions.vectors_SR + directions.centre_R
    mean_S = vectors_SR[:, -1] * directions.mean_size
    unit_RR = torch.eye(vectors_SR.shape[1] - 1)
    parts = []
    for low in range(0, len(best_LT), QUERIES_AT_ONCE):
        best_AT = best_LT[low : low + QUERIES_AT_ONCE]
        best_ATR = vectors_SR[best_AT][..., :-1]
        wanted_AT2 = torch.stack([scores_LT[low : low + QUERIES_AT_ONCE], mean_S[best_AT]], dim=-1)
        right_AR2 = top_weight * best_ATR.mT @ wanted_AT2
        right_AR2[..., 0] += directions.deviations_LR[low : low + QUERIES_AT_ONCE]
        factor_ARR = torch.linalg.cholesky(unit_RR + top_weight * best_ATR.mT @ best_ATR)
        parts.append(torch.cholesky_solve(right_AR2, factor_ARR))
    coefficients_LR2 = torch.cat(parts)
    return coefficients_LR2[..., 0], coefficients_LR2[..., 1]


def _ridge_map(features_LZ: Tensor, wanted_LR: Tensor, ridge: float, bias: Tensor) -> DistilledMap:
    """Fit the coefficients by ridge regression; the last direction gets the constant `bias`.

    The last feature is 1, and its row of the weights is the bias.
    """
    centre_Z = features_LZ.mean(dim=0)
    centre_Z[-1] = 0
    scale_Z = (features_LZ - centre_Z).square().mean(dim=0).sqrt().clamp_min(1e-6)
    inputs_LZ = ((features_LZ - centre_Z) / scale_Z)[:, :-1].double()
    gram_ZZ = inputs_LZ.T @ inputs_LZ + ridge * len(inputs_LZ) * torch.eye(inputs_LZ.shape[1])
    mean_R = wanted_LR.double().mean(dim=0)
    weights_ZR = torch.linalg.solve(gram_ZZ, inputs_LZ.T @ (wanted_LR - mean_R))
    weights_ZR = torch.cat([(weights_ZR / scale_Z[:-1, None]), mean_R[None]]).float()
    bias_Z1 = torch.zeros(len(weights_ZR), 1)
    bias_Z1[-1] = bias
    return DistilledMap(centre_Z, torch.cat([weights_ZR, bias_Z1], dim=1))


def _anchors(scores_LS: Tensor, directions: _Directions) -> tuple[Tensor, Tensor, Tensor]:
    """Choose anchors: (A,) their query numbers, and the basis (A, R) and centre (R,) that make item vectors.

    A ridge regression gives the sampled items' vectors from the anchors' scores. With too few queries or items for it,
    all queries are anchors and the basis is that of the directions.
    """
    num_queries, num_items = scores_LS.shape
    num_anchors = ANCHORS_PER_RANK * directions.basis_LR.shape[1]
    if num_anchors >= num_queries or num_anchors * ITEMS_PER_ANCHOR > num_items:
        return torch.arange(num_queries), directions.basis_LR, directions.centre_R
    means_L = scores_LS.mean(dim=1)
    centred_LS = scores_LS - means_L[:, None]
    gram_LL = (centred_LS @ centred_LS.T).double()
    at_A = _pivots(gram_LL, num_anchors)
    gram_AA = gram_LL[at_A][:, at_A]
    gram_AA += (ANCHOR_RIDGE * gram_AA.diagonal().mean() + 1e-30) * torch.eye(len(at_A))
    basis_AR = torch.linalg.solve(gram_AA, (centred_LS[at_A] @ directions.vectors_SR).double()).float()
    return at_A, basis_AR, means_L[at_A] @ basis_AR


def _pivots(gram_LL: Tensor, num_pivots: int) -> Tensor:
    """Choose up to `num_pivots` rows, each the one that earlier rows explain least (pivoted Cholesky); at least one."""
    left_L = gram_LL.diagonal().clone()
    enough = NEGLIGIBLE * left_L.max()
    factor_LA = gram_LL.new_zeros(len(gram_LL), num_pivots)
    pivots: list[int] = []
    while len(pivots) < num_pivots:
        pivot = int(left_L.argmax())
        if pivots and left_L[pivot] <= enough:
            break
        column_L = gram_LL[:, pivot] - factor_LA @ factor_LA[pivot]
        factor_LA[:, len(pivots)] = column_L * left_L[pivot].clamp_min(1e-30).rsqrt()
        left_L -= factor_LA[:, len(pivots)].square()
        left_L[pivot] = -torch.inf
        pivots.append(pivot)
    return torch.tensor(pivots)


def _rotation(rank: int, seed: int) -> Tensor:
    """(R, R): a random orthogonal matrix."""
    generator = torch.Generator().manual_seed(seed)
    rotation_RR: Tensor = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))[0].float()
    return rotation_RR
