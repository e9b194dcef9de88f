"""The source of a search's queries: which users ask, and which part of their histories is visible."""

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
    """The users of a unit that get a list, in ascending order of id."""

    user_ids: pa.Array  # (R,)
    bucket_rows: Int64  # (R,): the user's row in the bucket, -1 for a user without a history

    def left_out(self, bucket: Bucket) -> list[str]:
        """Why each user gets no list, as the bucket says; "" for everybody else."""
        rows = pa.array(self.bucket_rows, mask=self.bucket_rows < 0)
        return [reason or "" for reason in bucket.left_out.take(rows).to_pylist()]


class QuerySource(Protocol):
    """Selects the users of a bucket that ask. It is small, because it is sent to the process that encodes."""

    @property
    def part(self) -> str:
        """The visible part of each history, as `Bucket.cut` names it."""

    def select(self, unit: int, bucket: Bucket) -> Requested:
        """The users that ask among those of bucket number `unit`."""


@dataclass(frozen=True)
class TonightsUsers:
    """The users of the queries table, or without that table everybody with a history; histories are whole."""

    queries: Files | None
    num_buckets: int
    part: str = "whole"

    def select(self, unit: int, bucket: Bucket) -> Requested:
        if self.queries is None:
            return Requested(bucket.user_ids, np.arange(bucket.num_users))
        user_ids = self._by_unit[unit]
        if bucket.num_users and user_ids.type != bucket.user_ids.type:
            raise InputError(
                f"queries.uri: user_id is {user_ids.type} there, but {bucket.user_ids.type} in the log; "
                "write the table with the log's type"
            )
        rows = pc.fill_null(pc.index_in(user_ids, bucket.user_ids), -1)
        return Requested(user_ids, rows.to_numpy(zero_copy_only=False).astype(np.int64))

    @cached_property
    def _by_unit(self) -> list[pa.Array]:
        assert self.queries is not None
        return group_by_bucket(read_user_ids(self.queries), self.num_buckets)


def group_by_bucket(user_ids: pa.Array, num_buckets: int) -> list[pa.Array]:
    """The ids of each bucket; within a bucket they keep their order."""
    buckets = user_bucket(user_ids, num_buckets)
    order = np.argsort(buckets, kind="stable")
    bounds = np.searchsorted(buckets[order], np.arange(num_buckets + 1))
    return [user_ids.take(pa.array(order[low:high])) for low, high in pairwise(bounds)]
