"""What prepare must make of a generated log: the slow, obvious way, row by row, without the product's code."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from math import isfinite
from statistics import median
from zoneinfo import ZoneInfo

from tests.stages.generated_logs import DAY, KINDS, WEIGHTS, WORDS, Recipe, Row
from tests.stages.generated_times import EPOCH, TIMES, micros

OLDEST, NEWEST = micros(datetime(1990, 1, 1, tzinfo=UTC)), micros(datetime(2100, 1, 1, tzinfo=UTC))
Id = str | int
Event = tuple[Id, int, float]  # item, µs, weight


class RefusedError(Exception):
    """Prepare must refuse the log; the message has these words."""


@dataclass
class Expected:
    """The histories by user, as events and numbers of training and validation events; None for a bot."""

    histories: dict[Id, tuple[list[Event], int, int] | None] = field(default_factory=dict)
    seen: dict[Id, tuple[set[Id], ...]] = field(default_factory=dict)  # not to be shown, by part of the history
    items: list[Id] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Read:
    """A row as prepare understands it; `reason` is empty for a row to learn from."""

    user: Id | None
    item: Id | None
    time: int
    kind: str | None
    delivery: str | None
    weight: float
    reason: str


def expect(files: Mapping[str, Sequence[Row]], recipe: Recipe, catalogue: list[Id] | None) -> Expected:
    """Work out the result for a log with these rows, by key of the file. Raises RefusedError."""
    ds = _served_day(files, recipe)
    is_partitioned = "days" in recipe["layout"]
    rows = [
        _read(row, recipe, is_partitioned) for key in sorted(files) for row in files[key] if _is_known(row, recipe, ds)
    ]
    counts = Counter(row.reason for row in rows)
    _check_rows(rows, counts, recipe)
    learned, seen = _cut(rows, counts, recipe, ds, is_partitioned)
    items = sorted({row.item for row in learned}) if catalogue is None else catalogue
    if not items:
        raise RefusedError("no row of the log is left")
    by_user = _by_user(learned, set(items), counts)
    expected = Expected(items=items, counts=counts)
    for user, events in (by_user | {row.user: [] for row in seen if row.user not in by_user}).items():
        expected.histories[user] = _history(events, recipe, ds, counts) if events else ([], 0, 0)
        also_seen = {row.item for row in seen if row.user == user and row.item in set(items)}
        kept = events if expected.histories[user] else []
        expected.seen[user] = tuple(also_seen | _hidden(kept, recipe, ds, back) for back in (2, 1, 0))
    counts["kept"] = sum(len(history[0]) for history in expected.histories.values() if history)
    num_events = counts["kept"] + counts["bot_events"] + counts["item_id_orphan"]
    if counts["item_id_orphan"] > recipe["orphan_share"] * num_events:
        raise RefusedError("are on items that the catalogue lacks")
    _check_deliveries(counts, len(rows))
    counts["rows_read"] = len(rows)
    return expected


def id_of(text: str, recipe: Recipe) -> Id:
    """The id as prepare gives it back."""
    is_text = recipe["declared"] == "string" or (recipe["declared"] == "as_is" and recipe["format"] == "csv")
    return text if recipe["ids"] not in ("number", "big") or is_text else int(text)


def _local_day(time: int, zone: str) -> date:
    return (EPOCH + timedelta(microseconds=time)).astimezone(ZoneInfo(zone)).date()


def _midnight(day: date, zone: str) -> int:
    return micros(datetime(day.year, day.month, day.day, tzinfo=ZoneInfo(zone)))


def _served_day(files: Mapping[str, Sequence[Row]], recipe: Recipe) -> date:
    """The day that the recipe asks for, or the newest that is not in the future and has some rows."""
    last = date.fromisoformat(recipe["last_day"])
    rows = [row for of_file in files.values() for row in of_file]
    if recipe["ds"] != "newest":
        ds = last - (DAY if recipe["ds"] == "day before" else timedelta(0))
        if "days" in recipe["layout"] and ds not in {row.day for row in rows}:
            raise RefusedError(f"no partition ds={ds}")
        return ds
    if "days" in recipe["layout"]:
        return max(row.day for row in rows)
    today = datetime.now(UTC).date()
    sane = [row.time for row in rows if row.line is None and "time" not in row.raw and _is_sane(row.time, recipe)]
    days = Counter(_local_day(time, recipe["log_zone"]) for time in sane)
    if not days:
        raise RefusedError("no sane time in column")
    known = sorted((day for day in days if day <= today + DAY), reverse=True)
    if not known:
        raise RefusedError("its oldest event is of")
    return next((day for day in known if _is_a_day(day, days)), known[0])


def _is_sane(time: int | None, recipe: Recipe) -> bool:
    return time is not None and time < NEWEST and (time >= OLDEST or not TIMES[recipe["time"]].has_oldest)


def _is_a_day(day: date, days: Counter[date]) -> bool:
    before = [days[other] for other in sorted(days) if other < day][-28:]
    return not before or days[day] >= 0.05 * median(before)


def _is_known(row: Row, recipe: Recipe, ds: date) -> bool:
    """Whether the night reads the row's partition."""
    if "days" not in recipe["layout"]:
        return True
    lookbacks = [recipe["lookback"], *([] if recipe["seen_types"] == [] else [recipe["seen_lookback"]])]
    return row.day <= ds and (None in lookbacks or row.day > ds - max(lookbacks) * DAY)


