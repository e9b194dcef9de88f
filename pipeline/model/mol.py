"""Mixture-of-Logits (Ding & Zhai, arXiv 2407.15462): a similarity learned over component pairs.

Shapes: B queries, N items, E embedding, Q/X query/item components, D component width, P = Q·X pairs of components with
p = i·X + j for query component i and item component j. `*` is any number of leading batch dimensions, equal on both
sides or absent.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import InputError
from pipeline.model.dropout import dropout, keep_mask
from pipeline.settings import MolSettings

MIN_NORM = 1e-6


@dataclass(frozen=True)
class _Side:
    """Tensors with one row per query, or per item."""

    def to(self, target: torch.device | torch.dtype | str) -> Self:
        """The same rows on a device, or in another precision."""
        return self._each(lambda tensor: tensor.to(target))

    def take(self, rows: Tensor | slice) -> Self:
        """The given rows of a side without batch dimensions; (B, M) item rows give a batch of B candidate lists."""
        return self._each(lambda tensor: tensor[rows])

    def alone(self) -> Self:
        """A batch in which each row is alone: (B, 1, …), to score each query with a candidate list of its own."""
        return self._each(lambda tensor: tensor.unsqueeze(1))

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Join the rows of one or more parts."""
        return cls(*(torch.cat(tensors) for tensors in zip(*(vars(part).values() for part in parts), strict=True)))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(*(change(tensor) for tensor in vars(self).values()))


@dataclass(frozen=True)
class QuerySide(_Side):
    """The part of the similarity that depends on the query alone: (*, B, Q, D) unit components, (*, B, P) gate."""

    components_BQD: Tensor
    gate_BP: Tensor

    @property
    def mean_BD(self) -> Tensor:
        """(*, B, D) mean component: its product with `ItemSide.mean_ND`, over the temperature, is the mean logit of
        a query and an item."""
        return self.components_BQD.mean(dim=-2)

    @property
    def is_finite_B(self) -> Tensor:
        """(B,): whether all numbers of a query are finite; for a side without batch dimensions."""
        return self.components_BQD.isfinite().flatten(1).all(dim=1) & self.gate_BP.isfinite().all(dim=1)


@dataclass(frozen=True)
class ItemSide(_Side):
    """The part of the similarity that depends on the item alone: (*, N, X, D) unit components, (*, N, P) gate."""

    components_NXD: Tensor
    gate_NP: Tensor

    @property
    def mean_ND(self) -> Tensor:
        """(*, N, D) mean component: the one vector per item that the first stage of TopKAvg searches."""
        return self.components_NXD.mean(dim=-2)


@dataclass(frozen=True)
class MolPairs:
    """Scores and their parts: a score is the mean of its P logits, weighted by its P gates, which sum to one."""

    scores_BN: Tensor
    gates_BNP: Tensor
    logits_BNP: Tensor


class GatedLinearUnit(nn.Module):
    """activation(left half of a linear map) ⊙ right half."""

    def __init__(self, in_dim: int, out_dim: int, activation: str) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, 2 * out_dim)
        self.is_gelu = activation == "geglu"  # the exact (erf) gelu

    def forward(self, inputs: Tensor) -> Tensor:
        left, right = self.linear(inputs).chunk(2, dim=-1)
        gated: Tensor = (F.gelu(left) if self.is_gelu else F.silu(left)) * right
        return gated


