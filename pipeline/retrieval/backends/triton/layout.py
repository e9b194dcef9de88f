"""Items, queries and the gate's cross network, padded for the kernels (product_kernels.py, mol_kernel.py).

B queries, N items, Q/X query/item components, D width, H gate width, P = Q·X pairs of components in the model's order
i·X + j; W is the length of an item's row, and QP, XP, PP = QP·XP, HP, DP are padded sizes. The kernels' order of pairs
is j·QP + i.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.model.mol import ItemSide, MixtureOfLogits, QuerySide
from pipeline.retrieval.backends import planes

MAX_BLOCK_D = 256  # columns of a product that are held at once
ITEMS_PER_STEP = 262_144
ROW_MULTIPLE = 16  # items' rows begin at multiples of 32 bytes, the unit of GPU memory


def padded_size(size: int, least: int = 1) -> int:
    """The first power of two that is at least `size` and `least`."""
    return max(least, 1 << (size - 1).bit_length())


def block_of(dim: int, least: int = 16) -> tuple[int, int]:
    """Columns of one block of a product of width `dim`, and the number of blocks."""
    block = min(padded_size(dim, least), MAX_BLOCK_D)
    return block, -(-dim // block)


@dataclass(frozen=True)
class MolShape:
    """Sizes of a MoL, as they are and padded."""

    num_query_components: int
    num_item_components: int
    dim: int
    hidden_dim: int

    @cached_property
    def padded_query_components(self) -> int:
        return padded_size(self.num_query_components, 8)  # the narrowest product of a matrix unit

    @cached_property
    def padded_item_components(self) -> int:
        return padded_size(self.num_item_components, 16 // self.padded_query_components)

    @property
    def num_padded_pairs(self) -> int:
        return self.padded_query_components * self.padded_item_components

    @property
    def padded_hidden_dim(self) -> int:
        return padded_size(self.hidden_dim, 16)

    @property
    def row_width(self) -> int:
        """Values in an item's row."""
        width = self.num_item_components * (self.dim + self.num_query_components)
        return -(-width // ROW_MULTIPLE) * ROW_MULTIPLE

    def pad_pairs(self, values: Tensor) -> Tensor:
        """Bring values (*, P) in the model's order of pairs into the kernels' order (*, PP), with zeros for padding."""
        sizes = (self.num_query_components, self.num_item_components)
        by_pair = values.reshape(*values.shape[:-1], *sizes).transpose(-1, -2)
        missing_i = self.padded_query_components - self.num_query_components
        missing_j = self.padded_item_components - self.num_item_components
        return pad(by_pair, (0, missing_i, 0, missing_j)).flatten(-2).contiguous()


@dataclass(frozen=True)
class ItemRows:
    """Items for stage 2: a row is an item's components (X, D), then its gate in the order j·Q + i, then zeros.

    In two planes (planes.py): `high` alone is the row in bfloat16, so no table is kept twice.
    """

    shape: MolShape
    high_NW: Tensor  # int16
    low_NW: Tensor  # int16

    def __len__(self) -> int:
        return len(self.high_NW)

    @property
    def components_NXD(self) -> Tensor:
        """The components in bfloat16, as a view."""
        num_components, dim = self.shape.num_item_components, self.shape.dim
        return self.high_NW.view(torch.bfloat16)[:, : num_components * dim].view(-1, num_components, dim)

    def take(self, at: Tensor) -> ItemSide:
        """Gather the items numbered `at` (*,) in float32, bit for bit as they were given."""
        values = planes.join(self.high_NW[at], self.low_NW[at])
        num_components, dim = self.shape.num_item_components, self.shape.dim
        num_queries = self.shape.num_query_components
        end = num_components * dim
        components = values[..., :end].reshape(*at.shape, num_components, dim)
        gate = values[..., end : end + num_components * num_queries].reshape(*at.shape, num_components, num_queries)
        return ItemSide(components, gate.transpose(-1, -2).flatten(-2))


def lay_out_items(shape: MolShape, items: ItemSide) -> ItemRows:
    """Lay out float32 items, some at a time, so that a shard may fill most of the memory."""
    num_items, device = len(items.gate_NP), items.gate_NP.device
    high_NW, low_NW = (torch.empty(num_items, shape.row_width, dtype=torch.int16, device=device) for _ in range(2))
    sizes = (shape.num_query_components, shape.num_item_components)
    for low in range(0, num_items, ITEMS_PER_STEP):
        some = slice(low, low + ITEMS_PER_STEP)
        gate = items.gate_NP[some].reshape(-1, *sizes).transpose(1, 2).flatten(1)
        values = torch.cat([items.components_NXD[some].flatten(1), gate], dim=1).float()
        high_NW[some], low_NW[some] = planes.split(pad(values, (0, shape.row_width - values.shape[1])))
    return ItemRows(shape, high_NW, low_NW)


@dataclass(frozen=True)
class MolQueries:
    """Queries for stage 2: components divided by the temperature, in the type of the products."""

    components: Tensor  # (B, QP, DP)
    gate: Tensor  # (B, PP) float32


def lay_out_queries(shape: MolShape, queries: QuerySide, temperature: float, dtype: torch.dtype) -> MolQueries:
    """Divide the components by the temperature, and pad components and gate."""
    missing = shape.padded_query_components - shape.num_query_components
    components = pad_columns(queries.components_BQD.float() / temperature)
    return MolQueries(pad(components, (0, 0, 0, missing)).to(dtype), shape.pad_pairs(queries.gate_BP.float()))


def pad_columns(vectors: Tensor, least: int = 16) -> Tensor:
    """Pad vectors (*, D) with zeros to (*, DP)."""
    block, num_blocks = block_of(vectors.shape[-1], least)
    return pad(vectors, (0, block * num_blocks - vectors.shape[-1])).contiguous()


@dataclass(frozen=True)
class MolWeights:
    """The gate's cross network, W2 silu(W1 l + b1) + b2 of logits l."""

    shape: MolShape
    hidden: Tensor  # (HP, PP)
    hidden_bias: Tensor  # (HP,) float32
    out: Tensor  # (PP, HP)
    out_bias: Tensor  # (PP,) float32


def lay_out_weights(mol: MixtureOfLogits, dtype: torch.dtype, device: torch.device) -> MolWeights:
    """Pad the weights of the cross network; matrices get the given type, biases are float32."""
    settings = mol.settings
    shape = MolShape(
        settings.num_query_components, settings.num_item_components, settings.component_dim, settings.gate_hidden_dim
    )
    missing = shape.padded_hidden_dim - shape.hidden_dim
    with torch.no_grad():
        hidden = pad(shape.pad_pairs(mol.cross_hidden.weight.float()), (0, 0, 0, missing))
        out = pad(shape.pad_pairs(mol.cross_out.weight.float().T).T, (0, missing))
        tensors = {
            "hidden": hidden.to(device, dtype),
            "hidden_bias": pad(mol.cross_hidden.bias.float(), (0, missing)).to(device),
            "out": out.to(device, dtype).contiguous(),
            "out_bias": shape.pad_pairs(mol.cross_out.bias.float()).to(device),
        }
    return MolWeights(shape, **tensors)
