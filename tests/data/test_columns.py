from datetime import UTC, date, datetime

import numpy as np
import pyarrow as pa
import pytest

from pipeline.data.columns import check_time_type, id_type, read_ids, read_times, suspected_unit
from pipeline.data.sources import SourceSpec
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


def test_ids_keep_every_digit():
    exact = 2**53 + 1  # a float64 would lose the last bit
    ids, is_null, is_bad = read_ids(pa.array([exact, None], pa.int64()), pa.int64())
    assert ids[0].as_py() == exact
    assert is_null.tolist() == [False, True]
    assert not is_bad.any()
    assert read_ids(pa.array([exact]), pa.string())[0].to_pylist() == [str(exact)]
    assert read_ids(pa.array([str(exact)]), pa.int64())[0].to_pylist() == [exact]


def test_ids_that_cannot_be_read_are_told_from_those_that_are_not_there():
    ids, is_null, is_bad = read_ids(pa.array([b"a", b"\xff\xfe", b"", None], pa.binary()), pa.string())
    assert ids.to_pylist()[0] == "a"
    assert is_null.tolist() == [False, False, True, True]
    assert is_bad.tolist() == [False, True, False, False]
    ids, is_null, is_bad = read_ids(pa.array(["12", "x", ""]), pa.int64())
    assert ids.to_pylist() == [12, None, None]
    assert is_null.tolist() == [False, False, True]
    assert is_bad.tolist() == [False, True, False]
    too_large = pa.array([1, 2**63], pa.uint64())
    ids, is_null, is_bad = read_ids(too_large, pa.int64())
    assert ids.to_pylist() == [1, None]
    assert is_bad.tolist() == [False, True]


def test_an_id_is_an_integer_or_text():
    assert id_type(pa.int16(), "as_is", "u") == pa.int64()
    assert id_type(pa.dictionary(pa.int32(), pa.string()), "as_is", "u") == pa.string()
    assert id_type(pa.int64(), "string", "u") == pa.string()
    with pytest.raises(InputError, match="'uid' is double; an id must be"):
        id_type(pa.float64(), "as_is", "uid")


def test_a_number_without_a_unit_is_no_time():
    with pytest.raises(InputError, match="'when' is int64; say what its numbers count with time_unit"):
        check_time_type(pa.int64(), SourceSpec(), "when")
    with pytest.raises(InputError, match="must be a timestamp"):
        check_time_type(pa.bool_(), SourceSpec(), "when")


@pytest.mark.parametrize(
    ("value", "declared", "hint"),
    [
        ("1795177815250", "s", "they look like milliseconds: set time_unit: ms"),
        ("1795177815", "ms", "they look like seconds: set time_unit: s"),
        ("1795177815250000", "ms", "they look like microseconds: set time_unit: us"),
        ("1795177815", "s", ""),
        ("tomorrow", "s", ""),
    ],
)
def test_a_wrong_unit_is_recognised(value, declared, hint):
    assert suspected_unit(value, declared) == hint
