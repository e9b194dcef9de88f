"""Prepare as a whole. The tasks run in this process, one after the other; the tests on Ray say so in their names."""

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.artifacts import FileEntry
from pipeline.data.cleaning import MALFORMED
from pipeline.data.histories import Bucket, user_bucket
from pipeline.data.simulation.log import simulate_days
from pipeline.distributed.runner import RayRunner
from pipeline.errors import InfrastructureError, InputError
from pipeline.io.artifacts import require_manifest
from pipeline.io.histories import bucket_claims, items_claims, odd_days, read_items
from pipeline.io.inputs import day_of
from pipeline.io.night import open_night
from pipeline.io.rows import check_columns
from pipeline.io.storage import open_storage
from pipeline.settings import Settings
from pipeline.stages.local import LocalRunner
from pipeline.stages.prepare import tasks
from pipeline.stages.prepare.job import Piece, cut_pieces
from pipeline.stages.prepare.parts import parts_of
from pipeline.stages.prepare.segments import read_segment, remove_scratch, write_segments
from tests.io.inputs_on_disk import NOON, events, settings_for, write
from tests.stages.prepared import TINY, file_of, run, simulated, validation_of


def by_user(settings: Settings, buckets: list[Bucket]) -> dict:
    """The history of each user: (item ids, times, number of training events, number of validation events)."""
    night = open_night(settings)
    item_ids = read_items(night.storage, night.histories)["item_id"].to_pylist()
    return {
        user: (
            [item_ids[row] for row in bucket.item_rows[bucket.offsets[u] : bucket.offsets[u + 1]]],
            bucket.event_ts[bucket.offsets[u] : bucket.offsets[u + 1]].tolist(),
            int(bucket.num_train[u]),
            int(bucket.num_validation[u]),
        )
        for bucket in buckets
        for u, user in enumerate(bucket.user_ids.to_pylist())
        if not bucket.left_out[u].as_py()
    }


def oracle(settings: Settings) -> dict:
    """The same as `by_user`, from the whole log in memory, without repeated events, unknown items and bots."""
    frame = pa.concat_tables(table for _, table in simulate_days(settings.simulate)).to_pylist()
    known = {f"i{n:06d}" for n in range(settings.simulate.num_items)}
    seen, histories = set(), {}
    for event in frame:
        if event["event_id"] in seen or event["item_id"] not in known:
            continue
        seen.add(event["event_id"])
        histories.setdefault(event["user_id"], []).append(event)
    days = {user: [e["event_ts"].date() for e in history] for user, history in histories.items()}
    people = [user for user in histories if max(days[user].count(day) for day in set(days[user])) <= 2_000]
    test, validation = date(2026, 11, 20), date(2026, 11, 19)
    expected = {}
    for user in people:
        history = sorted(histories[user], key=lambda e: e["event_ts"])
        times = [e["event_ts"] for e in history]
        num_train = sum(t.date() < validation for t in times)
        num_before = sum(t.date() < test for t in times)
        microseconds = [pa.scalar(t).cast(pa.int64()).as_py() for t in times]
        expected[user] = ([e["item_id"] for e in history], microseconds, num_train, num_before - num_train)
    return expected


def test_histories_are_what_the_slow_way_gives(tmp_path):
    settings = simulated(tmp_path)
    buckets, manifest = run(settings)
    histories = by_user(settings, buckets)
    assert histories == oracle(settings)
    for number, bucket in enumerate(buckets):
        assert (user_bucket(bucket.user_ids, 8) == number).all()
        assert bucket.user_ids.to_pylist() == sorted(bucket.user_ids.to_pylist())
    assert manifest.counts["users"] == len(histories)
    assert manifest.counts["bot_users"] == 1


