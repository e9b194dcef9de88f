"""The gradients of a step, over all processes.

The gradient of the table of items is sparse: it has the rows that a step reads.

Shapes: V rows of the table, R rows with a gradient, E embedding.
"""

import torch
from torch import Tensor

from pipeline.model.model import RetrievalModel
from pipeline.model.ranks import Ranks


def average_gradients(
    model: RetrievalModel, loss: Tensor, weight: float, num_targets: int, ranks: Ranks
) -> tuple[float, float, int]:
    """Divide the gradients, summed over all processes, by the weight of the targets of all processes.

    Returns the loss, the weight and the number of targets of all processes. A target counts as much as its weight,
    however the targets are spread over the processes. Every process gets a gradient for the rows of the table that any
    of them has one for.
    """
    totals = torch.tensor([float(loss), weight, num_targets], dtype=torch.float64, device=loss.device)
    ranks.sum_(totals)
    loss_sum, weight_sum, count = totals.tolist()
    table_VE = model.item_embedding.weight
    rows_R, values_RE = _rows_with_gradient(table_VE, ranks)
    gradients = [values_RE]
    for parameter in model.parameters():
        if parameter.requires_grad and parameter is not table_VE:
            if parameter.grad is None:  # this process had nothing to train on
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    if ranks.world_size > 1:
        # All in one message. DistributedDataParallel would send after the first of the step's many backward passes.
        summed = ranks.sum_(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = torch.split(summed, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
    if weight_sum:
        torch._foreach_div_(gradients, weight_sum)
    table_VE.grad = _sparse(rows_R, values_RE, table_VE)
    return loss_sum, weight_sum, int(count)


def clip_gradients(model: RetrievalModel, max_norm: float) -> float:
    """Scale all gradients down to a norm of at most `max_norm`; returns the norm before."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    values = [gradient.values() if gradient.is_sparse else gradient for gradient in gradients]
    norm = float(torch.stack(torch._foreach_norm(values)).norm())
    if norm > max_norm:
        torch._foreach_mul_(values, max_norm / norm)
    return norm


def _rows_with_gradient(table_VE: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """(R,) rows of the table for which any process has a gradient, ascending, and (R, E) this process's gradients."""
    if table_VE.grad is None:
        own_rows, own_values = torch.empty(0, dtype=torch.int64, device=table_VE.device), table_VE[:0].detach()
    else:
        gradient = table_VE.grad.coalesce()
        own_rows, own_values = gradient.indices()[0], gradient.values()
    if ranks.world_size == 1:
        return own_rows, own_values
    is_touched_V = torch.zeros(len(table_VE), dtype=torch.int32, device=table_VE.device)
    is_touched_V[own_rows] = 1
    rows_R = ranks.sum_(is_touched_V).nonzero()[:, 0]
    values_RE = table_VE.new_zeros((len(rows_R), table_VE.shape[1]))
    values_RE[torch.searchsorted(rows_R, own_rows)] = own_values
    return rows_R, values_RE


def _sparse(rows_R: Tensor, values_RE: Tensor, table_VE: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(
        rows_R.unsqueeze(0), values_RE, table_VE.shape, is_coalesced=True, check_invariants=False
    )