def _read(row: Row, recipe: Recipe, is_partitioned: bool) -> _Read:
    bad = {column: column in row.raw for column in ("user", "item", "time")}
    user = id_of(row.user, recipe) if row.user and not bad["user"] else None
    item = id_of(row.item, recipe) if row.item and not bad["item"] else None
    newest = NEWEST
    if is_partitioned:
        newest = _midnight(row.day + 2 * DAY, recipe["log_zone"]) + 3_600_000_000
    time = 0 if row.time is None or bad["time"] else row.time
    nobody = recipe["null_words"] or ()
    is_unknown = recipe["kinds"] in ("error", "ignore") and row.kind not in (None, *KINDS)
    faults = {
        "row_malformed": row.line is not None,
        "user_id_null": not row.user and not bad["user"],
        "user_id_unreadable": bad["user"],
        "item_id_null": not row.item and not bad["item"],
        "item_id_unreadable": bad["item"],
        "nobody": user in nobody or item in nobody,
        "event_ts_null": row.time is None and not bad["time"],
        "event_ts_unreadable": bad["time"],
        "event_ts_too_old": TIMES[recipe["time"]].has_oldest and time < OLDEST,
        "event_ts_in_future": time >= newest,
        "event_type_unknown": is_unknown and recipe["kinds"] == "error",
        "ignored_event_type": is_unknown,
    }
    reason = next((name for name, holds in faults.items() if holds), "")
    return _Read(user, item, time, row.kind, row.delivery, _weight(row, recipe), reason)


def _weight(row: Row, recipe: Recipe) -> float:
    has_weights = recipe["kinds"] in ("error", "ignore", "weight")
    weight = WEIGHTS.get(row.kind or "", 0.5) if has_weights else 0.5
    try:
        factor = 1.0 if row.value is None else float(row.value)
    except ValueError:
        factor = 1.0
    return weight * (min(max(factor, 0.0), 1e6) if isfinite(factor) else 1.0)


LEFT_OUT = ("", "ignored_event_type", "nobody")
NO_IDS = ("user_id_null", "user_id_unreadable", "item_id_null", "item_id_unreadable", "nobody", "row_malformed")


def _check_rows(rows: list[_Read], counts: Counter[str], recipe: Recipe) -> None:
    num_bad = sum(number for reason, number in counts.items() if reason not in LEFT_OUT)
    if num_bad > recipe["bad_share"] * len(rows):
        raise RefusedError("prepare.max_bad_share is")
    if recipe["null_words"] is None:
        known = [row for row in rows if row.reason not in NO_IDS]
        for column in ("user", "item"):
            if sum(getattr(row, column) in WORDS for row in known) > recipe["bad_share"] * len(rows):
                raise RefusedError("have a word that usually means nobody")


