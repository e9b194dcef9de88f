"""The ways in which a generated log writes its times."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import pyarrow as pa

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SECOND, MINUTE, DAY_US = 1_000_000, 60_000_000, 86_400_000_000
ORIGIN_US = (date(2024, 2, 1) - date(1970, 1, 1)).days * DAY_US  # of relative_s
INDIA = timezone(timedelta(hours=5, minutes=30))


@dataclass(frozen=True)
class TimeForm:
    """How a column writes times: `write` makes the value of a moment, given as aware datetime in the source's zone."""

    write: Callable[[datetime], Any]
    spec: dict[str, str]  # keys of the source
    step: int  # µs: the form writes no finer times
    type: pa.DataType  # in Parquet
    names_no_zone: bool = False  # a wall clock's in the source's zone
    unreadable: tuple[Any, ...] = ()

    @property
    def has_oldest(self) -> bool:
        """Whether times before 1990 are faults."""
        return self.spec.get("time_unit") != "relative_s"


def micros(moment: datetime) -> int:
    """µs since 1970 UTC."""
    return (moment - EPOCH) // timedelta(microseconds=1)


def shown_as(time: int, form: TimeForm, zone: str) -> int:
    """The moment that a reader of the written time understands: coarser, and the first of two equal wall times."""
    local = (EPOCH + timedelta(microseconds=time)).astimezone(ZoneInfo(zone))
    if not form.names_no_zone:
        return time // form.step * form.step
    wall = local.replace(tzinfo=None, fold=0)
    coarse = datetime.min + (wall - datetime.min) // timedelta(microseconds=form.step) * timedelta(
        microseconds=form.step
    )
    return micros(coarse.replace(tzinfo=ZoneInfo(zone)).astimezone(UTC))


def written(time: int, form: TimeForm, zone: str) -> Any:
    """The value in the log of a moment."""
    return form.write((EPOCH + timedelta(microseconds=time)).astimezone(ZoneInfo(zone)))


def _wall(moment: datetime) -> datetime:
    return moment.replace(tzinfo=None)


def _wall_us(moment: datetime) -> int:
    return (_wall(moment) - datetime(1970, 1, 1)) // timedelta(microseconds=1)


def _text(write: Callable[[datetime], str], step: int, *, wall: bool = False, **spec: str) -> TimeForm:
    unreadable = ("yesterday", "2024-13-45", "12:30", "0000-00-00 00:00:00", "?")
    return TimeForm(write, spec, step, pa.string(), wall, unreadable)


def _pattern(pattern: str, step: int, zone_in_text: bool = False) -> TimeForm:
    return _text(lambda t: t.strftime(pattern), step, wall=not zone_in_text, time_format=pattern)


def _mixed(moment: datetime) -> str:
    forms = (moment.astimezone(INDIA).isoformat(), moment.astimezone(UTC).isoformat().replace("+00:00", "Z"))
    return forms[micros(moment) % 2]


def _number(unit: str, us: int, kind: pa.DataType, make: Callable[[int], Any] = int, step: int = 0) -> TimeForm:
    wrong = (float("nan"), float("inf")) if pa.types.is_floating(kind) else ()
    return TimeForm(lambda t: make(micros(t)), {"time_unit": unit}, step or us, kind, False, wrong)


