"""A MoL whose weights are set by hand and by chance: the start of a bench model's training, and a model for studies of
scale, which need no training.

Item component j is random projection j of the item's row; query component i is nearly projection i mod X of the query.
So about Q of the P logits of a pair tell how near query and item are, and the rest are noise. The gate prefers large
logits, the more so the larger `sharpness` is; random gates of query, item and logits are added to this preference.

N items, B queries, E width of rows, Q/X query/item components, D component width, P = Q·X.
"""

import torch
from torch import Tensor, nn

from jobs.studies.search.market import Market
from pipeline.data.lists import Lists
from pipeline.model.mol import MixtureOfLogits
from pipeline.settings import MolSettings

PASS = 4.0  # gelu(PASS) is PASS: a gated unit with PASS on its left side passes its right side
CHANCE = 0.1  # share of the usual random weights that is left in the gate of the logits
MEMORY = 3  # the number of last events in a user's encoding
UNEVEN = 0.5  # standard deviation of the logarithm of an event's weight


@torch.no_grad()
def align(mol: MixtureOfLogits, sharpness: float) -> None:
    """Make a freshly initialised MoL score a query by its nearness to an item's row, in place.

    Needs a gate at least as wide as there are pairs of components, and a query network at least as wide as a row.
    """
    settings, dim = mol.settings, mol.item_out.in_features
    num_pairs = settings.num_query_components * settings.num_item_components
    if settings.gate_hidden_dim < num_pairs or settings.query_hidden_dim < dim:
        raise ValueError("an aligned MoL needs gate_hidden_dim >= pairs of components and query_hidden_dim >= dim")
    projections_XDE = torch.randn(settings.num_item_components, settings.component_dim, dim) / dim**0.5
    mol.item_out.weight.copy_(projections_XDE.flatten(0, 1))
    of_query = torch.arange(settings.num_query_components) % settings.num_item_components
    mol.query_out.weight[:, :dim] = projections_XDE[of_query].flatten(0, 1)
    linear, width = mol.query_hidden.linear, settings.query_hidden_dim
    linear.bias[:width] = PASS
    linear.weight[:dim] = 0.0
    linear.weight[width : width + dim] = torch.eye(dim)
    # silu(l) is about l for the logits that matter: the gate input of a pair of components grows with its logit.
    mol.cross_hidden.weight.mul_(CHANCE)[:num_pairs] += torch.eye(num_pairs)
    mol.cross_out.weight.mul_(CHANCE * sharpness)[:, :num_pairs] += sharpness * torch.eye(num_pairs)
    mol.cross_out.bias.zero_()  # no pair is ahead of the others


@torch.no_grad()
def synthetic_mol(settings: MolSettings, dim: int, sharpness: float, seed: int = 0) -> MixtureOfLogits:
    """Make an aligned MoL with random gates; gates are uniform at sharpness 0 and the more extreme the sharper."""
    torch.manual_seed(seed)
    mol = MixtureOfLogits(dim, settings).eval()
    _scale(mol.query_gate, sharpness)
    _scale(mol.item_gate, 1.0)
    align(mol, sharpness)
    return mol.requires_grad_(False)


def synthetic_encodings(market: Market, histories: Lists, seed: int = 0) -> Tensor:
    """Encode each user (B, E) as an uneven mean of the rows of the last items; one item may drown out the others."""
    rows_BL, _ = histories.last(MEMORY)
    generator = torch.Generator().manual_seed(seed)
    weights_BL = (UNEVEN * torch.randn(rows_BL.shape, generator=generator)).exp()
    weights_BL[torch.from_numpy(rows_BL < 0)] = 0.0
    items_BLE = torch.from_numpy(market.rows_NE)[torch.from_numpy(rows_BL).long().clamp_min(0)]
    encodings_BE = (weights_BL.unsqueeze(-1) * items_BLE).sum(dim=1)
    return nn.functional.layer_norm(encodings_BE, encodings_BE.shape[1:], eps=1e-6)


def _scale(gate: nn.Sequential, size: float) -> None:
    """Set a gate's weights so that inputs of size one give hidden values of one half and outputs of this size."""
    for layer, scale in ((gate[0], 1.0), (gate[2], 2.0 * size)):
        assert isinstance(layer, nn.Linear)
        layer.weight.copy_(scale * torch.randn_like(layer.weight) / layer.in_features**0.5)
