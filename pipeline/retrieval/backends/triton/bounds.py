"""Bounds that tell which items can reach a score: a score is a mean of its logits, so at most the largest of them.

The largest logit is computed from bfloat16 components; its largest error follows from their rounding errors.
B queries, N items, Q/X query/item components, D width, C capacity of a list.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.model.mol import QuerySide
from pipeline.retrieval.backends.triton.launch import ItemLists, gathered_products
from pipeline.retrieval.backends.triton.layout import ITEMS_PER_STEP, ItemRows, pad_columns
from pipeline.retrieval.backends.triton.tables import accumulation_error

BFLOAT16_ROUNDING = 2.0**-8  # largest rounding error of a vector, as a share of its norm
TINY = 2.0**-20  # relative slack for rounding in this file's own float32 arithmetic


@dataclass(frozen=True)
class LogitBounds:
    """The items' side of the bound: the largest norm of a component, and the largest norm of a rounding error."""

    largest_norm: float
    largest_error: float
    dim: int
    temperature: float

    @classmethod
    def of_items(cls, rows: ItemRows, components_NXD: Tensor, temperature: float) -> "LogitBounds":
        """Measure the given components against their bfloat16 values in `rows`."""
        norm = error = 0.0
        for low in range(0, len(components_NXD), ITEMS_PER_STEP):
            given = components_NXD[low : low + ITEMS_PER_STEP].float()
            lost = given - rows.components_NXD[low : low + ITEMS_PER_STEP].float()  # exact: neighbours in float32
            norm = max(norm, float(given.norm(dim=2).max()))
            error = max(error, float(lost.norm(dim=2).max()))
        return cls(norm * (1 + TINY), error * (1 + TINY), components_NXD.shape[2], temperature)

    @property
    def product_error(self) -> float:
        """Largest error of a product of a unit vector, rounded to bfloat16, with a rounded component."""
        return float(self._error(torch.tensor(1.0 + TINY).double(), torch.tensor(BFLOAT16_ROUNDING).double()))

    def for_queries(self, queries: QuerySide) -> "QueryBounds":
        """Round the queries to bfloat16 and bound the errors of their products with the items."""
        rounded_BQD = queries.components_BQD.to(torch.bfloat16)
        lost_BQD = queries.components_BQD.float() - rounded_BQD.float()
        norm_B = queries.components_BQD.float().norm(dim=2).amax(dim=1).double() * (1 + TINY)
        error_B = lost_BQD.norm(dim=2).amax(dim=1).double() * (1 + TINY)
        return QueryBounds(pad_columns(rounded_BQD), self._error(norm_B, error_B), self.temperature)

    def _error(self, norm: Tensor, error: Tensor) -> Tensor:
        """|<f, g> - <f', g'>| <= |f - f'| |g| + |f'| |g - g'|, plus the rounding of the float32 sum <f', g'>."""
        rounded = norm + error
        added_up = accumulation_error(self.dim) * rounded * (self.largest_norm + self.largest_error)
        return error * self.largest_norm + rounded * self.largest_error + added_up


@dataclass(frozen=True)
class QueryBounds:
    """The queries' side of the bound. `error_B` (float64): largest error of a product caused by bfloat16 rounding."""

    vectors_BQD: Tensor  # (B, Q, DP) bfloat16
    error_B: Tensor
    temperature: float

    def product_that_reaches(self, scores_B: Tensor) -> Tensor:
        """Convert scores into the products that an item must reach to score as much. Rounded down: no item is lost."""
        products_B = (scores_B.double() * self.temperature - self.error_B).float()
        return torch.nextafter(products_B, torch.full_like(products_B, -torch.inf))

    def score_bound(self, products_B: Tensor) -> Tensor:
        """Convert an item's largest product into the most that it can score. Rounded up; -inf stays."""
        scores_B = ((products_B.double() + self.error_B) / self.temperature).float()
        above_B = torch.nextafter(scores_B, torch.full_like(scores_B, torch.inf))
        return above_B.where(products_B > -torch.inf, -torch.inf)

    def within(self, lists: ItemLists, left_B: Tensor, items_NXD: Tensor) -> tuple[ItemLists, Tensor]:
        """Cut each list to its first `left_B` items; also returns (B,) the largest product cut off."""
        counts_B = torch.minimum(lists.counts_B, left_B)
        if bool((counts_B == lists.counts_B).all()):
            return lists, torch.full(counts_B.shape, -torch.inf, device=counts_B.device)
        products_BC = gathered_products(self.vectors_BQD, items_NXD, lists)
        is_cut_BC = torch.arange(products_BC.shape[1], device=counts_B.device) >= counts_B[:, None]
        return ItemLists(lists.at_BC, counts_B), products_BC.where(is_cut_BC, -torch.inf).amax(dim=1)
