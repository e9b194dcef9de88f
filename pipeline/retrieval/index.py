"""What the algorithms ask of a backend: one shard laid out for it, with four operations.

B queries, N items, M candidates, Q/X query/item components, D width, P = Q·X pairs of components.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from pipeline.data.lists import NO_ITEM
from pipeline.model.mol import QuerySide
from pipeline.retrieval.filters import ShardMask
from pipeline.settings import TableDtype

# A table with one vector per item: the mean over an item's components, the low-rank table, or item component j.
Table = Literal["mean", "low_rank"] | int
# Largest |float32 - float64| of a score, times the temperature τ: scores lie within ±1/τ.
FLOAT32_ERROR = 1e-5


@dataclass(frozen=True)
class Shortlist:
    """Candidates of B queries among the items of one shard, in any order."""

    scores_BM: Tensor  # float32, -inf where there is none
    at_BM: Tensor  # int64, numbered within the shard; NO_ITEM where there is none

    def squeeze(self, num_kept: int) -> "Shortlist":
        """The `num_kept` best by score, of equal scores any."""
        if num_kept >= self.scores_BM.shape[1]:
            return self
        scores_BM, best_BM = self.scores_BM.topk(num_kept, dim=1)
        return Shortlist(scores_BM, self.at_BM.gather(1, best_BM))


class ShardIndex(Protocol):
    """One shard, laid out for one backend; made once, searched by many batches.

    For one query the results depend neither on the other queries nor on threads or the run.
    """

    first_row: int
    num_item_components: int
    temperature: float
    table_dtypes: tuple[TableDtype, ...]  # in which this backend can keep the tables of stage 1, widest first

    @property
    def product_error(self) -> float:
        """Largest error of `preselect`'s inner products of unit vectors with item components."""

    @property
    def scan_error(self) -> float:
        """Bound on the error of the scores of `scan`."""

    @property
    def scan_skips(self) -> bool:
        """Whether a high floor makes `scan` faster."""

    @property
    def bytes_of(self) -> Mapping[str, int]:
        """Resident bytes of each table."""

    def __len__(self) -> int:
        """Number of items."""

    def preselect(self, table: Table, queries_BD: Tensor, num_kept: int, mask: ShardMask) -> Shortlist:
        """Stage 1: the `num_kept` allowed items with the largest inner product with their row of the table.

        Exact for the table as it is stored; of equal items the first is kept. Scores are those inner products.
        """

    def score(self, queries: QuerySide, at_BM: Tensor, is_quick: bool = False) -> Tensor:
        """Stage 2: (B, M) MoL scores of candidates from cached tables, -inf where there is none.

        Right to `scan_error`; with `is_quick`, faster and without an error guarantee.
        """

    def rescore(self, queries: QuerySide, at_BM: Tensor) -> Tensor:
        """(B, M): scores in float64 from float32 tables, rounded once to float32; -inf where there is none."""

    def scan(
        self, queries: QuerySide, num_kept: int, mask: ShardMask, floor_B: Tensor, max_scored: int
    ) -> tuple[Shortlist, Tensor]:
        """The best of all allowed items, and (B,) a bound on the scores of the items that the budget did not reach.

        Keeps the `num_kept` best of those that reach the floor. An item may be skipped when its largest logit, which
        its score cannot exceed, proves that it would not be kept. After `max_scored` items of a query are scored, the
        others only raise the bound, which is -inf when there are none.
        """


def hide_missing(scores_BM: Tensor, at_BM: Tensor) -> Tensor:
    """-inf where there is no candidate."""
    return scores_BM.masked_fill(at_BM == NO_ITEM, -torch.inf)