def test_every_row_of_the_log_is_accounted_for(tmp_path):
    settings = simulated(tmp_path)
    run(settings)
    validation = validation_of(settings)
    log_rows = sum(table.num_rows for _, table in simulate_days(settings.simulate))
    assert validation["rows_read"] == sum(validation["rows"].values()) == log_rows
    assert validation["rows"]["duplicates"] > 0
    assert validation["rows"]["bot_events"] > 2_000
    assert validation["late_rows"] > 0
    assert list(validation["quarantined"]) == ["item_id_orphan"]
    assert validation["events"] == validation["rows"]["kept"]
    parts = ("train_events", "validation_events", "test_events")
    assert validation["events"] == sum(validation[part] for part in parts)
    assert all(validation[part] > 0 for part in parts)


def test_the_item_index_has_the_catalogue_and_the_counts(tmp_path):
    settings = simulated(tmp_path)
    buckets, _ = run(settings)
    night = open_night(settings)
    items = read_items(night.storage, night.histories)
    assert items["item_id"].to_pylist() == [f"i{n:06d}" for n in range(40)]
    assert items["title"].null_count == 0
    for name, parts in (
        ("num_events", [b.item_rows for b in buckets]),
        ("num_train_events", [b.cut("train").values for b in buckets]),
        ("num_validation_events", [b.held_out("validation").values for b in buckets]),
    ):
        assert items[name].to_pylist() == np.bincount(np.concatenate(parts), minlength=40).tolist()
    events = [event for b in buckets for event in zip(b.item_rows.tolist(), b.event_ts.tolist(), strict=True)]
    firsts = [min((time for item, time in events if item == row), default=None) for row in range(40)]
    assert items["first_event_ts"].cast(pa.int64()).to_pylist() == firsts


def test_the_size_of_tasks_changes_nothing(tmp_path):
    whole = simulated(tmp_path / "a")
    pieces = simulated(tmp_path / "b", prepare={"rows_per_task": 100})
    assert [f.sha256 for f in run(whole)[1].files] == [f.sha256 for f in run(pieces)[1].files]


def test_the_number_of_buckets_changes_no_history(tmp_path):
    few, many = simulated(tmp_path, output={"num_buckets": 1}), simulated(tmp_path, output={"num_buckets": 30})
    assert by_user(few, run(few)[0]) == by_user(many, run(many)[0])


def test_a_manifest_names_the_files_and_nothing_else_is_left(tmp_path):
    settings = simulated(tmp_path)
    _, manifest = run(settings)
    night = open_night(settings)
    named = {f"{night.histories.prefix}/{file.key}" for file in manifest.files}
    listed = {info.key: info.size for info in night.storage.list(f"{night.histories.prefix}/")}
    claims = {bucket_claims(night.storage, night.histories).key(bucket) for bucket in range(8)}
    claims.add(items_claims(night.storage, night.histories).key(0))
    assert set(listed) == named | claims | {f"{night.histories.prefix}/manifest.json"}
    assert all(listed[f"{night.histories.prefix}/{file.key}"] == file.bytes for file in manifest.files)
    names = {file.key.rpartition("-")[0] for file in manifest.files}
    assert names == {f"bucket-{b:05d}" for b in range(8)} | {"items-00000", "quarantine-00000", "validation"}


@pytest.mark.parametrize("dies_after", [0, 3, 8, 12])
def test_a_run_that_died_goes_on_where_it_was(tmp_path, monkeypatch, dies_after):
    whole = simulated(tmp_path / "whole", prepare={"rows_per_task": 800})
    settings = simulated(tmp_path / "died", prepare={"rows_per_task": 800})
    with pytest.raises(InfrastructureError, match="power cut"):
        run(settings, runner=Dies(settings, dies_after))
    read, cleaned = [], []
    monkeypatch.setattr(tasks, "read_rows", counted(tasks.read_rows, read))
    monkeypatch.setattr(tasks, "clean_bucket", counted(tasks.clean_bucket, cleaned))
    resumed = run(settings)[1].files
    num_tasks = len(cut_pieces_of(settings))
    assert len(read) < num_tasks + dies_after or dies_after == 0
    assert len(cleaned) == 8 - max(0, dies_after - num_tasks)
    if dies_after >= num_tasks:
        assert not read
    assert [f.sha256 for f in resumed] == [f.sha256 for f in run(whole)[1].files]


