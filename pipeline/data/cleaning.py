"""Convert the raw rows of any log into ours: ids, times and weights; set each bad row aside, with the reason."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.columns import TEXT, Mask, cast_exactly, decode_text, mask_of, plain_column, text_of
from pipeline.data.ids import WORDS_FOR_NOBODY, read_ids, words_in
from pipeline.data.sources import SourceSpec
from pipeline.data.times import NEWEST_US, oldest_us, read_times

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
MALFORMED_BYTES = "malformed_bytes"
ORPHAN = "item_id_orphan"  # the catalogue lacks the item: normal in moderation
BOT = "user_id_bot"

# Rows that are left out for no fault of theirs.
AFTER_DS, OUT_OF_LOOKBACK, IGNORED_TYPE, NOBODY = "after_ds", "out_of_lookback", "ignored_event_type", "nobody"
LEFT_OUT = (AFTER_DS, OUT_OF_LOOKBACK, IGNORED_TYPE, NOBODY)
WORD = "word:"  # begins the counts of rows that are kept although an id is a word that usually means nobody

REJECTED = pa.schema(
    [
        pa.field("file", pa.int32()),
        pa.field("row", pa.int64()),
        *(pa.field(name, TEXT) for name in ("reason", "user_id", "item_id", "event_ts", "event_type", "line")),
    ]
)


@dataclass(frozen=True)
class Cleaned:
    """One chunk: its events, its bad rows, and the number of rows by reason.

    An event that is not learned from, for a reason other than its ids, still counts as seen: `is_learned` is false.
    """

    events: pa.Table  # user_id, item_id, event_ts (µs), weight, event_type, event_id, file, row, is_learned
    rejected: pa.Table  # REJECTED
    counts: dict[str, int]


def clean_rows(
    raw: pa.Table,
    spec: SourceSpec,
    types: tuple[pa.DataType, pa.DataType],
    newest_us: int = NEWEST_US,
) -> Cleaned:
    """Check and convert rows that have our column names and the log's types, plus `file` and `row`.

    `types` are the types of user and item ids; times from `newest_us` on are faults. The order of the rows is
    kept.
    """
    users, user_null, user_bad = read_ids(raw["user_id"].combine_chunks(), types[0])
    items, item_null, item_bad = read_ids(raw["item_id"].combine_chunks(), types[1])
    event_ts, ts_null, ts_bad = read_times(raw["event_ts"].combine_chunks(), spec)
    event_types, weights, is_unknown = _weigh(raw, spec)
    nobody = words_in(users, spec.null_words or ()) | words_in(items, spec.null_words or ())
    holds = {
        "user_id_null": user_null,
        "user_id_unreadable": user_bad,
        "item_id_null": item_null,
        "item_id_unreadable": item_bad,
        NOBODY: nobody,
        "event_ts_null": ts_null,
        "event_ts_unreadable": ts_bad,
        "event_ts_too_old": event_ts < oldest_us(spec),
        "event_ts_in_future": event_ts >= newest_us,
        "event_type_unknown": is_unknown & (spec.unknown_event_types == "error"),
        IGNORED_TYPE: is_unknown & (spec.unknown_event_types == "ignore"),
    }
    reasons = ("kept", *holds)
    code = np.select(list(holds.values()), np.arange(1, len(reasons)), 0)
    numbers = zip(reasons, np.bincount(code, minlength=len(reasons)).tolist(), strict=True)
    counts = {reason: number for reason, number in numbers if number or reason == "kept"}
    has_ids = (code == 0) | (code > reasons.index(NOBODY))
    if spec.null_words is None:
        counts |= _words_for_nobody("user_id", users, has_ids) | _words_for_nobody("item_id", items, has_ids)
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
            "is_learned": pa.array(code == 0),
        }
    )
    if not has_ids.all():
        events = events.filter(pa.array(has_ids))
    return Cleaned(events, _rejected(raw, reasons, code), counts)


def _words_for_nobody(column: str, ids: pa.Array, counted: Mask) -> dict[str, int]:
    """The number of the rows that are `counted`, by word that usually means nobody."""
    found = ids.filter(pa.array(words_in(ids, WORDS_FOR_NOBODY) & counted))
    return {f"{WORD}{column}:{entry['values']}": entry["counts"] for entry in pc.value_counts(found).to_pylist()}


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
    column, _, _ = plain_column(raw[name].combine_chunks())
    return column.cast(TEXT)


def _rejected(raw: pa.Table, reasons: tuple[str, ...], code: npt.NDArray[np.int64]) -> pa.Table:
    """The rows of each of REASONS, in the order of the log; `code` is each row's place in `reasons`."""
    rows = np.flatnonzero(np.isin(code, [reasons.index(reason) for reason in REASONS]))
    return rejected_table(raw.take(pa.array(rows)), pa.array(reasons).take(pa.array(code[rows])))


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
