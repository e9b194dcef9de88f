"""The pair network of a training step on the native kernels: the same as the tiles of `pipeline.model.step`.

The kernels multiply bfloat16 numbers and add in float32; on CPUs with AVX2 only, they multiply float32 numbers.

Shapes: T training positions = G groups of S, which share N negatives; Q/X query/item components, D component
width, P = Q·X pairs.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.model.mol import MixtureOfLogits
from pipeline.model.native.interface import FUNCTIONS, StepInputs, StepOutputs, StepSizes
from pipeline.native.interface import declare


def train_pairs(
    library: ctypes.CDLL,
    mol: MixtureOfLogits,
    per_position: Sequence[Tensor],
    per_group: Sequence[Tensor],
    corrections_GN: Tensor,
    is_left_out_TN: Tensor,
    weights_T: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """The loss of the positions by their weights, and its gradients with respect to `per_position` and `per_group`.

    `per_position` holds query components, query gate and the positive's score; `per_group` holds the negatives' item
    components and item gate. The gradients of the pair network are added to those in its parameters. The result does
    not depend on the number of threads, and only on torch's random numbers for the dropout of gates.
    """
    declare(library, FUNCTIONS)
    num_groups, num_negatives = corrections_GN.shape
    sizes = step_sizes(mol, num_groups, len(weights_T) // num_groups, num_negatives)
    components_TQD, gate_TP, positive_T, components_GNXD, gate_GNP = (_plain(t) for t in (*per_position, *per_group))
    network = (mol.cross_hidden.weight, mol.cross_hidden.bias, mol.cross_out.weight, mol.cross_out.bias)
    inputs = StepInputs(
        *(components_TQD, gate_TP, positive_T, _plain(weights_T)),
        *(components_GNXD, gate_GNP, _plain(corrections_GN), is_left_out_TN.contiguous()),
        *(_plain(parameter) for parameter in network),
    )
    losses_T = torch.empty(len(weights_T), dtype=torch.float64)
    gradients = [torch.empty_like(t) for t in (components_TQD, gate_TP, positive_T, components_GNXD, gate_GNP)]
    of_network = [torch.empty_like(parameter) for parameter in network]
    outputs = StepOutputs(losses_T, *gradients, *of_network)
    library.nr_train_pairs(ctypes.byref(sizes), ctypes.byref(inputs), ctypes.byref(outputs), torch.get_num_threads())
    for parameter, gradient in zip(network, of_network, strict=True):
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    given = (*per_position, *per_group)
    return losses_T.sum(), [gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, given, strict=True)]


def step_sizes(mol: MixtureOfLogits, num_groups: int, group_size: int, num_negatives: int) -> StepSizes:
    """The sizes of a step, and the seed of its gate dropout, drawn with torch's random numbers if there is any."""
    settings = mol.settings
    num_dropped = round(settings.gate_dropout * 256) if mol.training else 0
    return StepSizes(
        settings.num_query_components,
        settings.num_item_components,
        settings.component_dim,
        settings.gate_hidden_dim,
        num_negatives,
        num_groups,
        group_size,
        1 / mol.temperature,
        num_dropped,
        int(torch.randint(2**63 - 1, ())) if num_dropped else 0,
    )


def gate_masks(library: ctypes.CDLL, sizes: StepSizes) -> Tensor:
    """(T, N, P): 1 for the gates that a step of these sizes and with this seed keeps, 0 for those that it drops."""
    declare(library, FUNCTIONS)
    num_pairs = sizes.query_components * sizes.item_components
    masks = torch.empty(sizes.num_groups * sizes.group_size, sizes.negatives, num_pairs, dtype=torch.uint8)
    library.nr_gate_masks(ctypes.byref(sizes), masks.data_ptr())
    return masks


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous()
