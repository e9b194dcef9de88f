"""What a night sees of the log: the times that it learns from, and those that count as seen."""

from dataclasses import dataclass, replace
from datetime import date, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.cleaning import AFTER_DS, OUT_OF_LOOKBACK
from pipeline.data.days import NEVER, end_of, midnight
from pipeline.data.seen import SeenRule

FOREVER = int(np.iinfo(np.int64).max)  # µs after every time


@dataclass(frozen=True)
class Period:
    """The model learns from events with `oldest <= event_ts < newest`, in µs since 1970 UTC.

    What is older or later is set aside, and still counts as seen by its user if it is of a type of `seen_rule`: the
    older from `oldest_seen` on, the later if it is a stray, that is, if the log does not go on after the night's day.
    """

    oldest: int
    newest: int
    oldest_seen: int
    seen_rule: SeenRule
    later_is_seen: bool = True

    @classmethod
    def until(cls, ds: date, zone: str, *, lookback: int | None, seen: SeenRule, is_partitioned: bool) -> "Period":
        """The period that ends with `ds`; `lookback` in days, None for all that there is.

        The rows of a `ds=` partition belong to its day, whatever their clocks say: no row of `ds` is later.
        """
        newest = FOREVER if is_partitioned else end_of(ds, zone)
        return cls(begin(ds, zone, lookback), newest, begin(ds, zone, seen.days), seen)

    def going_on(self) -> "Period":
        """The same for a log that goes on after `ds`: what comes later is not known yet."""
        return replace(self, later_is_seen=False)

    def cut(self, events: pa.Table) -> tuple[pa.Table, pa.Table, dict[str, int]]:
        """Cut rows of the first pass into events to learn from and rows that only count as seen; and the number of rows
        that are set aside here, by reason."""
        times, is_learned = events["event_ts"], events["is_learned"]
        is_old = pc.and_(is_learned, pc.less(times, self.oldest))
        is_later = pc.and_(is_learned, pc.greater_equal(times, self.newest))
        counts = {OUT_OF_LOOKBACK: pc.sum(is_old).as_py() or 0, AFTER_DS: pc.sum(is_later).as_py() or 0}
        learned = pc.and_(is_learned, pc.invert(pc.or_(is_old, is_later)))
        forgotten = pc.and_(is_learned, pc.less(times, self.oldest_seen))
        if not self.later_is_seen:
            forgotten = pc.or_(forgotten, is_later)
        seen = pc.and_not(self.seen_rule.has_type(events["event_type"]), pc.or_(learned, forgotten))
        return events.filter(learned), events.filter(seen).select(["user_id", "item_id"]), counts


def begin(ds: date, zone: str, days: int | None) -> int:
    """The first moment of the last `days` days that end with `ds`."""
    if days is None or days > (ds - date.min).days:
        return NEVER
    return midnight(ds - timedelta(days=days - 1), zone)
