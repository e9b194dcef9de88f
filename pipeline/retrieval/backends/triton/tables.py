"""Tables with one vector per item as the GPU searches them, and the queries that go with each.

B queries, N items, D width, DP padded width. The products of such a table are exact for its rounded vectors and for
queries rounded alike.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.retrieval.backends.triton.layout import ItemRows, pad_columns

INT8_MAX = 127


def accumulation_error(dim: int) -> float:
    """Error bound of a float32 product of width `dim` in any summation order, relative to both norms' product.

    Matrix units cut a few bits off at each step, so the bound is four times that of rounded additions.
    """
    return (dim + 16) * 2.0**-22


@dataclass(frozen=True)
class TableQueries:
    """Queries of one table; a score is the kernels' product times the scale."""

    vectors_B1D: Tensor  # (B, 1, DP)
    scale_B: Tensor
    margin_B: Tensor  # largest difference between two ways to add up a product


@dataclass(frozen=True)
class VectorTable:
    """One vector per item; the vectors may lie apart in memory, as the components of wider rows do."""

    vectors_N1D: Tensor  # bfloat16, float32 or int8
    scale: float
    largest_norm: float

    def prepare(self, queries_BD: Tensor) -> TableQueries:
        """Convert queries to the table's type."""
        if self.vectors_N1D.dtype != torch.int8:
            rounded_BD = queries_BD.to(self.vectors_N1D.dtype)
            scale_B = torch.full((len(queries_BD),), self.scale, device=queries_BD.device)
            share = 2 * accumulation_error(queries_BD.shape[1])
            margin_B = rounded_BD.float().norm(dim=1) * (self.largest_norm * share)
            return TableQueries(pad_columns(rounded_BD)[:, None], scale_B, margin_B)
        scale_B = queries_BD.abs().amax(dim=1).float() / INT8_MAX
        scale_B = scale_B.where(scale_B > 0, 1.0)
        rounded_BD = (queries_BD.float() / scale_B[:, None]).round().to(torch.int8)
        # Sums of 8-bit products are whole numbers below 2^24: exact in any order.
        return TableQueries(pad_columns(rounded_BD, 32)[:, None], scale_B * self.scale, torch.zeros_like(scale_B))


def rounded_table(vectors_ND: Tensor) -> VectorTable:
    """Make a table in bfloat16."""
    rounded_ND = vectors_ND.to(torch.bfloat16)
    return VectorTable(rounded_ND[:, None].contiguous(), 1.0, _largest_norm(rounded_ND))


def quantised_table(vectors_ND: Tensor) -> VectorTable:
    """Make a table in 8 bits with one scale, enough where a rotation has spread the values over the columns."""
    largest = float(vectors_ND.abs().max()) if vectors_ND.numel() else 0.0
    scale = largest / INT8_MAX or 1.0
    return VectorTable((vectors_ND / scale).round().to(torch.int8)[:, None].contiguous(), scale, 0.0)


def component_table(rows: ItemRows, component: int) -> VectorTable:
    """Use one component of each item as a table, without a copy."""
    # A unit vector's norm grows by at most 2^-8 when it is rounded.
    return VectorTable(rows.components_NXD[:, component : component + 1], 1.0, 1.01)


def _largest_norm(vectors_ND: Tensor) -> float:
    return float(vectors_ND.float().norm(dim=1).max()) if len(vectors_ND) else 0.0
