"""Guesses how a log is read as ours, from the names of its columns and some of its rows."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.columns import TEXT, cast_exactly, is_text, plain_column
from pipeline.data.times import SUSPECTED_FORMATS, UNITS, read_as_format, read_as_iso, read_as_unit
from pipeline.errors import InputError

SURE, LIKELY, GUESS = "sure", "likely", "a guess"
MIN_SANE = 0.99  # of the times, which a way to read them must make sane
MAX_TYPES = 40  # different values of a column of event types

# Names of columns, without case and punctuation, the usual ones first.
NAMES: Mapping[str, tuple[str, ...]] = {
    "user_id": (
        *(
            "userid",
            "user",
            "uid",
            "customerid",
            "customer",
            "visitorid",
            "visitor",
            "clientid",
            "memberid",
            "accountid",
        ),
        *("reviewerid", "profileid", "personid", "sessionid", "session", "queryid", "deviceid", "username", "author"),
    ),
    "item_id": (
        *(
            "itemid",
            "item",
            "productid",
            "product",
            "articleid",
            "article",
            "aid",
            "iid",
            "movieid",
            "videoid",
            "trackid",
        ),
        *(
            "songid",
            "newsid",
            "parentasin",
            "asin",
            "sku",
            "contentid",
            "bookid",
            "isbn",
            "gameid",
            "businessid",
            "docid",
        ),
    ),
    "event_ts": (
        *(
            "eventts",
            "timestamp",
            "ts",
            "eventtime",
            "eventtimestamp",
            "time",
            "timems",
            "datetime",
            "date",
            "createdat",
        ),
        *("tdat", "day", "unixreviewtime", "reviewtime", "occurredat", "eventdate", "soldat", "invoicedate", "pos"),
    ),
    "event_type": ("eventtype", "event", "type", "action", "actiontype", "behavior", "behaviortype", "interaction"),
    "event_value": ("eventvalue", "rating", "ratings", "overall", "stars", "score", "value", "weight", "playedratio"),
    "event_id": ("eventid", "uuid", "requestid", "interactionid", "receiptid", "orderid", "transactionid", "messageid"),
}
# Weights of the event types that most logs have, by a part of their names; the first that fits counts.
WEIGHTS: tuple[tuple[str, float], ...] = (
    *(("dislike", 0.0), ("unlike", 0.0), ("remove", 0.0), ("hate", 0.0), ("impression", 0.0)),
    *(("purchase", 8.0), ("transaction", 8.0), ("order", 8.0), ("buy", 8.0), ("checkout", 8.0)),
    *(("cart", 4.0), ("basket", 4.0), ("wish", 4.0), ("fav", 4.0), ("like", 4.0), ("save", 4.0), ("follow", 4.0)),
    *(("click", 2.0), ("play", 2.0), ("listen", 2.0), ("watch", 2.0), ("open", 2.0)),
)
OTHER_WEIGHT = 1.0


@dataclass(frozen=True)
class ColumnGuess:
    """The column of the log that is taken for one of ours, and why."""

    ours: str
    theirs: str
    sureness: str
    why: str


@dataclass(frozen=True)
class TimeGuess:
    """How the times are written: the key of a source file and its value."""

    key: str  # time_unit or time_format
    value: str
    sureness: str
    why: str


def guess_columns(sample: pa.Table, has_names: bool) -> list[ColumnGuess]:
    """Take a column for each of ours, by name and by what is in it; `has_names` is false when the names are made up.

    Raises InputError when no column can be the user, the item or the time.
    """
    left = [name for name in dict.fromkeys(sample.column_names) if name]  # pandas writes an index without a name
    found: dict[str, ColumnGuess] = {}
    for ours, names in NAMES.items() if has_names else ():
        ranked = sorted((names.index(plain), theirs) for theirs in left if (plain := _plain(theirs)) in names)
        for _, theirs in ranked:
            if _fits(ours, sample[theirs]):
                found[ours] = ColumnGuess(ours, theirs, SURE, f"its name, and {_told(sample[theirs])}")
                left.remove(theirs)
                break
    for ours in ("event_ts", "user_id", "item_id"):
        if ours in found:
            continue
        theirs = next((name for name in left if _fits(ours, sample[name], is_named=False)), None)
        if theirs is None:
            what = {"event_ts": "the time of an event", "user_id": "the user", "item_id": "the item"}[ours]
            raise InputError(
                f"no column can be {what}; the columns are {', '.join(sample.column_names[:20])}: is this a log of "
                "events, with a user, an item and a time each?"
            )
        found[ours] = ColumnGuess(
            ours, theirs, GUESS, f"the first column left that could be it, {_told(sample[theirs])}"
        )
        left.remove(theirs)
    return [found[ours] for ours in NAMES if ours in found]


def guess_time(times: pa.ChunkedArray) -> TimeGuess:
    """How a column of times is read. Raises InputError when no way makes sense of it."""
    plain, _, _ = plain_column(times.combine_chunks())
    if pa.types.is_timestamp(plain.type) or pa.types.is_date(plain.type):
        return TimeGuess("time_unit", "timestamp", SURE, f"the column is {plain.type}")
    ways = list(_ways(plain))
    if not ways:
        example = next((str(value) for value in plain.to_pylist() if value is not None), "nothing")
        raise InputError(
            f"times like {example!r}: no unit and no common form explains them; is this the column of the time?"
        )
    key, value, why = ways[0]
    if len(ways) > 1:
        return TimeGuess(key, value, GUESS, f"{why}; {ways[1][0]} {ways[1][1]!r} would fit too")
    return TimeGuess(key, value, GUESS if value == "relative_s" else SURE, why)


def guess_types(event_types: pa.ChunkedArray) -> dict[str, float] | None:
    """A weight for each event type of the sample, in order of their frequency; None for too many to be types."""
    plain, _, _ = plain_column(event_types.combine_chunks())
    counted = sorted(pc.value_counts(plain.cast(TEXT).drop_null()).to_pylist(), key=lambda entry: -entry["counts"])
    if len(counted) > MAX_TYPES:
        return None
    return {entry["values"]: _weight_of(entry["values"]) for entry in counted}


def _weight_of(event_type: str) -> float:
    plain = _plain(event_type)
    return next((weight for word, weight in WEIGHTS if word in plain), OTHER_WEIGHT)


def _ways(times: pa.Array) -> Iterator[tuple[str, str, str]]:
    """The ways to read times that are nearly all sane then: key, value and the reason."""
    known = times.drop_null()
    if not len(known):
        return
    numbers = cast_exactly(known, pa.int64(), pa.float64()) if is_text(known.type) else known
    if not numbers.null_count and not pa.types.is_null(numbers.type):
        for unit, word in UNITS.items():
            if read_as_unit(numbers, unit).mean() >= MIN_SANE:
                yield "time_unit", unit, f"as {word} since 1970 they are times of our days"
                return
    if is_text(known.type) and read_as_iso(known).mean() >= MIN_SANE:
        yield "time_unit", "timestamp", "they are written as ISO 8601"
        return
    found = False
    for form in SUSPECTED_FORMATS:
        if read_as_format(known, form).mean() >= MIN_SANE:
            found = True
            yield "time_format", form, "all times have this form"
    values = (
        numbers.fill_null(-1).to_numpy(zero_copy_only=False) if not pa.types.is_null(numbers.type) else np.array([-1])
    )
    if not found and not numbers.null_count and (values >= 0).all():
        yield "time_unit", "relative_s", "numbers that are no time of our days in any unit: seconds since some day"


def _fits(ours: str, column: pa.ChunkedArray, is_named: bool = True) -> bool:
    """Whether the values of a column could be what ours says; small numbers are times only if the name says so."""
    plain, _, _ = plain_column(column.combine_chunks())
    kind = plain.type
    if ours == "event_ts":
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            return True
        if not (is_text(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            return False
        return any(is_named or value != "relative_s" for _, value, _ in _ways(plain))
    if ours in ("user_id", "item_id"):
        return pa.types.is_integer(kind) or (is_text(kind) and not _are_fractions(plain))
    if ours == "event_value":
        numbers = cast_exactly(plain, pa.float64()) if is_text(kind) else plain
        is_number = is_text(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
        return bool(is_number and numbers.null_count <= plain.null_count)
    if ours == "event_type":
        return (is_text(kind) or pa.types.is_integer(kind)) and guess_types(column) is not None
    is_unique = len(pc.unique(plain)) == len(plain) and not plain.null_count  # an order's number is no event's
    return is_unique and (is_text(kind) or pa.types.is_integer(kind))


def _are_fractions(text: pa.Array) -> bool:
    """Whether all texts are numbers and some have a fraction."""
    known = text.drop_null()
    if cast_exactly(known, pa.float64()).null_count:
        return False
    return bool(cast_exactly(known, pa.int64()).null_count)


def _told(column: pa.ChunkedArray) -> str:
    values = pc.unique(column.combine_chunks())
    shown = ", ".join(repr(value) if isinstance(value, str) else str(value) for value in values[:3].to_pylist())
    return f"{len(values):,} different values in {len(column):,} rows ({shown}{', …' if len(values) > 3 else ''})"


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.partition(":")[0].lower())
