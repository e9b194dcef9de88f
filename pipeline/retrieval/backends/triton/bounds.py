"""Which items can reach a score: a score is a mean of its logits, so it is at most the largest of them.

The largest logit is found from bfloat16 components; how far it can be off is worked out from their rounding errors.
B queries, N items, Q/X query/item components, D width, C capacity of a list.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.model.mol import QuerySide
from pipeline.retrieval.backends.triton.launch import Found, gathered_products
from pipeline.retrieval.backends.triton.layout import ITEMS_PER_STEP, ItemRows, pad_columns
from pipeline.retrieval.backends.triton.tables import accumulation_error

BFLOAT16_ROUNDING = 2.0**-8  # of a vector, as a share of its norm
TINY = 2.0**-20  # for what is computed here in float32, as a share


@dataclass(frozen=True)
class LogitBounds:
    """Norms of a shard's components and of what rounding them took away, the largest of all items."""

    largest_norm: float
    largest_error: float
    dim: int
    temperature: float

    @classmethod
    def of_items(cls, rows: ItemRows, components_NXD: Tensor, temperature: float) -> "LogitBounds":
        norm = error = 0.0
        for low in range(0, len(components_NXD), ITEMS_PER_STEP):
            given = components_NXD[low : low + ITEMS_PER_STEP].float()
            lost = given - rows.components_NXD[low : low + ITEMS_PER_STEP].float()  # exact: neighbours in float32
            norm = max(norm, float(given.norm(dim=2).max()))
            error = max(error, float(lost.norm(dim=2).max()))
        return cls(norm * (1 + TINY), error * (1 + TINY), components_NXD.shape[2], temperature)

    @property
    def product_error(self) -> float:
        """Of a product of a unit vector, rounded to bfloat16, with a rounded component."""
        return float(self._error(torch.tensor(1.0 + TINY).double(), torch.tensor(BFLOAT16_ROUNDING).double()))

    def for_queries(self, queries: QuerySide) -> "QueryBounds":
        rounded_BQD = queries.components_BQD.to(torch.bfloat16)
        lost_BQD = queries.components_BQD.float() - rounded_BQD.float()
        norm_B = queries.components_BQD.float().norm(dim=2).amax(dim=1).double() * (1 + TINY)
        error_B = lost_BQD.norm(dim=2).amax(dim=1).double() * (1 + TINY)
        return QueryBounds(pad_columns(rounded_BQD), self._error(norm_B, error_B), self.temperature)

    def _error(self, norm: Tensor, error: Tensor) -> Tensor:
        """|<f, g> - <f', g'>| <= |f - f'| |g| + |f'| |g - g'|, and what adding up <f', g'> in float32 loses."""
        rounded = norm + error
        added_up = accumulation_error(self.dim) * rounded * (self.largest_norm + self.largest_error)
        return error * self.largest_norm + rounded * self.largest_error + added_up


@dataclass(frozen=True)
class QueryBounds:
    """Of a batch. `error_B` (float64) is that of a product of rounded components."""

    vectors_BQD: Tensor  # (B, Q, DP) bfloat16
    error_B: Tensor
    temperature: float

    def product_that_reaches(self, scores_B: Tensor) -> Tensor:
        """Items whose largest product is below this score less; rounded down."""
        products_B = (scores_B.double() * self.temperature - self.error_B).float()
        return torch.nextafter(products_B, torch.full_like(products_B, -torch.inf))

    def score_bound(self, products_B: Tensor) -> Tensor:
        """What an item with this largest product can score at most; rounded up, -inf stays."""
        scores_B = ((products_B.double() + self.error_B) / self.temperature).float()
        above_B = torch.nextafter(scores_B, torch.full_like(scores_B, torch.inf))
        return above_B.where(products_B > -torch.inf, -torch.inf)

    def within(self, found: Found, left_B: Tensor, items_NXD: Tensor) -> tuple[Found, Tensor]:
        """The first `left_B` of each list, and the largest product of the others."""
        counts_B = torch.minimum(found.counts_B, left_B)
        if bool((counts_B == found.counts_B).all()):
            return found, torch.full(counts_B.shape, -torch.inf, device=counts_B.device)
        products_BC = gathered_products(self.vectors_BQD, items_NXD, found)
        is_cut_BC = torch.arange(products_BC.shape[1], device=counts_B.device) >= counts_B[:, None]
        return Found(found.at_BC, counts_B), products_BC.where(is_cut_BC, -torch.inf).amax(dim=1)
