"""The model, the queries and the items as the kernels read them: pairs numbered p = j·Q + i, sizes made even.

B queries, N items, Q/X query/item components, D width, P = Q·X pairs, H hidden. Q and D are rounded up to even numbers
and the rows of the gate network to a multiple of `rows`; the values that this adds have weight zero.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.model.mol import MixtureOfLogits, QuerySide
from pipeline.retrieval.backends import planes
from pipeline.retrieval.backends.native.interface import Items, Model, Queries
from pipeline.retrieval.backends.native.memory import huge_pages
from pipeline.retrieval.shard import Shard

LINE = 32  # numbers of 16 bits in a cache line
ITEMS_AT_ONCE = 65_536


class Layout:
    """The sizes and weights of one model as the kernels read them."""

    def __init__(self, mol: MixtureOfLogits, rows: int) -> None:
        sizes = mol.settings
        queries, items, width = sizes.num_query_components, sizes.num_item_components, sizes.component_dim
        self.num_queries, self.num_items, self.width = queries + queries % 2, items, width + width % 2
        i, j = torch.arange(self.num_queries).repeat(items), torch.arange(items).repeat_interleave(self.num_queries)
        self.is_pair_P = (i < queries).float()
        self.pair_of_P = torch.where(
            i < queries, i * items + j, 0
        )  # the model's pair number; 0, unused, for an added pair
        num_pairs, hidden = len(i), mol.cross_hidden.out_features
        weights = [mol.cross_hidden.weight, mol.cross_hidden.bias, mol.cross_out.weight, mol.cross_out.bias]
        in_HP, in_H, out_PH, out_P = (weight.detach().float().cpu() for weight in weights)
        more_H, more_P = -hidden % rows, -num_pairs % rows
        self.model = Model(
            self.num_queries,
            items,
            self.width,
            hidden + more_H,
            pad(in_HP[:, self.pair_of_P] * self.is_pair_P, (0, 0, 0, more_H)).contiguous(),
            pad(in_H, (0, more_H)).contiguous(),
            pad(out_PH[self.pair_of_P] * self.is_pair_P[:, None], (0, more_H, 0, more_P)).contiguous(),
            pad(out_P[self.pair_of_P] * self.is_pair_P, (0, more_P)).contiguous(),
            self.is_pair_P,
            1 / mol.temperature,
        )

    @property
    def row_width(self) -> int:
        """Numbers in one item's row: its components, then its gate."""
        return self.num_items * self.width + len(self.is_pair_P)

    def queries(self, queries: QuerySide) -> tuple[Tensor, Queries]:
        """The components (B, Q, D) of the queries, padded, and the structure that points to them and the gates."""
        components_BQD = queries.components_BQD.float()
        more = (0, self.width - components_BQD.shape[2], 0, self.num_queries - components_BQD.shape[1])
        components_BQD = pad(components_BQD, more).contiguous()
        gate_BP = (queries.gate_BP.float()[:, self.pair_of_P] * self.is_pair_P).contiguous()
        return components_BQD, Queries(components_BQD, gate_BP, len(gate_BP))

    def item_rows(self, components_NXD: Tensor, gate_NP: Tensor) -> Tensor:
        """(N, row_width) float32: each item's components, then its gate, in the order of the kernels' pairs."""
        components_NXD = pad(components_NXD.float(), (0, self.width - components_NXD.shape[2]))
        return torch.cat([components_NXD.flatten(1), gate_NP.float()[:, self.pair_of_P] * self.is_pair_P], dim=1)


class ItemPlanes:
    """The items' rows in two planes (N, stride) of 16 bits (planes.py), each row on cache lines of its own."""

    def __init__(self, shard: Shard, layout: Layout) -> None:
        width = layout.row_width
        stride = -(-width // LINE) * LINE
        self.high, self.low = (huge_pages(len(shard) * stride, torch.int16).view(-1, stride) for _ in range(2))
        for first in range(0, len(shard), ITEMS_AT_ONCE):
            part = slice(first, first + ITEMS_AT_ONCE)
            items = shard.items.take(part)
            rows = layout.item_rows(items.components_NXD, items.gate_NP)
            self.high[part, :width], self.low[part, :width] = planes.split(rows)
        self.items = Items(self.high, self.low, len(shard), stride, width)
        self._width_of_component = layout.width

    @property
    def nbytes(self) -> int:
        return self.high.nbytes + self.low.nbytes

    def component(self, component: int) -> Tensor:
        """(N, D) float32: this component of all items, D rounded up."""
        first = component * self._width_of_component
        columns = slice(first, first + self._width_of_component)
        return planes.join(self.high[:, columns], self.low[:, columns])
