"""Small random logs: their rows, the faults planted in them, and the recipe that each is made by.

A recipe is a small dict of words and numbers; the same recipe always gives the same files.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from random import Random
from typing import Any
from uuid import UUID

from tests.stages.generated_times import TIMES, shown_as

DAY = timedelta(days=1)
DAYS = 4
KINDS = ("view", "click", "cart")
WEIGHTS = {"view": 1.0, "click": 2.0, "cart": 3.5}
WORDS = ("nan", "None", "\\N", "NULL", "00000000-0000-0000-0000-000000000000")
HOSTILE = (
    "two\nlines",
    "Zoë, née Ø",
    " leading",
    "007",
    'say "hi"',
    "a;b|c",
    "tab\there",
    "名前",
    "x" * 300,
    "'",
    "#7",
    "1e5",
    "-",
)
BIG = (0, -1, 2**53 + 1, 2**53, 2**63 - 1, -(2**63), 7, 70, 10**18, 10**18 + 1, -(2**31), 2**31)
Recipe = dict[str, Any]
VALUES: dict[str, Callable[[Random], float | str | None]] = {
    "number": lambda rng: rng.choice((None, 0.0, -3.0, 0.25, 4.5, 1e9, float("nan"), float("inf"))),
    "text": lambda rng: rng.choice((None, "0", "2.5", "1e2", "-1", "many", "", "nan", "7")),
}


@dataclass(frozen=True)
class Row:
    """One row as the log means it; None is null. `raw` has what stands in a column instead, when that is unreadable."""

    user: str | None
    item: str | None
    time: int | None  # µs since 1970 UTC
    kind: str | None
    delivery: str | None
    day: date  # of its partition, if the log has any
    value: float | str | None = None  # what multiplies the weight
    raw: dict[str, Any] = field(default_factory=dict)
    line: str | None = None  # of a text file: a line that is no row stands here instead


def make_rows(recipe: Recipe) -> list[Row]:
    """The rows of the log, with the row faults of the recipe planted, in no order of time."""
    rng = Random(recipe["seed"] + 1)
    last = date.fromisoformat(recipe["last_day"])
    users, items = _ids(rng, recipe, "u", 9), _ids(rng, recipe, "i", 12)
    form = TIMES[recipe["time"]]
    rows = []
    for number in range(rng.randrange(40, 70)):
        back = 0 if number < 4 else rng.randrange(DAYS)
        noon = datetime(last.year, last.month, last.day, 12, tzinfo=UTC) - back * DAY
        time = int(noon.timestamp()) * 1_000_000 + rng.randrange(-36_000_000_000, 36_000_000_000)
        seen_as = shown_as(time, form, recipe["zone"])
        kind = rng.choice(KINDS) if recipe["kinds"] != "none" else None
        delivery = f"d{number}" if recipe["has_deliveries"] else None
        value = VALUES[recipe["value"]](rng) if recipe["value"] else None
        rows.append(Row(rng.choice(users), rng.choice(items), seen_as, kind, delivery, last - back * DAY, value))
    for fault in recipe["faults"]:
        FAULTS[fault](rng, rows, recipe)
    return rows


def _ids(rng: Random, recipe: Recipe, letter: str, number: int) -> list[str]:
    if recipe["ids"] == "uuid":
        return [str(UUID(int=rng.getrandbits(128))) for _ in range(number)]
    if recipe["ids"] == "number":
        return [str(value) for value in rng.sample(range(1, 120), number)]
    if recipe["ids"] == "big":
        return [str(value) for value in BIG[:number]]
    if recipe["ids"] == "hostile":
        return [*HOSTILE][:number]
    return [f"{letter}{value:03d}" for value in rng.sample(range(500), number)]


def is_text_id(recipe: Recipe, column: str) -> bool:
    """Whether the ids of a column stand in the log as text of any kind."""
    written = recipe.get(f"{column}_as", "string")
    return recipe["format"] == "csv" or written in ("string", "large_string", "string_view", "dictionary", "digits")


def _change(rng: Random, rows: list[Row], most: int, change: Callable[[Row], Row]) -> None:
    for at in rng.sample(range(len(rows)), rng.randrange(1, most)):
        if rows[at].line is None:
            rows[at] = change(rows[at])


def _nulls(column: str) -> Callable[[Random, list[Row], Recipe], None]:
    return lambda rng, rows, recipe: _change(rng, rows, 5, lambda row: replace(row, **{column: None}))


def _empty_ids(rng: Random, rows: list[Row], recipe: Recipe) -> None:
    for column in ("user", "item"):
        if is_text_id(recipe, column):
            _change(rng, rows, 4, lambda row: replace(row, **{column: ""}))  # noqa: B023 - called at once


def _words(rng: Random, rows: list[Row], recipe: Recipe) -> None:
    if recipe["ids"] in ("text", "hostile"):
        column = rng.choice(("user", "item"))
        _change(rng, rows, 20, lambda row: replace(row, **{column: rng.choice(WORDS)}))


def _unreadable_ids(rng: Random, rows: list[Row], recipe: Recipe) -> None:
    column = rng.choice(("user", "item"))
    is_number = recipe["ids"] in ("number", "big")
    if is_number and recipe["declared"] == "int64" and is_text_id(recipe, column):
        wrong = rng.choice(("007", "0x7", "1.5", "seven", " 7", "+7", "9223372036854775808", "1e3"))
        _change(rng, rows, 4, lambda row: replace(row, raw=row.raw | {column: wrong}))
    if recipe.get(f"{column}_as") in ("binary", "large_binary", "binary_view"):
        _change(rng, rows, 4, lambda row: replace(row, raw=row.raw | {column: b"\xff\xfe\x00"}))
    if recipe["declared"] != "string" and recipe.get(f"{column}_as") == "uint64":
        _change(rng, rows, 4, lambda row: replace(row, raw=row.raw | {column: 2**64 - 1}))


def _unreadable_times(rng: Random, rows: list[Row], recipe: Recipe) -> None:
    wrong = TIMES[recipe["time"]].unreadable
    if wrong:
        _change(rng, rows, 5, lambda row: replace(row, raw=row.raw | {"time": rng.choice(wrong)}))


def _moved(year: int) -> Callable[[Random, list[Row], Recipe], None]:
    """Times of another year: clocks that are wrong, or times that count another unit."""

    def move(rng: Random, rows: list[Row], recipe: Recipe) -> None:
        moment = int(datetime(year, 3, 1, 10, tzinfo=UTC).timestamp()) * 1_000_000
        time = shown_as(moment, TIMES[recipe["time"]], recipe["zone"])
        _change(rng, rows, 3, lambda row: replace(row, time=time))

    return move


def _redelivered(rng: Random, rows: list[Row], recipe: Recipe) -> None:
    for _ in range(rng.randrange(1, 8)):
        rows.insert(rng.randrange(len(rows) + 1), rng.choice(rows))


def _reused_deliveries(rng: Random, rows: list[Row], recipe: Recipe) -> None:
    if recipe["has_deliveries"]:
        _change(rng, rows, rng.choice((4, 39)), lambda row: replace(row, delivery="same"))


def _no_deliveries(rng: Random, rows: list[Row], recipe: Recipe) -> None:
    if recipe["has_deliveries"]:
        rows[:] = [replace(row, delivery=None) for row in rows]


def _other_kinds(rng: Random, rows: list[Row], recipe: Recipe) -> None:
    if recipe["kinds"] != "none":
        _change(rng, rows, 5, lambda row: replace(row, kind=rng.choice((None, "look", "Übersicht"))))


def _crowds(rng: Random, rows: list[Row], recipe: Recipe) -> None:
    """One user does much on a day."""
    first = rng.choice(rows)
    for _ in range(10):
        other = rng.choice(rows)
        delivery = "c" if recipe["has_deliveries"] else None
        rows.append(replace(other, user=first.user, time=first.time, day=first.day, delivery=delivery))


def _malformed(rng: Random, rows: list[Row], recipe: Recipe) -> None:
    for _ in range(rng.randrange(1, 4)):
        line = rng.choice(("short", "long", "word"))
        rows.insert(rng.randrange(1, len(rows)), replace(rows[0], user=None, item=None, line=line))


def _stray_quotes(rng: Random, rows: list[Row], recipe: Recipe) -> None:
    """A note begins with a quote that is a part of the text, and so does a later one: the rows from one to the other
    are one value for every reader."""
    first = rng.randrange(1, len(rows) - 6)
    last = first + rng.randrange(1, 5)
    for at in range(first, last + 1):
        rows[at] = replace(rows[at], line={first: "opens", last: "closes"}.get(at, "hidden"))


def _late(rng: Random, rows: list[Row], recipe: Recipe) -> None:
    """Rows in the partition of a later day than theirs."""
    last = date.fromisoformat(recipe["last_day"])
    _change(rng, rows, 6, lambda row: replace(row, day=min(last, row.day + 2 * DAY)))


FAULTS: dict[str, Callable[[Random, list[Row], Recipe], None]] = {
    "null users": _nulls("user"),
    "null items": _nulls("item"),
    "null times": _nulls("time"),
    "empty ids": _empty_ids,
    "words": _words,
    "unreadable ids": _unreadable_ids,
    "unreadable times": _unreadable_times,
    "times of 1970": _moved(1970),
    "times of 2104": _moved(2104),
    "clock ahead": _moved(2089),
    "old events": _moved(2019),
    "redelivered": _redelivered,
    "reused deliveries": _reused_deliveries,
    "no deliveries": _no_deliveries,
    "other kinds": _other_kinds,
    "crowds": _crowds,
    "malformed": _malformed,
    "stray quotes": _stray_quotes,
    "late": _late,
}
ONLY_TEXT = {"malformed", "stray quotes"}