def _digits(unit: str, us: int) -> TimeForm:
    return _text(lambda t: str(micros(t) // us), us, time_unit=unit)


def _timestamps() -> dict[str, TimeForm]:
    forms = {}
    for unit, us in (("s", SECOND), ("ms", 1_000), ("us", 1), ("ns", 1)):
        forms[f"timestamp[{unit}]"] = TimeForm(_in_unit(unit, _wall_us), {}, us, pa.timestamp(unit), True)
        for zone in ("UTC", "America/New_York"):
            forms[f"timestamp[{unit}, {zone}]"] = TimeForm(_in_unit(unit, micros), {}, us, pa.timestamp(unit, zone))
    return forms


def _in_unit(unit: str, count: Callable[[datetime], int]) -> Callable[[datetime], int]:
    scale = {"s": SECOND, "ms": 1_000, "us": 1}.get(unit)
    if scale is None:
        return lambda t: count(t) * 1_000 + count(t) % 999  # nanoseconds that nobody asked for
    return lambda t: count(t) // scale


def _ctime(moment: datetime) -> str:
    return moment.strftime("%a %b %d %H:%M:%S %Y")


_TEXTS = {
    "iso": _text(lambda t: _wall(t).isoformat(), 1, wall=True),
    "iso with a space": _text(lambda t: _wall(t).isoformat(" ", "milliseconds"), 1_000, wall=True),
    "iso Z": _text(lambda t: t.astimezone(UTC).isoformat().replace("+00:00", "Z"), 1),
    "iso offset": _text(lambda t: t.astimezone(INDIA).isoformat(), 1),
    "iso mixed": _text(_mixed, 1),
    "iso UTC": _text(lambda t: t.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"), SECOND),
    "iso day": _text(lambda t: _wall(t).date().isoformat(), DAY_US, wall=True),
    "digits s": _digits("s", SECOND),
    "digits ms": _digits("ms", 1_000),
    "digits us": _digits("us", 1),
    "digits ns": _text(lambda t: str(micros(t) * 1_000), 1, time_unit="ns"),
    "fractions of s": _text(lambda t: f"{micros(t) / SECOND:.3f}", 1_000, time_unit="s"),
    "relative_s": _text(
        lambda t: str((micros(t) - ORIGIN_US) // SECOND), SECOND, time_unit="relative_s", time_origin="2024-02-01"
    ),
    "german": _pattern("%d.%m.%Y %H:%M:%S", SECOND),
    "american": _pattern("%m/%d/%Y %I:%M:%S %p", SECOND),
    "minutes": _pattern("%d/%m/%Y %H:%M", MINUTE),
    "packed": _pattern("%Y%m%d%H%M%S", SECOND),
    "fraction": _pattern("%Y-%m-%dT%H:%M:%S.%f", 1),
    "words": _pattern("%b %d, %Y", DAY_US),
    "offset": _pattern("%Y-%m-%d %H:%M:%S %z", SECOND, zone_in_text=True),
    "rfc2822": _text(lambda t: t.strftime("%a, %d %b %Y %H:%M:%S %z"), SECOND, time_format="rfc2822"),
    "apache": _text(lambda t: t.strftime("%d/%b/%Y:%H:%M:%S %z"), SECOND, time_format="apache"),
    "ctime": _text(_ctime, SECOND, wall=True, time_format="ctime"),
}
_TYPED = _timestamps() | {
    "date32": TimeForm(lambda t: _wall(t).date(), {}, DAY_US, pa.date32(), True),
    "date64": TimeForm(lambda t: _wall(t).date(), {}, DAY_US, pa.date64(), True),
    "int64 s": _number("s", SECOND, pa.int64(), lambda us: us // SECOND),
    "int64 ms": _number("ms", 1_000, pa.int64(), lambda us: us // 1_000),
    "int64 us": _number("us", 1, pa.int64()),
    "int64 ns": _number("ns", 1, pa.int64(), lambda us: us * 1_000 + us % 999),
    "uint32 s": _number("s", SECOND, pa.uint32(), lambda us: us // SECOND),
    "float64 s": _number("s", SECOND, pa.float64(), lambda us: us / SECOND, 1_000),
    "float64 ms": _number("ms", 1_000, pa.float64(), lambda us: us / 1_000),
    "decimal s": _number("s", SECOND, pa.decimal128(20, 6), lambda us: Decimal(us) / SECOND, 1),
    "decimal ms": _number("ms", 1_000, pa.decimal128(18, 0), lambda us: Decimal(us // 1_000)),
    "int32 of days": TimeForm(
        lambda t: int(_wall(t).strftime("%Y%m%d")), {"time_format": "%Y%m%d"}, DAY_US, pa.int32(), True
    ),
    "int64 relative_s": TimeForm(
        lambda t: (micros(t) - ORIGIN_US) // SECOND,
        {"time_unit": "relative_s", "time_origin": "2024-02-01"},
        SECOND,
        pa.int64(),
    ),
}
TIMES: dict[str, TimeForm] = _TEXTS | _TYPED
CSV_TIMES = tuple(_TEXTS)
PARQUET_TIMES = (*_TYPED, *_TYPED, *_TEXTS)
