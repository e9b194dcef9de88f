"""Who asks tonight, and with which part of a history: the source of the queries of a search."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.histories import Bucket, user_bucket
from pipeline.data.lists import Int64
from pipeline.errors import InputError
from pipeline.io.inputs import Files, read_user_ids


@dataclass(frozen=True)
class Requested:
    """The users of a unit that want a list, ascending by id; `at` is each one's place in the bucket, -1 without."""

    user_ids: pa.Array
    at: Int64


class QuerySource(Protocol):
    """Chooses users of a bucket; `part` is the cut of their history that is visible (`Bucket.cut`). Small: it is sent
    to the process that encodes."""

    @property
    def part(self) -> str: ...

    def select(self, unit: int, bucket: Bucket) -> Requested:
        """The requested users whose ids fall into user bucket `unit`."""


@dataclass(frozen=True)
class TonightsUsers:
    """Everybody with a history, or the users of the queries table, each with the whole history."""

    queries: Files | None
    num_buckets: int
    part: str = "whole"

    def select(self, unit: int, bucket: Bucket) -> Requested:
        if self.queries is None:
            return Requested(bucket.user_ids, np.arange(bucket.num_users))
        wanted = self._by_unit[unit]
        if bucket.num_users and wanted.type != bucket.user_ids.type:
            raise InputError(
                f"queries.uri: user_id is {wanted.type} there, but {bucket.user_ids.type} in the log; "
                "write the table with the log's type"
            )
        rows = pc.fill_null(pc.index_in(wanted, bucket.user_ids), -1)
        return Requested(wanted, rows.to_numpy(zero_copy_only=False).astype(np.int64))

    @cached_property
    def _by_unit(self) -> list[pa.Array]:
        assert self.queries is not None
        return group_by_bucket(read_user_ids(self.queries), self.num_buckets)


def group_by_bucket(user_ids: pa.Array, num_buckets: int) -> list[pa.Array]:
    """The ids of each bucket, in the given order."""
    buckets = user_bucket(user_ids, num_buckets)
    order = np.argsort(buckets, kind="stable")
    bounds = np.searchsorted(buckets[order], np.arange(num_buckets + 1))
    return [user_ids.take(pa.array(order[low:high])) for low, high in pairwise(bounds)]
