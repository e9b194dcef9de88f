"""The interface of a backend: one shard laid out for search, with four operations.

B queries, N items, M candidates, Q/X query/item components, D width, P = Q·X pairs of components; `at` is the number of
an item within the shard, `row` its number in the whole index.
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
# Largest |float32 - float64| of a logit times the temperature τ. Divide by τ for the error of a score.
FLOAT32_ERROR = 1e-5


class NotFiniteError(ValueError):
    """A query, an item or a score is not a number: the weights that made it are of no use."""


@dataclass(frozen=True)
class Shortlist:
    """Candidates of B queries among the items of one shard, in any order."""

    scores_BM: Tensor  # float32, -inf where there is no candidate
    at_BM: Tensor  # int64, numbers within the shard, NO_ITEM where there is no candidate

    def squeeze(self, num_kept: int) -> "Shortlist":
        """Keep the `num_kept` best by score, any of equal scores."""
        if num_kept >= self.scores_BM.shape[1]:
            return self
        scores_BM, best_BM = self.scores_BM.topk(num_kept, dim=1)
        return Shortlist(scores_BM, self.at_BM.gather(1, best_BM))


class ShardIndex(Protocol):
    """One shard, laid out for one backend; made once, searched by many batches.

    The results of a query depend neither on the other queries nor on the threads or the run.
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
        """Largest error of a score of `scan` and of a `score` that is not quick."""

    @property
    def scan_skips(self) -> bool:
        """Whether a high floor makes `scan` faster."""

    @property
    def bytes_of(self) -> Mapping[str, int]:
        """Resident bytes of each table."""

    def __len__(self) -> int:
        """Number of items."""

    def preselect(self, table: Table, queries_BD: Tensor, num_kept: int, mask: ShardMask) -> Shortlist:
        """Stage 1: the `num_kept` allowed items whose vector in the table has the largest product with the query.

        Exact for the table as it is stored. Scores are the inner products; of equal items the first is kept.
        """

    def score(self, queries: QuerySide, at_BM: Tensor, is_quick: bool = False) -> Tensor:
        """Stage 2: (B, M) MoL scores of candidates from cached tables, -inf where there is no candidate.

        The error is at most `scan_error`; `is_quick`: faster, no error guarantee.
        """

    def rescore(self, queries: QuerySide, at_BM: Tensor) -> Tensor:
        """Score candidates (B, M) in float64, rounded once to float32; -inf where there is no candidate."""

    def scan(
        self, queries: QuerySide, num_kept: int, mask: ShardMask, floor_B: Tensor, max_scored: int
    ) -> tuple[Shortlist, Tensor]:
        """Scan all items: the best allowed ones, and (B,) a bound on the scores of items that the budget left unscored.

        Keeps the `num_kept` best that reach the floor. An item may be skipped when its largest logit, which its score
        cannot exceed, proves that it would not be kept. Once `max_scored` items of a query are scored,
        the others only raise the bound, which is -inf when there are no others.
        """


def hide_missing(scores_BM: Tensor, at_BM: Tensor) -> Tensor:
    """Set the score to -inf where there is no candidate."""
    return scores_BM.masked_fill(at_BM == NO_ITEM, -torch.inf)
