"""The source of a search's queries: which users ask, and which part of their histories is visible."""

import functools
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.columns import mask_of
from pipeline.data.histories import Bucket, user_bucket
from pipeline.data.lists import Int64
from pipeline.data.sources import IdType
from pipeline.errors import InputError
from pipeline.io.histories import read_bucket
from pipeline.io.inputs import Files, read_user_ids
from pipeline.io.night import Night

NAMED = 3  # users in an error message


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
    """The users of the queries table, or without that table everybody with a history (and those whom `prepare` has left
    out); histories are whole."""

    queries: Files | None
    num_buckets: int
    declared: IdType = "as_is"  # the log's user_id_type
    part: str = "whole"

    @classmethod
    def of(cls, night: Night, num_buckets: int) -> "TonightsUsers":
        return cls(night.inputs.queries, num_buckets, night.inputs.log.source.user_id_type)

    def select(self, unit: int, bucket: Bucket) -> Requested:
        if self.queries is None:
            rows = np.flatnonzero((np.diff(bucket.offsets) > 0) | mask_of(pc.not_equal(bucket.left_out, "")))
            return Requested(bucket.user_ids.take(pa.array(rows)), rows)
        user_ids = _by_bucket(self, bucket.user_ids.type)[unit]
        rows = pc.fill_null(pc.index_in(user_ids, bucket.user_ids), -1)
        return Requested(user_ids, rows.to_numpy(zero_copy_only=False).astype(np.int64))


def check_queries(night: Night, user_type: pa.DataType) -> None:
    """Raise InputError when the queries table cannot be read as ids of `user_type`, the log's."""
    if night.inputs.queries is not None:
        read_user_ids(night.inputs.queries, user_type, night.inputs.log.source.user_id_type)


def check_cold_users(night: Night, num_buckets: int) -> None:
    """Raise InputError when the queries table, if there is one, has users without a history; the first are named."""
    users = TonightsUsers.of(night, num_buckets)
    if users.queries is None:
        return
    cold: list[object] = []
    num_cold = 0
    for unit in range(num_buckets):
        bucket = read_bucket(night.storage, night.histories, unit)
        requested = users.select(unit, bucket)
        has_history = np.append(np.diff(bucket.offsets) > 0, False)[requested.bucket_rows]
        is_cold = ~has_history & np.array([not reason for reason in requested.left_out(bucket)], dtype=bool)
        num_cold += int(is_cold.sum())
        cold += requested.user_ids.filter(pa.array(is_cold))[: NAMED - len(cold)].to_pylist()
    if num_cold:
        raise InputError(
            f"{users.queries.name}: {num_cold} users have no history (queries.cold_users: raise), first "
            f"{', '.join(map(str, cold))}; take them out, or set queries.cold_users to skip or fallback"
        )


@functools.lru_cache(maxsize=1)
def _by_bucket(users: TonightsUsers, user_type: pa.DataType) -> list[pa.Array]:
    """The users of the queries table by bucket."""
    assert users.queries is not None
    return group_by_bucket(read_user_ids(users.queries, user_type, users.declared), users.num_buckets)


def group_by_bucket(user_ids: pa.Array, num_buckets: int) -> list[pa.Array]:
    """The ids of each bucket; within a bucket they keep their order."""
    buckets = user_bucket(user_ids, num_buckets)
    order = np.argsort(buckets, kind="stable")
    bounds = np.searchsorted(buckets[order], np.arange(num_buckets + 1))
    return [user_ids.take(pa.array(order[low:high])) for low, high in pairwise(bounds)]