class MixtureOfLogits(nn.Module):
    """phi(q, x) = sum over p of gate_p(q, x) · <f_i(q), g_j(x)> / temperature, gates from three small networks."""

    def __init__(self, dim: int, settings: MolSettings) -> None:
        super().__init__()
        self.settings = settings
        self.temperature = settings.temperature
        width, hidden = settings.component_dim, settings.gate_hidden_dim
        num_pairs = settings.num_query_components * settings.num_item_components
        num_learned = settings.num_query_components - (1 if settings.num_user_hashes else 0)
        self.query_hidden = GatedLinearUnit(dim, settings.query_hidden_dim, settings.query_activation)
        self.query_out = nn.Linear(settings.query_hidden_dim, num_learned * width)
        # Row 0 is for no user: `user_rows` begins at 1.
        self.user_table = nn.Embedding(settings.num_user_hashes + 1, width) if settings.num_user_hashes else None
        self.item_out = nn.Linear(dim, settings.num_item_components * width)
        self.query_gate = _two_layers(dim, hidden, num_pairs)
        self.item_gate = _two_layers(dim, hidden, num_pairs)
        self.cross_hidden = nn.Linear(num_pairs, hidden)
        self.cross_out = nn.Linear(hidden, num_pairs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-normal matrices and zero biases (the authors' code leaves two of the biases random), but for the bias
        of the first pair's gate."""
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                nn.init.xavier_normal_(parameter)
            else:
                nn.init.zeros_(parameter)
        with torch.no_grad():
            self.cross_out.bias[0] = first_gate_input(self.settings.first_pair_share, len(self.cross_out.bias))

    def user_rows(self, user_keys_B: Tensor) -> Tensor:
        """The row of each user in the user table: 1 + key mod H, for any integer key."""
        return user_keys_B.remainder(self.settings.num_user_hashes) + 1

    def user_vectors(self, user_rows_B: Tensor) -> Tensor:
        """(B, D) raw rows of the user table."""
        assert self.user_table is not None
        return F.embedding(user_rows_B, self.user_table.weight)

    def query_side(self, queries_BE: Tensor, user_rows_B: Tensor | None = None) -> QuerySide:
        """The query side of (*, B, E) encoder outputs, and of (*, B) rows of the user table when the model has one."""
        dropped_BE = dropout(queries_BE, self.settings.query_dropout, self.training)
        components_BQD = self.query_out(self.query_hidden(dropped_BE)).unflatten(-1, (-1, self.settings.component_dim))
        if self.user_table is not None:
            if user_rows_B is None:
                raise InputError("this model has a user-id component (mol.num_user_hashes); give the users' keys")
            users_BD = dropout(self.user_vectors(user_rows_B), self.settings.user_dropout, self.training)
            components_BQD = torch.cat([components_BQD, users_BD.unsqueeze(-2).to(components_BQD.dtype)], dim=-2)
        return QuerySide(_unit(components_BQD), self.query_gate(queries_BE))

    def item_side(self, items_NE: Tensor) -> ItemSide:
        """The item side of (*, N, E) item embeddings."""
        dropped_NE = dropout(items_NE, self.settings.item_dropout, self.training)
        components_NXD = self.item_out(dropped_NE).unflatten(-1, (-1, self.settings.component_dim))
        return ItemSide(_unit(components_NXD), self.item_gate(items_NE))

    def first_item_components(self, items_NE: Tensor) -> Tensor:
        """(*, N, D) first components of (*, N, E) item embeddings."""
        dropped_NE = dropout(items_NE, self.settings.item_dropout, self.training)
        width = self.settings.component_dim
        return _unit(F.linear(dropped_NE, self.item_out.weight[:width], self.item_out.bias[:width]))

    def forward(self, query: QuerySide, items: ItemSide) -> Tensor:
        """(*, B, N) scores of every query with every item, each between its smallest and its largest logit."""
        weights_BNP, logits_BNP = self._weights(query, items)
        sums_BN = (weights_BNP * logits_BNP).sum(dim=-1)
        return sums_BN / _total(weights_BNP).squeeze(-1) if self._drops_gates else sums_BN

    def pairs(self, query: QuerySide, items: ItemSide) -> MolPairs:
        """The scores of every query with every item, and their parts."""
        weights_BNP, logits_BNP = self._weights(query, items)
        gates_BNP = weights_BNP / _total(weights_BNP) if self._drops_gates else weights_BNP
        return MolPairs((gates_BNP * logits_BNP).sum(dim=-1), gates_BNP, logits_BNP)

    @property
    def _drops_gates(self) -> bool:
        return self.training and self.settings.gate_dropout > 0

    def _weights(self, query: QuerySide, items: ItemSide) -> tuple[Tensor, Tensor]:
        """(*, B, N, P) gates and logits. Gates that were partly dropped do not sum to one yet."""
        logits_BNP = self._logits(query, items)
        gates_BNP = torch.softmax(self._gate_inputs(query, items, logits_BNP), dim=-1)
        if self._drops_gates:
            gates_BNP = gates_BNP * keep_mask(gates_BNP, self.settings.gate_dropout)
        return gates_BNP, logits_BNP

    def _logits(self, query: QuerySide, items: ItemSide) -> Tensor:
        """(*, B, N, P) logits, all from one matrix product.

        The query side is divided by the temperature, because it is smaller than the product.
        """
        left = query.components_BQD.flatten(-3, -2) / self.temperature
        right = items.components_NXD.flatten(-3, -2)
        products = left @ right.mT
        shape = (*query.components_BQD.shape[-3:-1], *items.components_NXD.shape[-3:-1])  # B, Q, N, X
        products = products.view(*products.shape[:-2], *shape)
        return products.transpose(-3, -2).flatten(-2)

    def _gate_inputs(self, query: QuerySide, items: ItemSide, logits_BNP: Tensor) -> Tensor:
        """(*, B, N, P) inputs of the softmax over component pairs: silu(query gate ⊙ item gate + network(logits))."""
        dropped_BNP = dropout(logits_BNP, self.settings.cross_dropout, self.training)
        is_final = not torch.is_grad_enabled()  # nothing goes backward: intermediate results may be overwritten
        hidden_BNH = F.silu(self.cross_hidden(dropped_BNP), inplace=is_final)
        cross_BNP = self.cross_out(hidden_BNH)
        gate_inputs_BNP = torch.addcmul(cross_BNP, query.gate_BP.unsqueeze(-2), items.gate_NP.unsqueeze(-3))
        return F.silu(gate_inputs_BNP, inplace=is_final)


def first_gate_input(share: float, num_pairs: int) -> float:
    """What goes into the first gate, so that it has this share if 0 goes into the others; at least 0.

    The softmax is over silu(input), so this is its inverse at ln(share · others / (1 - share)), by fixed-point steps.
    """
    wanted = math.log(max(share * (num_pairs - 1) / (1.0 - share), 1.0))
    gate_input = wanted
    for _ in range(100):
        gate_input = wanted * (1.0 + math.exp(-gate_input))
    return gate_input


def _two_layers(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, out_dim, bias=False))


def _total(weights_BNP: Tensor) -> Tensor:
    return weights_BNP.sum(dim=-1, keepdim=True).clamp_min(MIN_NORM)


class _Unit(torch.autograd.Function):
    """Vectors divided by their norms, or by MIN_NORM if that is more, as `F.normalize` does.

    Its backward pass reads and writes the vectors a third as often: at training sizes they fit no cache.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> Tensor:
        norms: Tensor = vectors.norm(dim=-1, keepdim=True)
        units = vectors / norms.clamp_min(MIN_NORM)
        ctx.save_for_backward(units, norms)
        ctx.dtype = vectors.dtype
        return units

    @staticmethod
    def backward(ctx: Any, gradients: Tensor) -> Tensor:
        units, norms = ctx.saved_tensors
        # What points along the vector changes its norm alone, except where the norm does not count.
        along = (gradients * units).sum(dim=-1, keepdim=True).masked_fill_(norms < MIN_NORM, 0.0)
        across = torch.addcmul(gradients, units, along, value=-1).div_(norms.clamp_min(MIN_NORM))
        found: Tensor = across.to(ctx.dtype)
        return found


def _unit(vectors: Tensor) -> Tensor:
    return cast(Tensor, _Unit.apply(vectors))  # type: ignore[no-untyped-call]
