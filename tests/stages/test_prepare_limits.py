"""Logs of which too much is bad, repeated or nobody's, and those that nothing can be learned from, are refused."""

import json
from collections import Counter
from datetime import date, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.io.night import open_night
from pipeline.stages.prepare.limits import check_worth_training
from pipeline.stages.prepare.report import tell
from tests.io.inputs_on_disk import NOON, events, settings_for, write
from tests.stages.prepared import file_of, run, validation_of


def test_ids_that_are_no_ids_of_deliveries_are_refused(tmp_path):
    write(tmp_path / "lake" / "a.parquet", events(8, user_id=pa.array(["u"] * 8), event_id=pa.array(["1"] * 8)))
    settings = settings_for(tmp_path, tmp_path / "lake")
    with pytest.raises(InputError, match="'event_id': 7 of 8 rows have an id that another event"):
        run(settings)
    allowed = settings_for(tmp_path, tmp_path / "lake", prepare={"max_duplicate_share": 0.9})
    buckets, manifest = run(allowed)
    assert sum(len(bucket.item_rows) for bucket in buckets) == 8
    assert manifest.counts["reused_event_ids"] == 7


def test_a_log_that_is_there_many_times_is_refused(tmp_path):
    for name in "abc":
        write(tmp_path / "lake" / f"{name}.parquet", events())
    with pytest.raises(InputError, match="8 of 12 rows repeat an earlier one"):
        run(settings_for(tmp_path, tmp_path / "lake"))


def test_words_that_mean_nobody_are_refused_when_there_are_many(tmp_path):
    write(tmp_path / "lake" / "a.parquet", events(4, user_id=pa.array(["a", "nan", "nan", "None"])))
    settings = settings_for(tmp_path, tmp_path / "lake")
    with pytest.raises(InputError, match=r"3 of 4 rows have a word .* \('nan' 2, 'None' 1\).*null_words: \["):
        run(settings)
    buckets, _ = run(settings_for(tmp_path, tmp_path / "lake", prepare={"max_bad_share": 0.8}))
    assert sum(bucket.num_users for bucket in buckets) == 3


def test_what_is_left_out_is_told_in_rows_and_share():
    counts = Counter(rows_read=1_000, out_of_lookback=300, duplicates=1, bot_events=2, reused_event_ids=4)
    assert tell(counts | Counter({"word:user_id:nan": 3})) == [
        "left out: 300 of 1,000 rows (30.00%) older than prepare.lookback_days; they still count as seen",
        "left out: 2 of 1,000 rows (0.20%) of users above prepare.max_user_events_per_day",
        "kept: 4 of 1,000 rows (0.40%) whose event_id another event of the user has",
        "kept: 3 of 1,000 rows (0.30%) whose id usually means nobody: 'user_id:nan' 3",
    ]


def test_bad_rows_below_the_limit_lie_in_the_quarantine(tmp_path):
    users = pa.array([None if i == 7 else f"u{i % 20}" for i in range(400)])
    write(tmp_path / "lake" / "a.parquet", events(400, user_id=users))
    settings = settings_for(tmp_path, tmp_path / "lake")
    run(settings)
    night = open_night(settings)
    (row,) = pq.read_table(pa.BufferReader(night.storage.read(file_of(night, "quarantine")))).to_pylist()
    assert (row["file"], row["row"], row["reason"], row["item_id"]) == ("a.parquet", 7, "user_id_null", "i1")
    assert validation_of(settings)["quarantined"] == {"user_id_null": 1}


@pytest.mark.parametrize(
    ("column", "values", "says"),
    [
        ("user_id", [None] * 40, "column 'user_id': 40 values are null or empty, for example None in row 0"),
        ("item_id", ["", "i1"] * 20, "column 'item_id': 20 values are null or empty, for example '' in row 0"),
        ("event_type", ["veiw"] * 40, "column 'event_type': 40 values are unknown: event_weights lacks it"),
    ],
)
def test_too_many_bad_rows_are_refused_with_an_example(tmp_path, monkeypatch, column, values, says):
    write(tmp_path / "lake" / "a.parquet", events(40, **{column: pa.array(values, pa.string())}))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "sources").mkdir(parents=True)
    (tmp_path / "conf" / "sources" / "strict.yaml").write_text(
        "columns: {event_type: event_type}\noptional_columns: [event_type]\nevent_weights: {view: 1.0}\n"
    )
    with pytest.raises(InputError) as error:
        run(settings_for(tmp_path, tmp_path / "lake", "strict"))
    assert f"lake/a.parquet, {says}" in str(error.value)
    assert "prepare.max_bad_share is 0.01" in str(error.value)


