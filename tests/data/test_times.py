"""Times of any type become µs, and times that make no sense are explained."""

from datetime import UTC, date, datetime
from decimal import Decimal
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.sources import NAMED_TIME_FORMATS, SourceSpec
from pipeline.data.times import check_time_type, explain_times, read_times
from pipeline.errors import InputError

MOMENT = datetime(2026, 11, 20, 12, 30, 15, 250_000, tzinfo=UTC)
MICROSECONDS = 1_795_177_815_250_000


def test_the_moment_of_these_tests_is_the_number():
    assert int(MOMENT.timestamp() * 1_000_000) == MICROSECONDS


@pytest.mark.parametrize(
    ("column", "unit"),
    [
        (pa.array([MICROSECONDS // 1_000], pa.int64()), "ms"),
        (pa.array([MICROSECONDS], pa.int64()), "us"),
        (pa.array([MICROSECONDS / 1e6], pa.float64()), "s"),
        (pa.array([str(MICROSECONDS // 1_000)]), "ms"),
        (pa.array(["1795177815.25"]), "s"),
        (pa.array([b"2026-11-20T12:30:15.25"], pa.binary()), "timestamp"),
        (pa.array(["2026-11-20 12:30:15.25"]), "timestamp"),
        (pa.array(["2026-11-20T13:30:15.25+01:00"]), "timestamp"),
        (pa.array([MOMENT], pa.timestamp("ms")), "timestamp"),
        (pa.array([MOMENT], pa.timestamp("ns", tz="America/New_York")), "s"),  # a typed column knows its unit
        (pa.array(["2026-11-20T12:30:15.250"]).dictionary_encode(), "timestamp"),
        (pa.array(["2026-11-20 12:30:15.25 UTC"]), "timestamp"),
        (pa.array(["2026-11-20 13:30:15.25 +0100", "2026-11-20 12:30:15.25 GMT"])[:1], "timestamp"),
        (pa.array([MICROSECONDS * 1_000 + 999]), "ns"),
        (pa.array([str(MICROSECONDS * 1_000)]), "ns"),
        (pa.array([Decimal(MICROSECONDS) / 1_000_000], pa.decimal128(20, 6)), "s"),
        (pa.array([Decimal(MICROSECONDS * 1_000)], pa.decimal128(38, 0)), "ns"),
    ],
)
def test_a_time_of_any_type_becomes_microseconds(column, unit):
    times, is_null, is_bad = read_times(column, SourceSpec(time_unit=unit))
    assert times.tolist() == [MICROSECONDS]
    assert not is_null.any()
    assert not is_bad.any()


def test_dates_are_midnight_and_relative_seconds_count_from_their_origin():
    days = pa.array([date(2026, 11, 20)])
    assert read_times(days, SourceSpec())[0].tolist() == [1_795_132_800_000_000]
    relative = SourceSpec(time_unit="relative_s", time_origin="2026-11-20")
    assert read_times(pa.array([5]), relative)[0].tolist() == [1_795_132_805_000_000]


def test_times_that_cannot_be_read_are_told_from_those_that_are_not_there():
    for column in (pa.array(["soon", "", None, "1795177815"]), pa.array([b"\xff", b"", None, b"1795177815"])):
        times, is_null, is_bad = read_times(column, SourceSpec(time_unit="s"))
        assert is_bad.tolist() == [True, False, False, False]
        assert is_null.tolist() == [False, True, True, False]
        assert times[3] == 1_795_177_815_000_000
    mixed = pa.array(["2026-11-20T12:30:15.25Z", "2026-11-20T12:30:15.25", "2026-13-40"])
    times, _, is_bad = read_times(mixed, SourceSpec())
    assert times[:2].tolist() == [MICROSECONDS] * 2
    assert is_bad.tolist() == [False, False, True]


def test_an_absurd_time_never_wraps_into_a_sane_one():
    huge = pa.array([2**63 - 1, -(2**63), 10**15, 10**18], pa.int64())
    times, _, _ = read_times(huge, SourceSpec(time_unit="s"))
    assert (np.abs(times) > 4 * 10**17).all()  # far beyond any year a log could have
    assert (np.sign(times) == [1, -1, 1, 1]).all()
    times, _, is_bad = read_times(pa.array([np.inf, np.nan, 1e300]), SourceSpec(time_unit="s"))
    assert is_bad.tolist() == [True, True, False]
    assert times[2] > 10**18
    days = pa.array([2**31 - 1, -(2**31), None], pa.int32()).cast(pa.date32())
    milliseconds = pa.array([2**62, -(2**62), None]).cast(pa.date64())
    for column in (days, milliseconds):
        times, is_null, _ = read_times(column, SourceSpec(time_zone="America/New_York"))
        assert (np.abs(times[:2]) > 4 * 10**17).all()
        assert is_null.tolist() == [False, False, True]


def test_a_moment_that_no_calendar_has_is_unreadable():
    times = pa.array(
        ["2026-11-20T12:00:00", "2026-11-20T12:00:00Z", "0001-01-01T00:00+14:00", "9999-12-31T23:59-12:00"]
    )
    for column in (times, pa.array(["2026-11-20T12:00:00", "9999-12-31T23:59:59", "soon"])):
        _, _, is_bad = read_times(column, SourceSpec(time_zone="America/New_York"))
        assert is_bad.tolist()[-2:] == [True, True]
        assert not is_bad[0]


def test_a_number_without_a_unit_is_no_time():
    with pytest.raises(InputError, match="'when' is int64; say what its numbers count with time_unit"):
        check_time_type(pa.int64(), SourceSpec(), "when")
    with pytest.raises(InputError, match="must be a timestamp"):
        check_time_type(pa.bool_(), SourceSpec(), "when")


def test_a_column_of_nulls_has_no_time():
    _, is_null, is_bad = read_times(pa.nulls(2), SourceSpec())
    assert is_null.all()
    assert not is_bad.any()


@pytest.mark.parametrize(
    ("text", "time_format", "expected"),
    [
        ("11/20/2026 08:36:57 AM", "%m/%d/%Y %I:%M:%S %p", datetime(2026, 11, 20, 8, 36, 57)),
        ("3/1/2026", "%d/%m/%Y", datetime(2026, 1, 3)),
        ("2026/1/1 0:05", "%Y/%m/%d %H:%M", datetime(2026, 1, 1, 0, 5)),
        (" 2026-11-20 12:30:15.25 ", "%Y-%m-%d %H:%M:%S.%f", datetime(2026, 11, 20, 12, 30, 15, 250_000)),
        ("Fri, 20 Nov 2026 13:30:15 +0100", "rfc2822", datetime(2026, 11, 20, 12, 30, 15)),
        ("20/Nov/2026:12:30:15 -0700", "apache", datetime(2026, 11, 20, 19, 30, 15)),
        ("Fri Nov 20 12:30:15 2026", "ctime", datetime(2026, 11, 20, 12, 30, 15)),
        ("20261120", "%Y%m%d", datetime(2026, 11, 20)),
    ],
)
def test_a_time_is_read_in_the_form_that_the_source_names(text, time_format, expected):
    spec = SourceSpec(time_format=time_format)
    wanted = int(expected.replace(tzinfo=UTC).timestamp() * 1_000_000)
    times, is_null, is_bad = read_times(pa.array([text, "junk", "", None]), spec)
    assert times[0] == wanted
    assert is_bad.tolist() == [False, True, False, False]
    assert is_null.tolist() == [False, False, True, True]
    if text.isdigit():
        assert read_times(pa.array([int(text)]), spec)[0].tolist() == [wanted]


@given(st.datetimes(datetime(1990, 1, 1), datetime(2099, 1, 1)), st.sampled_from(sorted(NAMED_TIME_FORMATS.values())))
def test_a_form_reads_what_pythons_strftime_writes(moment, form):
    text = moment.replace(tzinfo=UTC).strftime(form)
    expected = datetime.strptime(text, form).replace(tzinfo=UTC)
    times, _, _ = read_times(pa.array([text]), SourceSpec(time_format=form))
    assert times.tolist() == [int(expected.timestamp()) * 1_000_000]


def test_a_form_that_cannot_be_read_is_refused():
    with pytest.raises(InputError, match="time_format '%H': this form cannot be read"):
        read_times(pa.array(["12"]), SourceSpec(time_format="%H"))


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["2026-07-01 12:00:00", "2026-12-01 12:00:00"]),
        pa.array([datetime(2026, 7, 1, 12), datetime(2026, 12, 1, 12)], pa.timestamp("ms")),
        pa.array(["2026-07-01 12:00", "2026-12-01T12:00:00,000"]),  # each on the slow way
    ],
)
def test_a_time_that_names_no_zone_is_a_clock_of_the_sources_zone(column):
    times, _, _ = read_times(column, SourceSpec(time_zone="America/New_York"))
    zone = ZoneInfo("America/New_York")
    expected = [datetime(2026, 7, 1, 12, tzinfo=zone), datetime(2026, 12, 1, 12, tzinfo=zone)]
    assert times.tolist() == [int(moment.timestamp()) * 1_000_000 for moment in expected]


def test_a_zone_that_is_named_wins_over_the_sources():
    column = pa.array(["2026-07-01T12:00:00Z"])
    tokyo, utc = (read_times(column, SourceSpec(time_zone=zone))[0].tolist() for zone in ("Asia/Tokyo", "UTC"))
    assert tokyo == utc
    typed = pa.array([MOMENT], pa.timestamp("us", tz="UTC"))
    assert read_times(typed, SourceSpec(time_zone="Asia/Tokyo"))[0].tolist() == [MICROSECONDS]


def test_clocks_that_go_back_or_jump_give_a_time():
    berlin = SourceSpec(time_zone="Europe/Berlin")
    times, _, is_bad = read_times(pa.array(["2026-10-25 02:30:00", "2026-03-29 02:30:00"]), berlin)
    assert not is_bad.any()
    first_of_two, change = datetime(2026, 10, 25, 0, 30, tzinfo=UTC), datetime(2026, 3, 29, 1, tzinfo=UTC)
    assert times.tolist() == [int(moment.timestamp()) * 1_000_000 for moment in (first_of_two, change)]


SECONDS = [1_795_177_815 + 100 * number for number in range(5)]


@pytest.mark.parametrize(
    ("values", "declared", "says"),
    [
        ([str(second * 1_000) for second in SECONDS], "s", "2026-11-20 12:30:15, .* with time_unit: ms$"),
        ([str(second) for second in SECONDS], "ms", "'1795177815', .* 2026-11-20 12:30:15, .* with time_unit: s$"),
        ([f"{second}000000" for second in SECONDS], "ms", "with time_unit: us$"),
        ([f"{second}000000000" for second in SECONDS], "s", "with time_unit: ns$"),
        (["20261120", "20261121"], "s", "2026-11-20 00:00:00, 2026-11-21 00:00:00 with time_unit: timestamp$"),
        (["11/20/2026", "11/21/2026"], "timestamp", "with time_format: '%m/%d/%Y'$"),
        (["1/3/2026", "2/3/2026"], "timestamp", "with time_format: '%m/%d/%Y', or 2026-03-01 .* '%d/%m/%Y'$"),
        (["tomorrow", "soon"], "s", "^'tomorrow', 'soon': no time_unit or common time_format explains them"),
        (["", " "], "s", "null or empty"),
    ],
)
def test_times_are_explained_by_what_they_would_be(values, declared, says):
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(explain_times(values, SourceSpec(time_unit=declared)))


def test_a_unit_that_explains_half_of_the_times_is_not_suggested():
    values = [str(second) for second in SECONDS] + [str(second * 1_000) for second in SECONDS]
    assert "no time_unit" in explain_times(values, SourceSpec(time_unit="us"))