class Dies(LocalRunner):
    """Dies before its task number `after`."""

    def __init__(self, settings: Settings, after: int) -> None:
        super().__init__(settings)
        self._left = after

    def run_tasks(self, label, function, arguments):
        for given in arguments:
            if not self._left:
                raise InfrastructureError("power cut")
            self._left -= 1
            yield function(*given)


def test_a_run_that_died_may_go_on_with_tasks_of_another_size(tmp_path):
    """The log is cut elsewhere then, and what was set aside before is of no use."""
    whole = run(simulated(tmp_path / "whole"))[1].files
    settings = simulated(tmp_path / "died", prepare={"rows_per_task": 1_500})
    with pytest.raises(InfrastructureError, match="power cut"):
        run(settings, runner=Dies(settings, 1))
    assert run(simulated(tmp_path / "died", prepare={"rows_per_task": 400}))[1].files == whole


@pytest.mark.parametrize("fault", ["lost", "cut short", "rotted"])
@pytest.mark.parametrize("died_in", ["first pass", "second pass"])
def test_reruns_make_up_for_scratch_that_is_lost_or_damaged(tmp_path, fault, died_in):
    """What a task wrote counts as done only while all of it is there, so that nobody has to tidy up by hand."""
    bad = {"bot_share": 0.1, **{name: value for name, value in TINY.items() if name != "bot_share"}}
    sections = {"simulate": bad, "prepare": {"rows_per_task": 800, "max_user_events_per_day": 5}}
    whole = run(simulated(tmp_path / "whole", **sections))[1].files
    settings = simulated(tmp_path / "died", **sections)
    num_tasks = len(cut_pieces_of(settings))
    with pytest.raises(InfrastructureError, match="power cut"):
        run(settings, runner=Dies(settings, num_tasks if died_in == "first pass" else num_tasks + 8 - 1))
    storage = open_storage(settings.root)
    written = [info.key for info in storage.list("histories/") if info.key.endswith(".arrows")]
    assert any("rejected" in key for key in written) == (died_in == "second pass")
    for key in written:
        data = bytearray(storage.read(key))
        data[len(data) // 2] ^= 1
        storage.delete(key)
        if fault != "lost":
            storage.create(key, bytes(data[: -1 if fault == "cut short" else None]))
    for _ in range(len(written) + 1):  # each run finds one damaged object at least
        try:
            assert run(settings)[1].files == whole
            break
        except InfrastructureError as error:
            if fault != "rotted" or "was damaged and is removed; run again" not in str(error):
                raise
    else:
        pytest.fail("no number of reruns is enough")


def test_a_segment_that_rotted_is_named(tmp_path):
    storage = open_storage(str(tmp_path))
    first, second = write_segments(storage, "x", "rows.arrows", [events(2), events(3)])
    assert [read_segment(storage, segment).num_rows for segment in (first, second)] == [2, 3]
    assert first.key == second.key
    data = bytearray(storage.read(first.key))
    data[second.offset + second.length // 2] ^= 1
    storage.delete(first.key)
    storage.create(first.key, bytes(data))
    assert read_segment(storage, first).equals(events(2))
    with pytest.raises(InfrastructureError, match=r"x/rows-\w{16}\.arrows: was damaged and is removed; run again"):
        read_segment(storage, second)
    assert storage.head(first.key) is None


class Overtaken(LocalRunner):
    """Before task `number` of the pass `label`, another process that was first with the same histories removes what it
    has no use for any more."""

    def __init__(self, settings: Settings, label: str, number: int) -> None:
        super().__init__(settings)
        self._moment, self._night = (label, number), open_night(settings)

    def run_tasks(self, label, function, arguments):
        for number, given in enumerate(arguments):
            if (label, number) == self._moment:
                remove_scratch(self._night.storage, self._night.histories)
            yield function(*given)


@pytest.mark.parametrize(
    ("label", "number"), [("reading the log", 1), ("writing histories", 0), ("writing histories", 1)]
)
def test_a_run_whose_scratch_another_process_has_removed_is_worth_a_retry(tmp_path, label, number):
    whole = run(simulated(tmp_path / "whole", prepare={"rows_per_task": 800, "keep_partitions": False}))[1].files
    settings = simulated(tmp_path / "overtaken", prepare={"rows_per_task": 800, "keep_partitions": False})
    with pytest.raises(InfrastructureError, match="removed before it was read; run again"):
        run(settings, runner=Overtaken(settings, label, number))
    assert run(settings)[1].files == whole


def test_so_it_is_for_a_bucket_that_nobody_is_in(tmp_path):
    users = pa.array([f"u{number}" for number in range(9)])
    in_others = users.filter(pa.array(user_bucket(users, 8) > 0))
    write(tmp_path / "lake" / "ds=2026-11-20" / "a.parquet", events(len(in_others), user_id=in_others))
    settings = settings_for(tmp_path, tmp_path / "lake", output={"num_buckets": 8})
    with pytest.raises(InfrastructureError, match=r"item-ids-\w{16}\.parquet: removed before it was read; run again"):
        run(settings, runner=Overtaken(settings, "writing histories", 0))


def counted(function: Callable, calls: list) -> Callable:
    def wrapper(*arguments):
        calls.append(function)
        return function(*arguments)

    return wrapper


def cut_pieces_of(settings: Settings) -> list[tuple[Piece, ...]]:
    night = open_night(settings, date(2026, 11, 20))
    columns = check_columns(night.inputs.log)
    return [
        pieces
        for part in parts_of(night, settings)
        for pieces in cut_pieces(night.inputs.log, columns, part, settings.prepare.rows_per_task)
    ]


@pytest.mark.parametrize("has_catalogue", [True, False])
@pytest.mark.parametrize("lookback_days", [3, 3_650])
def test_a_night_reads_what_is_new_and_leaves_what_a_night_that_reads_all_leaves(
    tmp_path, monkeypatch, lookback_days, has_catalogue
):
    """Eight nights, of which each reads one partition, although each partition brings late events."""
    simulated(tmp_path)
    (lake,) = tmp_path.glob("simulated/*")
    items = {"items": {"uri": str(next(lake.glob("items-*.parquet")))}} if has_catalogue else {}
    sections = {
        "prepare": {"rows_per_task": 300, "lookback_days": 3, "seen_lookback_days": lookback_days, "max_bad_share": 1.0}
    } | items
    days = [date(2026, 11, 13) + timedelta(days=day) for day in range(8)]
    read: set[str] = set()
    real_rows = tasks.read_rows

    def read_rows(log, file, row_groups, names):
        read.add(file.key.partition("/")[0])
        return real_rows(log, file, row_groups, names)

    monkeypatch.setattr(tasks, "read_rows", read_rows)
    nightly = settings_for(tmp_path / "nightly", lake / "log", **sections)
    for number, day in enumerate(days):
        read.clear()
        _, manifest = run(nightly, day)
        assert read == {f"ds={day}"}
        read.clear()
        _, expected = run(settings_for(tmp_path / f"whole-{day}", lake / "log", **sections), day)
        assert len(read) == min(number + 1, lookback_days)
        assert [file.sha256 for file in manifest.files] == [file.sha256 for file in expected.files]
        assert manifest.counts == expected.counts
    assert manifest.counts["late_rows"] > 0
    kept = {day_of(info.key) for info in open_storage(nightly.root).list("read/")}
    assert kept == set(days[-lookback_days:]), "what is older than the lookback is gone"


def test_a_partition_that_has_changed_is_read_again_and_no_other(tmp_path, monkeypatch):
    def on_day(day: int, number: int) -> pa.Table:
        return events(number, event_ts=pa.array([NOON - timedelta(days=20 - day)] * number))

    for day in (18, 19, 20):
        write(tmp_path / "lake" / f"ds=2026-11-{day}" / "a.parquet", on_day(day, 30))
    settings = settings_for(tmp_path, tmp_path / "lake")
    run(settings)
    write(tmp_path / "lake" / "ds=2026-11-19" / "b.parquet", on_day(19, 10))
    read: list[object] = []
    monkeypatch.setattr(tasks, "read_rows", counted(tasks.read_rows, read))
    _, manifest = run(settings)
    assert len(read) == 2, "both files of the partition"
    assert manifest.counts["rows_read"] == 100
    other = settings.model_copy(update={"root": str(tmp_path / "other")})
    assert [file.sha256 for file in run(other)[1].files] == [file.sha256 for file in manifest.files]
    kept = {tuple(info.key.split("/")[1:4]) for info in open_storage(settings.root).list("read/")}
    assert len(kept) == 3, "one version of each partition"


def test_a_task_has_some_row_groups_of_some_files(tmp_path):
    write(tmp_path / "lake" / "a.parquet", events(10), row_group_size=4)
    write(tmp_path / "lake" / "b.parquet", events(3))
    settings = settings_for(tmp_path, tmp_path / "lake", prepare={"rows_per_task": 6})
    assert cut_pieces_of(settings) == [
        (Piece(0, 0, (0,), 4),),
        (Piece(0, 4, (1,), 4), Piece(0, 8, (2,), 2)),
        (Piece(1, 0, (0,), 3),),
    ]


def test_rows_are_numbered_through_a_file_whatever_is_read_at_once(tmp_path, monkeypatch):
    users = pa.array([None if i in (2, 7, 19) else f"u{i}" for i in range(20)])
    write(tmp_path / "lake" / "a.parquet", events(20, user_id=users), row_group_size=11)
    settings = settings_for(tmp_path, tmp_path / "lake", prepare={"max_bad_share": 1.0})
    monkeypatch.setattr("pipeline.io.rows.BATCH_ROWS", 3)
    run(settings)
    night = open_night(settings)
    quarantine = pq.read_table(pa.BufferReader(night.storage.read(file_of(night, "quarantine"))))
    assert sorted(quarantine["row"].to_pylist()) == [2, 7, 19]


def test_all_malformed_lines_are_counted_and_kept(tmp_path):
    good = [f"{i},{i % 3},4.0,{int(NOON.timestamp()) + i}" for i in range(5)]
    (tmp_path / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *good, *["1,2"] * 7]))
    settings = settings_for(tmp_path, tmp_path / "ratings.csv", "movielens_20m", prepare={"max_bad_share": 1.0})
    run(settings)
    found = validation_of(settings)
    assert (found["rows_read"], found["quarantined"], found["malformed_bytes"]) == (12, {MALFORMED: 7}, 21)
    night = open_night(settings)
    quarantine = pq.read_table(pa.BufferReader(night.storage.read(file_of(night, "quarantine"))))
    assert quarantine["line"].to_pylist() == ["1,2"] * 7


