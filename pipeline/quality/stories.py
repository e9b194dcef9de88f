"""Reads the users that `report.three_users` describes: their histories, and their rows of the run."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import FileEntry
from pipeline.data.columns import mask_of
from pipeline.data.histories import Bucket
from pipeline.io.artifacts import read_file
from pipeline.io.histories import read_bucket, read_items
from pipeline.io.night import Night
from pipeline.io.parquet import read_parquet_bytes
from pipeline.io.publication.units import units_of
from pipeline.quality.promises import Rows, flatten
from pipeline.quality.report import Event, Suggestion, UserStory, choose_users, item_name

NUM_LAST_EVENTS = 3
NUM_BEST = 5
SHOWN = ("title", "category")  # attributes of items


def read_stories(night: Night) -> list[UserStory]:
    """Read up to three users of one unit, if possible of a unit in which a user got no full list."""
    storage = night.storage
    sidecars = units_of(storage, night.run).done()
    if not sidecars:
        return []

    def is_all_full(unit: int) -> bool:
        return sidecars[unit].statuses.get("ok") == sidecars[unit].users.rows

    unit = min(sidecars, key=lambda unit: (is_all_full(unit), unit))  # False comes first
    candidates, users = (_read(night, file) for file in sidecars[unit].files)
    bucket = read_bucket(storage, night.histories, unit)
    items = read_items(storage, night.histories)
    rows_of_bucket = {user: row for row, user in enumerate(bucket.user_ids.to_pylist())}
    lengths = dict(zip(rows_of_bucket, np.diff(bucket.offsets).tolist(), strict=True))
    accounts = {account["user_id"]: account for account in users.to_pylist()}
    chosen = choose_users(lengths, {user: account["status"] for user, account in accounts.items()})
    rows = flatten(candidates) if "item_ids" in candidates.column_names else Rows.of(candidates)
    return [
        UserStory(
            user_id=str(user),
            status=accounts[user]["status"],
            reason=accounts[user]["reason"],
            num_events=lengths.get(user, 0),
            last_events=_last_events(bucket, rows_of_bucket.get(user), items),
            num_returned=accounts[user]["num_returned"],
            best=_best(rows, user, items),
        )
        for user in chosen
    ]


def _last_events(bucket: Bucket, user_row: int | None, items: pa.Table) -> tuple[Event, ...]:
    """The last events of the user in this row of the bucket; none for a user without a history."""
    if user_row is None:
        return ()
    first, end = int(bucket.offsets[user_row]), int(bucket.offsets[user_row + 1])
    last = slice(max(first, end - NUM_LAST_EVENTS), end)
    days = [datetime.fromtimestamp(ts / 1e6, UTC).date().isoformat() for ts in bucket.event_ts[last].tolist()]
    return tuple(Event(*pair) for pair in zip(days, _names(items, pa.array(bucket.item_rows[last])), strict=True))


def _best(rows: Rows, user: object, items: pa.Table) -> tuple[Suggestion, ...]:
    """The first rows of a user's list, in order of rank."""
    is_of_user = mask_of(pc.equal(rows.user_ids, pa.scalar(user, rows.user_ids.type)))
    chosen = np.flatnonzero(is_of_user & (rows.ranks <= NUM_BEST))
    by_rank = chosen[np.argsort(rows.ranks[chosen])]
    item_rows = pc.index_in(rows.item_ids.take(pa.array(by_rank)), items["item_id"].combine_chunks())
    return tuple(
        Suggestion(*pair) for pair in zip(_names(items, item_rows), rows.scores[by_rank].tolist(), strict=True)
    )


def _names(items: pa.Table, item_rows: pa.Array) -> list[str]:
    columns = [name for name in ("item_id", *SHOWN) if name in items.column_names]
    shown: list[Mapping[str, Any]] = items.select(columns).take(item_rows).to_pylist()
    return [item_name(item["item_id"], item) for item in shown]


def _read(night: Night, file: FileEntry) -> pa.Table:
    data = read_file(night.storage, night.run.table_prefix, file, "run jobs/retrieve.py again")
    return read_parquet_bytes(data, f"{night.storage.uri}/{night.run.table_prefix}/{file.key}")