@pytest.mark.parametrize(
    ("bad", "number", "words"),
    [
        (['1,"x,4.0,1795176000', '2,"x,4.0,1795176001'], 2, "if quotes are part of the text, set csv: {quote: ''} in"),
        (['1,"12\\" mix, 3",4.0,5'], 1, "set csv: {escape: '\\'} in"),
        (["1;2;3;4"], 1, "is csv.delimiter right? in"),
    ],
)
def test_too_many_malformed_lines_are_refused_with_the_setting_that_may_help(tmp_path, bad, number, words):
    good = [f"{i},{i % 3},4.0,{int(NOON.timestamp()) + i}" for i in range(5)]
    (tmp_path / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *good, *bad]))
    with pytest.raises(InputError) as error:
        run(settings_for(tmp_path, tmp_path / "ratings.csv", "movielens_20m"))
    assert f"ratings.csv, {number} lines are without the columns of their file" in str(error.value)
    assert words in str(error.value)


def test_a_share_of_bad_rows_or_orphans_that_is_just_allowed_is_taken(tmp_path):
    users = pa.array([None, *(f"u{i}" for i in range(39))])
    write(tmp_path / "bad" / "a.parquet", events(40, user_id=users))
    run(settings_for(tmp_path, tmp_path / "bad", prepare={"max_bad_share": 1 / 40}))
    write(tmp_path / "lake" / "a.parquet", events(40))
    write(tmp_path / "items.parquet", pa.table({"item_id": ["i0", "j1"]}))
    items = {"uri": str(tmp_path / "items.parquet")}
    run(settings_for(tmp_path, tmp_path / "lake", items=items, prepare={"max_orphan_share": 0.5}))


def test_milliseconds_declared_as_seconds_are_recognised(tmp_path):
    lines = [f"{i % 7},{i},4.0,{int(NOON.timestamp()) * 1_000 + i}" for i in range(50)]
    write(tmp_path / "other.parquet", events())
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "\n".join(lines))
    settings = settings_for(tmp_path, tmp_path / "ratings.csv", "movielens_20m")
    with pytest.raises(InputError) as error:
        run(settings, date(2026, 11, 20))
    message = str(error.value)
    assert (
        "ratings.csv, column 'timestamp': 50 values are in the future, for example '1795176000000' in row 0" in message
    )
    assert "2026-11-20 12:00:00 with time_unit: ms (in" in message
    assert "movielens_20m.yaml" in message


def test_a_catalogue_of_another_log_is_refused(tmp_path):
    write(tmp_path / "lake" / "a.parquet", events(40))
    write(tmp_path / "numbers.parquet", pa.table({"item_id": [1, 2]}))
    write(tmp_path / "other.parquet", pa.table({"item_id": ["i0", "j1"]}))
    with pytest.raises(InputError, match="item_id is int64 there, but string in the log"):
        run(settings_for(tmp_path, tmp_path / "lake", items={"uri": str(tmp_path / "numbers.parquet")}))
    with pytest.raises(InputError, match="20 of 40 events are on items that the catalogue lacks, for example 'i1'"):
        run(settings_for(tmp_path, tmp_path / "lake", items={"uri": str(tmp_path / "other.parquet")}))
    write(tmp_path / "twice.parquet", pa.table({"item_id": ["i0", "i0"]}))
    with pytest.raises(InputError, match=r"twice\.parquet: item_id 'i0' occurs more than once"):
        run(settings_for(tmp_path, tmp_path / "lake", items={"uri": str(tmp_path / "twice.parquet")}))


@pytest.mark.parametrize("ds", [None, date(2026, 11, 20)])
def test_seconds_that_count_back_to_before_the_year_1_are_bad(tmp_path, monkeypatch, ds):
    monkeypatch.chdir(tmp_path)
    path = write_source("time_unit: relative_s\ntime_origin: 2026-11-20\n", tmp_path)
    write(tmp_path / "lake" / "a.parquet", events(5, event_ts=pa.array([0, 1, 2, -(10**11), -(2**63)])))
    _, manifest = run(settings_for(tmp_path, tmp_path / "lake", path.stem, prepare={"max_bad_share": 0.4}), ds)
    assert (manifest.counts["rows_read"], manifest.counts["events"]) == (5, 3)
    with pytest.raises(InputError, match=r"2 values are before 1990 \(of relative_s: before the year 1\), for"):
        run(settings_for(tmp_path, tmp_path / "lake", path.stem), ds)


def write_source(text: str, folder: Path) -> Path:
    """Write a source where it is looked up from `folder`."""
    path = folder / "conf" / "sources" / "own.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


def test_a_catalogue_without_an_item_is_refused(tmp_path):
    write(tmp_path / "lake" / "a.parquet", events(4))
    write(tmp_path / "items.parquet", pa.table({"item_id": pa.array([], pa.string())}))
    with pytest.raises(InputError, match=r"items\.parquet: the catalogue has no items"):
        run(settings_for(tmp_path, tmp_path / "lake", items={"uri": str(tmp_path / "items.parquet")}))