@pytest.mark.parametrize("keeps", [True, False])
def test_every_bad_row_lies_in_the_quarantine_in_the_order_of_the_log(tmp_path, monkeypatch, keeps):
    """Of all partitions, of which a second night reads the last alone, and in files of bounded size."""
    monkeypatch.setattr("pipeline.stages.prepare.report.QUARANTINE_ROWS", 1_500)
    monkeypatch.setattr("pipeline.stages.prepare.segments.MAX_EXAMPLES", 5)
    expected = []
    for day in (18, 19, 20):
        users = pa.array([None if i % 3 == day % 3 else f"u{i}" for i in range(3_000)])
        folder = f"ds=2026-11-{day}"
        times = pa.array([datetime(2026, 11, day, 12, tzinfo=UTC)] * 3_000, pa.timestamp("us", tz="UTC"))
        rows = events(3_000, user_id=users, event_ts=times)
        write(tmp_path / "lake" / folder / "a.parquet", rows, row_group_size=500)
        expected += [(f"{folder}/a.parquet", row) for row in range(3_000) if row % 3 == day % 3]
    prepare = {"max_bad_share": 1.0, "keep_partitions": keeps, "rows_per_task": 1_000}
    settings = settings_for(tmp_path, tmp_path / "lake", prepare=prepare)
    for ds in (date(2026, 11, 19), date(2026, 11, 20)):
        run(settings, ds)
        night = open_night(settings, ds)
        manifest = require_manifest(night.storage, night.histories, "prepare")
        files = [file for file in manifest.files if file.key.startswith("quarantine-")]
        assert len(files) == 2
        data = [night.storage.read(night.histories.key(file.key)) for file in sorted(files, key=lambda f: f.key)]
        found = pa.concat_tables(pq.read_table(pa.BufferReader(each)) for each in data)
        assert found["reason"].unique().to_pylist() == ["user_id_null"]
        wanted = [place for place in expected if place[0] <= f"ds={ds}/z"]
        assert list(zip(found["file"].to_pylist(), found["row"].to_pylist(), strict=True)) == wanted
        assert validation_of(settings, ds)["quarantined"] == {"user_id_null": len(wanted)}


