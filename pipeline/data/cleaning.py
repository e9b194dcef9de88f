"""Convert the raw rows of any log into ours: ids, times and weights; set each bad row aside, with the reason."""

from dataclasses import dataclass
from datetime import date

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.columns import (
    DAY_US,
    EPOCH,
    NEWEST_US,
    OLDEST_US,
    TEXT,
    Mask,
    cast_exactly,
    decode_text,
    mask_of,
    read_ids,
    read_times,
    text_of,
)
from pipeline.data.sources import SourceSpec

HOUR_US = 3_600_000_000

# Reasons to set a row aside; each begins with the column at fault. A row gets the first reason that holds.
REASONS = (
    "user_id_null",
    "user_id_unreadable",
    "item_id_null",
    "item_id_unreadable",
    "event_ts_null",
    "event_ts_unreadable",
    "event_ts_too_old",
    "event_ts_in_future",
    "event_type_unknown",
)
MALFORMED = "row_malformed"  # a line that does not have the columns of its file
ORPHAN = "item_id_orphan"  # the catalogue lacks the item: normal in moderation
BOT = "user_id_bot"

# Rows that are left out for no fault of theirs.
AFTER_DS, OUT_OF_LOOKBACK, IGNORED_TYPE = "after_ds", "out_of_lookback", "ignored_event_type"
LEFT_OUT = (AFTER_DS, OUT_OF_LOOKBACK, IGNORED_TYPE)

REJECTED = pa.schema(
    [
        pa.field("file", pa.int32()),
        pa.field("row", pa.int64()),
        *(pa.field(name, TEXT) for name in ("reason", "user_id", "item_id", "event_ts", "event_type", "line")),
    ]
)


@dataclass(frozen=True)
class Period:
    """The part of the log that is read, in µs since 1970: `oldest <= event_ts < newest`."""

    oldest: int
    newest: int  # an hour into the day after `ds`: clocks differ
    is_partitioned: bool  # then no event can be after `newest`: a later time is a fault

    @classmethod
    def until(cls, ds: date, lookback_days: int, is_partitioned: bool) -> "Period":
        end = ((ds - EPOCH).days + 1) * DAY_US
        return cls(end - lookback_days * DAY_US, end + HOUR_US, is_partitioned)

    @classmethod
    def of_partition(cls, day: date) -> "Period":
        """All times that a row of this partition can have: what is older came late, and local days end after UTC's."""
        end = ((day - EPOCH).days + 1) * DAY_US
        return cls(int(np.iinfo(np.int64).min), end + DAY_US + HOUR_US, is_partitioned=True)


@dataclass(frozen=True)
class Cleaned:
    """One chunk: the rows to keep, the first few bad rows of each reason, and the number of rows by reason."""

    events: pa.Table  # user_id, item_id, event_ts (µs), weight, event_type, event_id, file, row
    rejected: pa.Table  # REJECTED
    counts: dict[str, int]


def clean_rows(
    raw: pa.Table, spec: SourceSpec, types: tuple[pa.DataType, pa.DataType], period: Period, max_rejected: int
) -> Cleaned:
    """Check and convert rows that have our column names and the log's types, plus `file` and `row`.

    `types` are the types of user and item ids. The first `max_rejected` bad rows of each reason are returned. The order
    of the rows is kept.
    """
    users, user_null, user_bad = read_ids(raw["user_id"].combine_chunks(), types[0])
    items, item_null, item_bad = read_ids(raw["item_id"].combine_chunks(), types[1])
    event_ts, ts_null, ts_bad = read_times(raw["event_ts"].combine_chunks(), spec)
    event_types, weights, is_unknown = _weigh(raw, spec)
    oldest_sane = np.iinfo(np.int64).min if spec.time_unit == "relative_s" else OLDEST_US
    newest_sane = period.newest if period.is_partitioned else max(NEWEST_US, period.newest)
    faults = (
        user_null,
        user_bad,
        item_null,
        item_bad,
        ts_null,
        ts_bad,
        event_ts < oldest_sane,
        event_ts >= newest_sane,
        is_unknown & (spec.unknown_event_types == "error"),
    )
    left_out = (
        event_ts >= period.newest,
        event_ts < period.oldest,
        is_unknown & (spec.unknown_event_types == "ignore"),
    )
    # 0: kept; then the reasons in their order; then the rows that are left out for no fault
    code = np.select([*faults, *left_out], np.arange(1, len(faults) + len(left_out) + 1), 0)
    numbers = np.bincount(code, minlength=len(faults) + len(left_out) + 1)
    kept = pa.array(code == 0)
    events = pa.table(
        {
            "user_id": users,
            "item_id": items,
            "event_ts": pa.array(event_ts),
            "weight": pa.array(weights),
            "event_type": event_types,
            "event_id": _texts(raw, "event_id", pa.nulls(raw.num_rows, TEXT)),
            "file": raw["file"],
            "row": raw["row"],
        }
    ).filter(kept)
    counts = dict(zip(("kept", *REASONS, *LEFT_OUT), numbers.tolist(), strict=True))
    return Cleaned(events, _rejected(raw, code, max_rejected), {k: v for k, v in counts.items() if v or k == "kept"})


