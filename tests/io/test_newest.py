"""The newest day of a log."""

from datetime import date, timedelta

import pyarrow as pa
import pytest

from pipeline.errors import InputError
from pipeline.io.inputs import list_log
from pipeline.io.newest import check_age, newest_day
from pipeline.io.night import open_night
from pipeline.settings import LogSettings, Settings
from tests.io.inputs_on_disk import NOON, events, settings_for, write

DS = date(2026, 11, 20)
TODAY = date(2026, 11, 21)


def newest(settings: Settings, zone: str = "UTC", today: date = TODAY) -> date:
    return newest_day(list_log(settings), zone, today)


def on_days(numbers: dict[int, int]) -> pa.Table:
    """Events of which `numbers[day]` are at noon of that day of November."""
    times = [NOON + timedelta(days=day - 20) for day, number in numbers.items() for _ in range(number)]
    return events(len(times), event_ts=pa.array(times))


def test_one_wrong_clock_does_not_decide_the_day(tmp_path, caplog):
    path = tmp_path / "lake" / "a.parquet"
    settings = settings_for(tmp_path, tmp_path / "lake")
    write(path, on_days({18: 40, 19: 40, 20: 40, 24: 1}))
    assert newest(settings, today=date(2026, 12, 1)) == DS
    assert "1 of its 121 events are after 2026-11-20, the last of 2026-11-24, and no such day looks like" in caplog.text
    caplog.clear()
    write(path, on_days({18: 40, 19: 40, 20: 40, 24: 2}))
    assert newest(settings, today=date(2026, 12, 1)) == date(2026, 11, 24), "5 % of a usual day"
    assert newest(settings, today=date(2026, 11, 22)) == DS, "beyond the clock of the store"
    assert newest(settings, today=date(2026, 11, 23)) == date(2026, 11, 24), "but for a slack of a day"
    write(path, on_days({18: 40, 19: 40, 20: 40}))
    caplog.clear()
    newest(settings)
    assert not caplog.records
    with pytest.raises(InputError, match="its oldest event is of 2026-11-18, but today is 2026-11-01"):
        newest(settings, today=date(2026, 11, 1))


def test_one_partition_of_the_future_does_not_decide_the_day(tmp_path, caplog):
    for day in (17, 18, 19, 20):
        write(tmp_path / "lake" / f"ds=2026-11-{day}" / "a.parquet", on_days({day: 40}))
    settings = settings_for(tmp_path, tmp_path / "lake")
    assert newest(settings) == DS
    assert not caplog.records
    write(tmp_path / "lake" / "ds=2026-11-24" / "a.parquet", on_days({24: 1}))
    assert newest(settings, today=date(2026, 12, 1)) == DS, "a partition of one row"
    assert "the newest partition is ds=2026-11-24, but it has 1 rows, where a usual day has 40; serving" in caplog.text
    write(tmp_path / "lake" / "ds=2087-11-24" / "a.parquet", on_days({24: 40}))
    caplog.clear()
    assert newest(settings) == DS
    assert "the newest partition is ds=2087-11-24, but today is 2026-11-21; serving ds=2026-11-20" in caplog.text
    with pytest.raises(InputError, match="its oldest partition is ds=2026-11-17, but today is 2026-11-01"):
        newest(settings, today=date(2026, 11, 1))


def test_the_day_is_one_of_the_logs_zone(tmp_path):
    late = NOON + timedelta(hours=14)  # 02:00 of the next day, UTC
    write(tmp_path / "lake" / "a.parquet", events(3, event_ts=pa.array([late] * 3)))
    settings = settings_for(tmp_path, tmp_path / "lake")
    assert newest(settings, "UTC") == date(2026, 11, 21)
    assert newest(settings, "America/New_York") == DS


def test_a_log_that_is_late_is_refused_where_the_settings_expect_it_daily(tmp_path):
    write(tmp_path / "lake" / "a.parquet", events())
    log = list_log(settings_for(tmp_path, tmp_path / "lake"))
    for max_age_days in (None, 1, 2):
        check_age(log, DS, TODAY, max_age_days)
    with pytest.raises(InputError, match=r"newest day is 2026-11-20, 1 days before today .*max_age_days is 0"):
        check_age(log, DS, TODAY, 0)
    with pytest.raises(InputError, match="the log is late"):
        open_night(Settings(root=str(tmp_path), log=LogSettings(uri=log.uri, source="default", max_age_days=0)))


def test_a_wrong_unit_is_suspected_when_the_newest_day_is_looked_up(tmp_path):
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,2,4.5,1795177815250\n")
    with pytest.raises(InputError) as error:
        newest(settings_for(tmp_path, tmp_path / "ratings.csv", "movielens_20m"))
    assert "no sane time in column 'timestamp' of its 1 rows: '1795177815250' would be" in str(error.value)
    assert "2026-11-20 12:30:15 with time_unit: ms (in" in str(error.value)


def test_times_are_explained_by_examples_from_the_whole_log(tmp_path):
    """Its first days alone could be months."""
    days = [f"{1 + i // 40:02d}/03/2026 10:00" for i in range(31 * 40)]
    table = events(len(days), event_ts=pa.array(days))
    write(tmp_path / "lake" / "a.parquet", table)
    with pytest.raises(InputError) as error:
        newest(settings_for(tmp_path, tmp_path / "lake"))
    assert "with time_format: '%d/%m/%Y %H:%M' (in" in str(error.value)
    assert "%m/%d" not in str(error.value)