def test_an_event_is_late_when_it_happened_before_the_day_of_its_partition(tmp_path):
    midnight = NOON.replace(hour=0)
    times = [midnight, midnight - timedelta(microseconds=1), midnight - timedelta(days=3), NOON]
    write(
        tmp_path / "lake" / "ds=2026-11-20" / "a.parquet",
        events(4, event_ts=pa.array(times, pa.timestamp("us", tz="UTC"))),
    )
    settings = settings_for(tmp_path, tmp_path / "lake")
    run(settings)
    assert validation_of(settings)["late_rows"] == 2


def test_without_a_catalogue_the_items_are_those_of_the_log_in_order(tmp_path):
    for number, items in enumerate((["i9", "i2"], ["i5", "i9"], ["i1", "i1"])):
        write(tmp_path / "lake" / f"{number}.parquet", events(2, item_id=pa.array(items)))
    settings = settings_for(tmp_path, tmp_path / "lake", prepare={"rows_per_task": 2})
    run(settings)
    night = open_night(settings)
    items = read_items(night.storage, night.histories)
    assert items["item_id"].to_pylist() == ["i1", "i2", "i5", "i9"]
    assert items["num_events"].to_pylist() == [2, 1, 1, 2]


@pytest.mark.parametrize("kind", [pa.string_view(), pa.binary_view()])
def test_bad_rows_and_a_catalogue_may_have_views_of_text(tmp_path, kind):
    """Arrow can neither take nor filter a column of views."""
    users, titles = pa.array([None, b"u0", b"u1", b"u2"]).cast(kind), pa.array([b"one", None]).cast(kind)
    write(tmp_path / "lake" / "a.parquet", events(user_id=users))
    tags = pa.array([{"a": b"x"}, None], pa.struct([("a", kind)]))
    write(tmp_path / "items.parquet", pa.table({"item_id": ["i1", "i0"], "title": titles, "tags": tags}))
    items = {"uri": str(tmp_path / "items.parquet")}
    settings = settings_for(tmp_path, tmp_path / "lake", items=items, prepare={"max_bad_share": 0.5})
    _, manifest = run(settings)
    assert (manifest.counts["rows_read"], manifest.counts["events"]) == (4, 3)
    night = open_night(settings)
    assert read_items(night.storage, night.histories)["item_id"].to_pylist() == ["i0", "i1"]