def _weigh(raw: pa.Table, spec: SourceSpec) -> tuple[pa.Array, npt.NDArray[np.float32], Mask]:
    """The event types as text, the weight of each row, and whether `event_weights` lacks its type."""
    constant = pa.array([spec.event_type]).take(pa.array(np.zeros(raw.num_rows, dtype=np.int64)))
    types = pc.fill_null(_texts(raw, "event_type", constant), spec.event_type)
    names = list(spec.event_weights)
    codes = pc.index_in(types, value_set=pa.array(names, TEXT)).fill_null(len(names)).to_numpy(zero_copy_only=False)
    weights = np.array([*spec.event_weights.values(), spec.default_weight], dtype=np.float32)[codes]
    if spec.value_is_weight and "event_value" in raw.column_names:
        values = cast_exactly(decode_text(raw["event_value"].combine_chunks())[0], pa.float64())
        factor = values.fill_null(1.0).to_numpy(zero_copy_only=False)
        weights = weights * np.where(np.isfinite(factor), np.clip(factor, 0.0, 1e6), 1.0).astype(np.float32)
    # a row without a type is not unknown: it counts with the default weight
    is_unknown = (codes == len(names)) & bool(names) & mask_of(pc.not_equal(types, spec.event_type))
    return types, weights.astype(np.float32), is_unknown


def _texts(raw: pa.Table, name: str, default: pa.Array) -> pa.Array:
    if name not in raw.column_names:
        return default
    column, _ = decode_text(raw[name].combine_chunks())
    return column.cast(TEXT)


def _rejected(raw: pa.Table, code: npt.NDArray[np.int64], max_rejected: int) -> pa.Table:
    """The first rows of each reason, in the order of the log."""
    chosen = [np.flatnonzero(code == number)[:max_rejected] for number in range(1, len(REASONS) + 1)]
    rows = np.sort(np.concatenate(chosen))
    return rejected_table(raw.take(pa.array(rows)), pa.array(("", *REASONS)).take(pa.array(code[rows])))


def malformed_lines(lines: tuple[str, ...], file: int, row: int) -> pa.Table:
    """Set aside the lines of a text file that are no rows; they stand before its row `row`."""
    number = len(lines)
    columns = {"file": [file] * number, "row": [row] * number, "line": pa.array(lines, TEXT)}
    return rejected_table(pa.table(columns), pa.repeat(MALFORMED, number))


def rejected_table(rows: pa.Table, reasons: pa.Array) -> pa.Table:
    """The rows that are set aside, as people read them (REJECTED): a column that the rows lack is null."""
    columns = {"file": rows["file"], "row": rows["row"], "reason": reasons}
    for name in ("user_id", "item_id", "event_ts", "event_type"):
        known = name in rows.column_names
        columns[name] = text_of(rows[name].combine_chunks()) if known else pa.nulls(rows.num_rows, TEXT)
    columns["line"] = rows["line"] if "line" in rows.column_names else pa.nulls(rows.num_rows, TEXT)
    return pa.table(columns).cast(REJECTED)


def first_rejected(rejected: pa.Table, max_rejected: int) -> pa.Table:
    """The first `max_rejected` rows of each reason, in the order of the log."""
    ordered = rejected.sort_by([("reason", "ascending"), ("file", "ascending"), ("row", "ascending")])
    _, starts = np.unique(ordered["reason"].to_numpy(), return_index=True)
    ends = np.append(starts[1:], ordered.num_rows)
    kept = [ordered.slice(s, min(e - s, max_rejected)) for s, e in zip(starts.tolist(), ends.tolist(), strict=False)]
    return pa.concat_tables(kept) if kept else ordered
