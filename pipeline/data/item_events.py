"""What events say of their items: how many there are, and when the first one was. R item rows of a bucket, N items."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from pipeline.data.histories import Bucket
from pipeline.data.lists import Int64

NEVER = np.iinfo(np.int64).max  # the time of the first event of an item that has none


@dataclass(frozen=True)
class ItemEvents:
    """The events of some items."""

    rows_R: Int64  # the items, ascending
    counts_3R: Int64  # numbers of events: in all, for training, for validation
    first_R: Int64  # time of the first event in µs since 1970 UTC; NEVER where there is none

    @classmethod
    def none_of(cls, num_items: int) -> Self:
        """Of all items, without an event so far."""
        return cls(np.arange(num_items), np.zeros((3, num_items), dtype=np.int64), np.full(num_items, NEVER))

    @classmethod
    def of(cls, bucket: Bucket) -> Self:
        """Of the items that the bucket has events of."""
        rows_R, num_events_R = np.unique(bucket.item_rows, return_counts=True)
        parts = [
            np.bincount(np.searchsorted(rows_R, part.values), minlength=len(rows_R))
            for part in (bucket.cut("train"), bucket.held_out("validation"))
        ]
        first_R = np.full(len(rows_R), NEVER)
        np.minimum.at(first_R, np.searchsorted(rows_R, bucket.item_rows), bucket.event_ts)
        return cls(rows_R.astype(np.int64), np.stack([num_events_R, *parts]).astype(np.int64), first_R)

    def add(self, bucket: Self) -> None:
        """Add the events of a bucket to those of all items."""
        self.counts_3R[:, bucket.rows_R] += bucket.counts_3R
        self.first_R[bucket.rows_R] = np.minimum(self.first_R[bucket.rows_R], bucket.first_R)