def test_a_log_without_a_usable_row_is_refused(tmp_path):
    write(tmp_path / "lake" / "ds=2026-11-20" / "a.parquet", events(4).slice(0, 0))
    with pytest.raises(InputError, match="no row of the log is left"):
        run(settings_for(tmp_path, tmp_path / "lake"))


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ({"users": 0, "bot_users": 3}, "no user is left: all 3 have a day with more than 9 events"),
        ({"users": 0, "bot_users": 0}, "no user is left$"),
        ({"users": 5, "trainable_users": 0}, "no user has two events to train on"),
        ({"users": 5, "trainable_users": 5, "evaluable_users": 0}, "nobody has a test event on an item that may"),
    ],
)
def test_histories_that_nothing_can_be_learned_from_are_refused_before_the_training(counts, says):
    with pytest.raises(InputError, match=f"h: {says}"):
        check_worth_training(counts, "h", 9)


def test_users_to_train_and_to_measure_on_are_counted(tmp_path):
    """u0 has three old events and a new one, u1 an old and a new one, u2 the old item again, u3 new ones only."""
    days = {"u0": (5, 4, 3, 0), "u1": (5, 0), "u2": (5, 5, 0), "u3": (0, 0)}
    rows = [(user, age, at) for user, ages in days.items() for at, age in enumerate(ages)]
    table = events(
        len(rows),
        user_id=pa.array([user for user, _, _ in rows]),
        item_id=pa.array(["i0" if user == "u2" else f"i{at}" for user, _, at in rows]),
        event_ts=pa.array([NOON - timedelta(days=age, seconds=at) for _, age, at in rows]),
    )
    write(tmp_path / "lake" / "a.parquet", table)
    _, manifest = run(settings_for(tmp_path, tmp_path / "lake"))
    check_worth_training(manifest.counts, "h", 9)
    assert (manifest.counts["trainable_users"], manifest.counts["evaluable_users"]) == (2, 2)


@pytest.mark.parametrize(
    ("user_id", "keys", "says"),
    [
        (pa.array([2**63 + 1], pa.uint64()), {}, "set user_id_type: string in .*own.yaml to read the ids as text"),
        (pa.array(["007"]), {"user_id_type": "int64"}, "example '007' .*set user_id_type: string in "),
        (pa.array([b"\xff"], pa.binary()), {}, "an id is UTF-8 text or an integer; cast the column in the log"),
        (pa.array(["x" * 70_000]), {}, "an id has at most 65,536 bytes; is this the column of the id?"),
    ],
)
def test_ids_that_cannot_be_read_are_refused_with_the_way_out(tmp_path, monkeypatch, user_id, keys, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "sources").mkdir(parents=True)
    (tmp_path / "conf" / "sources" / "own.yaml").write_text(json.dumps(keys))
    write(tmp_path / "lake" / "a.parquet", events(1, user_id=user_id))
    with pytest.raises(InputError, match=rf"a\.parquet, column 'user_id': 1 values are not readable.*{says}"):
        run(settings_for(tmp_path, tmp_path / "lake", "own"))


@pytest.mark.parametrize(
    ("times", "says"),
    [
        ([str(1_795_177_815_000 + i) for i in range(4)], "with time_unit: ms (in "),
        (
            ["1795177815"] * 3 + ["1795177815000"],
            "the other times are sane, so these are of another unit or form",
        ),
    ],
)
def test_times_of_another_unit_are_told_from_a_few_among_good_ones(tmp_path, monkeypatch, times, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "sources").mkdir(parents=True)
    (tmp_path / "conf" / "sources" / "own.yaml").write_text("time_unit: s")
    write(tmp_path / "lake" / "ds=2026-11-20" / "a.parquet", events(4, event_ts=pa.array(times)))
    with pytest.raises(InputError) as error:
        run(settings_for(tmp_path, tmp_path / "lake", "own"))
    assert says in str(error.value)
    assert "2026-11-20 12:30:15" in str(error.value)


def test_files_of_a_catalogue_may_differ_without_loss(tmp_path):
    write(tmp_path / "lake" / "a.parquet", events(4))
    items = pa.array(["i0"])
    for name, table in (
        ("a", pa.table({"item_id": items, "price": pa.array([1], pa.int32())})),
        ("b", pa.table({"item_id": pa.array(["i1"]).dictionary_encode(), "price": pa.array([2.5])})),
        ("c", pa.table({"item_id": pa.array(["i2"], pa.string_view())})),
    ):
        write(tmp_path / "items" / f"{name}.parquet", table)
    settings = settings_for(tmp_path, tmp_path / "lake", items={"uri": str(tmp_path / "items")})
    _, manifest = run(settings)
    assert manifest.counts["items"] == 3
