"""Arrow schema of each table that we read or write. Ids keep the type they have in the log: string or int64."""

from collections.abc import Sequence
from typing import TypeAlias

import pyarrow as pa

SCHEMA_VERSION = 2

Schema: TypeAlias = pa.Schema
TIMESTAMP = pa.timestamp("us", tz="UTC")


def interactions(user_type: pa.DataType, item_type: pa.DataType) -> Schema:
    """The `default` source: one row per event, at-least-once, in `ds=YYYY-MM-DD/` partitions."""
    return pa.schema(
        [
            pa.field("user_id", user_type),
            pa.field("item_id", item_type),
            pa.field("event_ts", TIMESTAMP),
            pa.field("event_type", pa.string()),
            pa.field("event_value", pa.float32()),
            pa.field("event_id", pa.string()),
        ]
    )


def histories(user_type: pa.DataType) -> Schema:
    """One row per user, events in order. The first `num_train` events are for training, the next
    `num_validation` for model selection, the rest is the test. `event_ts` is in µs since 1970 UTC. `left_out` says why
    a user gets no list, and is empty for everybody else. `hides` says in which parts an event hides its item from the
    user (`pipeline.data.seen`); `also_seen` are items of events that were set aside."""
    return pa.schema(
        [
            pa.field("user_id", user_type, nullable=False),
            pa.field("item_rows", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
            pa.field("event_ts", pa.list_(pa.field("element", pa.int64(), nullable=False)), nullable=False),
            pa.field("weights", pa.list_(pa.field("element", pa.float32(), nullable=False)), nullable=False),
            pa.field("hides", pa.list_(pa.field("element", pa.uint8(), nullable=False)), nullable=False),
            pa.field("num_train", pa.int32(), nullable=False),
            pa.field("num_validation", pa.int32(), nullable=False),
            pa.field("left_out", pa.string(), nullable=False),
            pa.field("also_seen", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
        ]
    )


def items(item_type: pa.DataType, attributes: tuple[pa.Field, ...] = ()) -> Schema:
    """The item index: row i of the table is item row i, in ascending order of `item_id`.

    The counts are of clean events: `num_events` of all, the two others of the training and the validation part.
    `first_event_ts` is the time of the first of them, null where there is none.
    `is_eligible` says that the item may be shown tonight.
    """
    return pa.schema(
        [
            pa.field("item_id", item_type, nullable=False),
            pa.field("num_events", pa.int64(), nullable=False),
            pa.field("num_train_events", pa.int64(), nullable=False),
            pa.field("num_validation_events", pa.int64(), nullable=False),
            pa.field("first_event_ts", TIMESTAMP),
            pa.field("is_eligible", pa.bool_(), nullable=False),
            *attributes,
        ]
    )


def neighbours() -> Schema:
    """One row per item, in order of row: the items that follow it most, the best first, and their scores."""
    return pa.schema(
        [
            pa.field("item_rows", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
            pa.field("scores", pa.list_(pa.field("element", pa.float32(), nullable=False)), nullable=False),
        ]
    )


def candidates(user_type: pa.DataType, item_type: pa.DataType, of_items: Sequence[pa.Field] = ()) -> Schema:
    """The published table, `layout: long`: one row per user and rank, in this order; equal scores go by item id.

    `of_items` are columns of the catalogue, which come last.
    """
    return pa.schema(
        [
            pa.field("user_id", user_type, nullable=False),
            pa.field("rank", pa.int32(), nullable=False),
            pa.field("item_id", item_type, nullable=False),
            pa.field("score", pa.float32(), nullable=False),
            *_provenance(),
            *(pa.field(field.name, field.type) for field in of_items),
        ]
    )


def nested_candidates(user_type: pa.DataType, item_type: pa.DataType, of_items: Sequence[pa.Field] = ()) -> Schema:
    """The published table, `layout: nested`: one row per user, with lists in order of rank, also of `of_items`."""
    return pa.schema(
        [
            pa.field("user_id", user_type, nullable=False),
            pa.field("item_ids", pa.list_(pa.field("element", item_type, nullable=False)), nullable=False),
            pa.field("scores", pa.list_(pa.field("element", pa.float32(), nullable=False)), nullable=False),
            *_provenance(),
            *(pa.field(field.name, pa.list_(pa.field("element", field.type)), nullable=False) for field in of_items),
        ]
    )


MOL, POPULAR = "mol", "popular"  # the source of a candidate: the search, or popularity for a user without a history
USER_STATUSES = ("ok", "short", "fallback", "skipped", "error")


def users(user_type: pa.DataType) -> Schema:
    """The accounting: exactly one row per requested user; `reason` says why a list is short or missing.

    `is_proven`: the list is certainly that of exact search. `max_gap`: for every rank, the true score there exceeds the
    list's by at most this; null where nothing is known, or there is no list.
    """
    return pa.schema(
        [
            pa.field("user_id", user_type, nullable=False),
            pa.field("status", pa.string(), nullable=False),
            pa.field("num_returned", pa.int32(), nullable=False),
            pa.field("num_seen_filtered", pa.int32(), nullable=False),
            pa.field("num_rule_filtered", pa.int32(), nullable=False),
            pa.field("reason", pa.string(), nullable=False),
            pa.field("is_proven", pa.bool_(), nullable=False),
            pa.field("max_gap", pa.float32()),
            pa.field("ds", pa.date32(), nullable=False),
            pa.field("run_id", pa.string(), nullable=False),
        ]
    )


EVALUATED = ("model", "mol", "popularity", "counts")  # rankings with a column of ranks


def evaluated_users(user_type: pa.DataType, item_type: pa.DataType) -> Schema:
    """One row per user of an evaluation: the length of the visible history, the items to find, and for each ranking
    their ranks in its list of k, in the same order; 0: not in it. `mol_ranks` is null where counts have no part in the
    score."""
    ranks = pa.list_(pa.field("element", pa.int32(), nullable=False))
    return pa.schema(
        [
            pa.field("user_id", user_type, nullable=False),
            pa.field("num_visible", pa.int32(), nullable=False),
            pa.field("item_ids", pa.list_(pa.field("element", item_type, nullable=False)), nullable=False),
            *(pa.field(f"{name}_ranks", ranks, nullable=name == "mol") for name in EVALUATED),
        ]
    )


def _provenance() -> tuple[pa.Field, ...]:
    return (
        pa.field("source", pa.string(), nullable=False),
        pa.field("surface", pa.string(), nullable=False),
        pa.field("ds", pa.date32(), nullable=False),
        pa.field("model_version", pa.string(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
    )