def test_a_log_of_numbers_keeps_its_type(tmp_path):
    lines = [f"{u}::{u + i}::5::{978300760 + 60 * i}" for u in range(1, 30) for i in range(5)]
    (tmp_path / "ratings.dat").write_text("\n".join(lines))
    settings = settings_for(tmp_path, tmp_path, "movielens_1m", split={"method": "leave_one_out"})
    buckets, manifest = run(settings)
    item_ids, _, num_train, num_validation = by_user(settings, buckets)[1]
    assert (item_ids, num_train, num_validation) == ([1, 2, 3, 4, 5], 3, 1)
    assert manifest.counts["test_events"] == 29


@pytest.mark.s3
def test_on_s3_the_files_are_the_same(tmp_path, s3_uri):
    in_the_store, on_disk = simulated(s3_uri), simulated(tmp_path)
    assert [f.sha256 for f in run(in_the_store)[1].files] == [f.sha256 for f in run(on_disk)[1].files]
    assert not [info for info in open_storage(s3_uri).list() if "_scratch" in info.key]


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_on_ray_the_files_are_the_same(tmp_path):
    on_ray = simulated(tmp_path / "ray", prepare={"rows_per_task": 1_000})
    files: tuple[FileEntry, ...] = run(on_ray, runner=RayRunner(on_ray))[1].files
    alone = simulated(tmp_path / "alone")
    assert [f.sha256 for f in files] == [f.sha256 for f in run(alone)[1].files]


