"""The dot-product head: the first component of the query with the first of the item, trained to find the item alone.

MoL's own loss can afford some hundred negatives, because each is a pair for the gate. A dot product is cheap: the head
sees thousands, all items of a small corpus, so that every item's vector learns in every step. Its loss is added to
MoL's (joint training: Wang et al., SCE, arXiv 2409.18721; the same idea in GRank, arXiv 2510.15299).

Shapes: T positions, M negatives, which all positions share, B sequences, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadGradients:
    """The loss, summed over the positions by their weights, and its gradients."""

    loss_sum: Tensor
    queries_TD: Tensor
    positives_TD: Tensor
    items_MD: Tensor
    demand_GM: Tensor  # by how much each group of positions would take each negative for its own item


@torch.no_grad()
def head_gradients(
    queries_TD: Tensor,
    positives_TD: Tensor,
    items_MD: Tensor,
    corrections_M: Tensor,
    rows_M: Tensor,
    is_own_BM: Tensor,
    targets_T: Tensor,
    sequences_T: Tensor,
    weights_T: Tensor,
    temperature: float,
    num_groups: int,
) -> HeadGradients:
    """Sampled softmax of dot products over the temperature, forward and backward in tiles.

    For each position the softmax is over the item to predict (`positives_TD`) and the negatives, without this item
    (`rows_M` and `targets_T` say which they are) and without the user's own (`is_own_BM`, by sequence);
    `corrections_M` is added to the negatives' scores.
    """
    dtype = torch.promote_types(queries_TD.dtype, torch.float32)
    queries_TD, positives_TD, items_MD = (part.to(dtype) for part in (queries_TD, positives_TD, items_MD))
    found = HeadGradients(
        torch.zeros((), device=queries_TD.device),
        torch.empty_like(queries_TD),
        torch.empty_like(positives_TD),
        torch.zeros_like(items_MD),
        items_MD.new_empty((num_groups, len(items_MD))),
    )
    corrections_M = corrections_M.to(dtype)
    size = len(queries_TD) // num_groups  # their scores with all negatives should fit the processor's cache
    for group in range(num_groups):
        tile = slice(group * size, (group + 1) * size)
        query_SD, weight_S = queries_TD[tile], weights_T[tile].to(dtype)
        positive_S = (query_SD * positives_TD[tile]).sum(dim=1) / temperature
        scores_SM = torch.addmm(corrections_M, query_SD, items_MD.T, alpha=1.0 / temperature)
        is_left_out_SM = is_own_BM[sequences_T[tile]].logical_or_(rows_M == targets_T[tile].unsqueeze(1))
        scores_SM.masked_fill_(is_left_out_SM, float("-inf"))
        largest_S = torch.maximum(scores_SM.amax(dim=1), positive_S)
        shares_SM = scores_SM.sub_(largest_S.unsqueeze(1)).exp_()
        total_S = (positive_S - largest_S).exp() + shares_SM.sum(dim=1)
        log_share_S = positive_S - largest_S - total_S.log()
        found.loss_sum.sub_((log_share_S * weight_S).sum())
        # The gradient with respect to a score is its share of the softmax, for the positive's less 1.
        shares_SM *= (weight_S / temperature / total_S).unsqueeze(1)
        positive_S1 = (log_share_S.expm1() * weight_S / temperature).unsqueeze(1)
        found.queries_TD[tile] = torch.addmm(positive_S1 * positives_TD[tile], shares_SM, items_MD)
        found.positives_TD[tile] = positive_S1 * query_SD
        found.items_MD.addmm_(shares_SM.T, query_SD)
        torch.sum(shares_SM, dim=0, out=found.demand_GM[group])
    return found