def _cut(
    rows: list[_Read], counts: Counter[str], recipe: Recipe, ds: date, is_partitioned: bool
) -> tuple[list[_Read], list[_Read]]:
    """The rows to learn from, and those that only count as seen."""
    zone, today = recipe["log_zone"], datetime.now(UTC).date()
    good = [row for row in rows if not row.reason]
    days = Counter(_local_day(row.time, zone) for row in good)
    if not is_partitioned and days and ds not in days:
        raise RefusedError(f"no event of the day {ds}")
    goes_on = any(ds < day <= today + DAY and _is_a_day(day, days) for day in days)
    begins = {
        name: _midnight(ds - (recipe[name] - 1) * DAY, zone) if recipe[name] else None
        for name in ("lookback", "seen_lookback")
    }
    end = None if is_partitioned else _midnight(ds + DAY, zone)
    learned, seen = [], [row for row in rows if row.reason and row.reason not in NO_IDS]
    for row in good:
        is_later = end is not None and row.time >= end
        if begins["lookback"] is not None and row.time < begins["lookback"]:
            counts["out_of_lookback"] += 1
            if begins["seen_lookback"] is None or row.time >= begins["seen_lookback"]:
                seen.append(row)
        elif is_later:
            counts["after_ds"] += 1
            if not goes_on:
                seen.append(row)
        else:
            learned.append(row)
    types = recipe["seen_types"]
    return learned, [row for row in seen if types is None or row.kind in types]


def _by_user(rows: list[_Read], items: set[Id], counts: Counter[str]) -> dict[Id, list[_Read]]:
    """The events of each user, each once, on known items, in the order of the log."""
    delivered: set[tuple[object, ...]] = set()
    names: set[tuple[object, ...]] = set()
    by_user: dict[Id, list[_Read]] = defaultdict(list)
    for row in rows:
        key = (row.user, row.item, row.time, bool(row.delivery), row.delivery or row.kind)
        if key in delivered:
            counts["duplicates"] += 1
            continue
        delivered.add(key)
        counts["reused"] += bool(row.delivery) and (row.user, row.delivery) in names
        names.add((row.user, row.delivery))
        if row.item in items:
            by_user[row.user].append(row)
        else:
            counts["item_id_orphan"] += 1
    return by_user


def _history(rows: list[_Read], recipe: Recipe, ds: date, counts: Counter[str]) -> tuple[list[Event], int, int] | None:
    days = Counter(_local_day(row.time, recipe["log_zone"]) for row in rows)
    if max(days.values()) > recipe["most_per_day"]:
        counts["bot_events"] += len(rows)
        counts["bot_users"] += 1
        return None
    in_order = sorted(rows, key=lambda row: row.time)
    events = [(row.item, row.time, row.weight) for row in in_order]
    validation, test = (_midnight(ds - back * DAY, recipe["log_zone"]) for back in (1, 0))
    num_train = sum(row.time < validation for row in rows)
    return events, num_train, sum(row.time < test for row in rows) - num_train


def _hidden(rows: list[_Read], recipe: Recipe, ds: date, back: int) -> set[Id]:
    """The items that these events of a user hide when the lists are made so many days before the end of `ds`."""
    zone, types, days = recipe["log_zone"], recipe["seen_types"], recipe["seen_lookback"]
    visible = [row for row in rows if back == 0 or row.time < _midnight(ds - (back - 1) * DAY, zone)]
    of_types = [row for row in visible if types is None or row.kind in types]
    return {row.item for row in of_types if days is None or row.time >= _midnight(ds - (back + days - 1) * DAY, zone)}


def _check_deliveries(counts: Counter[str], num_rows: int) -> None:
    if counts["reused"] > 0.5 * num_rows:
        raise RefusedError("have an id that another event of the same user has")
    if counts["duplicates"] > 0.5 * num_rows:
        raise RefusedError("rows repeat an earlier one")