def write_days(folder: Path, views_of_last_day: int) -> None:
    """Twelve days of 150 views and 50 purchases each, in partitions of their own; the last day without a purchase."""
    for ago in range(12):
        day = date(2026, 11, 20) - timedelta(days=ago)
        types = ["view"] * 150 + ["purchase"] * 50 if ago else ["view"] * views_of_last_day
        rows = [
            {
                "user_id": f"u{number % 20:02d}",
                "item_id": f"i{(number * 7 + ago) % 40:02d}",
                "event_ts": datetime(day.year, day.month, day.day, 8, tzinfo=UTC) + timedelta(seconds=number),
                "event_type": kind,
            }
            for number, kind in enumerate(types)
        ]
        (folder / f"ds={day}").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"ds={day}" / "part.parquet")


NO_PURCHASE = "0.0% of the events of 2026-11-20 are of the type 'purchase', usually 25.0%"
ODD = {60: ["2026-11-20 has 60 events, a usual Friday 200", NO_PURCHASE], 150: [NO_PURCHASE]}


@pytest.mark.parametrize("views", [60, 150])
def test_a_day_that_is_not_as_usual_is_said_in_the_log_the_validation_and_to_whoever_publishes(tmp_path, caplog, views):
    write_days(tmp_path / "log", views)
    log = {"uri": str(tmp_path / "log"), "source": "default"}
    values = {"root": str(tmp_path / "root"), "log": log, "train": {"num_negatives": 5}, "search": {"k": 5}}
    settings = Settings.model_validate(values)
    run(settings)
    expected = ODD[views]
    assert [finding["words"] for finding in validation_of(settings)["odd"]] == expected
    night = open_night(settings)
    assert odd_days(night.storage, night.histories) == [f"the log: {words}" for words in expected]
    for words in expected:
        assert f"the log: {words} (prepare.max_" in caplog.text
    refusing = Settings.model_validate(values | {"prepare": {"odd_days": "error"}})
    with pytest.raises(InputError) as error:
        run(refusing)
    asked = "is the log complete? If it is, set prepare.odd_days: warn"
    assert str(error.value).endswith("; ".join([*expected, asked]))
    quiet = Settings.model_validate(values | {"prepare": {"odd_days": "ignore"}})
    run(quiet)
    assert validation_of(quiet)["odd"] == []
