"""The day of a night, and what is set aside: nothing is learned from it, but it counts as seen."""

from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.config import fingerprint, load_config
from pipeline.data.histories import Bucket
from pipeline.data.sources import SourceSpec
from pipeline.errors import InputError
from pipeline.io.histories import read_bucket
from pipeline.io.night import open_night
from pipeline.settings import LogSettings, Settings
from pipeline.stages.local import LocalRunner
from pipeline.stages.prepare.passes import open_job, prepare
from tests.io.inputs_on_disk import NOON, events, settings_for, write
from tests.stages.prepared import DS, run


def test_the_rows_of_a_partition_belong_to_its_day(tmp_path):
    """A partition of a local day in the west ends after the day in UTC."""
    ahead = [NOON - timedelta(hours=6 - 4 * step) for step in range(6)]  # 06:00 to 02:00 of the next day
    for day in (19, 20):
        times = pa.array([time - timedelta(days=20 - day) for time in ahead])
        write(tmp_path / "lake" / f"ds=2026-11-{day}" / "a.parquet", events(6, event_ts=times))
    settings = settings_for(tmp_path, tmp_path / "lake")
    for day, kept in ((19, 6), (20, 12)):
        buckets, manifest = run(settings, date(2026, 11, day))
        assert sum(len(bucket.item_rows) for bucket in buckets) == kept == manifest.counts["rows_read"]


def test_days_of_the_split_begin_at_midnight_in_the_logs_zone(tmp_path):
    """The last hours of the night's day in New York are the next day's in UTC."""
    times = pa.array(
        [NOON - timedelta(days=1), NOON - timedelta(hours=8), NOON - timedelta(hours=7), NOON + timedelta(hours=16)]
    )
    write(tmp_path / "lake" / "a.parquet", events(4, event_ts=times, user_id=pa.array(["u"] * 4)))
    log = {"uri": str(tmp_path / "lake"), "source": "default"}
    split = {}
    for zone in ("UTC", "America/New_York"):
        settings = settings_for(tmp_path / zone, tmp_path / "lake").model_copy(
            update={"log": LogSettings(**log, time_zone=zone)}
        )
        (bucket,) = [bucket for bucket in run(settings, date(2026, 11, 20))[0] if bucket.num_users]
        split[zone] = (bucket.num_train.tolist(), bucket.num_validation.tolist(), len(bucket.item_rows))
    assert split == {"UTC": ([0], [1], 3), "America/New_York": ([0], [2], 4)}


def test_what_is_set_aside_still_counts_as_seen(tmp_path):
    """Old, ahead of the day, of an ignored type and without a time: nothing is learned, and it is not shown again."""
    times = [NOON, NOON - timedelta(days=9), NOON + timedelta(days=9_000), NOON, None, NOON - timedelta(hours=1)]
    items = ["i0", "i1", "i2", "i3", "i4", "i5"]
    kinds = ["view", "view", "view", "look", "view", "view"]
    of_u = events(
        6, user_id=pa.array(["u"] * 6), item_id=pa.array(items), event_type=pa.array(kinds),
        event_ts=pa.array(times, pa.timestamp("us", tz="UTC")),
    )  # fmt: skip
    of_v = events(6, user_id=pa.array(["v"] * 6), item_id=pa.array(items), event_type=pa.array(["view"] * 6))
    write(tmp_path / "lake" / "a.parquet", pa.concat_tables([of_u, *[of_v] * 4]))
    (tmp_path / "own.yaml").write_text(
        "columns: {user_id: user_id, item_id: item_id, event_ts: event_ts, event_type: event_type}\n"
        "event_weights: {view: 1.0}\nunknown_event_types: ignore\n"
    )
    sections = {"prepare": {"lookback_days": 5, "max_bad_share": 0.5, "max_duplicate_share": 1.0}}

    def seen_by_u(ds: date | None, **prepare: object) -> list[int]:
        values = {"prepare": sections["prepare"] | prepare}
        settings = settings_for(tmp_path / fingerprint(prepare), tmp_path / "lake", **values)
        buckets = run_with(settings, tmp_path / "own.yaml", ds)
        bucket = next(bucket for bucket in buckets if "u" in bucket.user_ids.to_pylist())
        at = bucket.user_ids.to_pylist().index("u")
        assert bucket.cut("whole")[at].tolist() == [5, 0]
        return bucket.seen("whole")[at].tolist()

    assert seen_by_u(None) == [0, 1, 2, 3, 4, 5]
    assert seen_by_u(None, seen_lookback_days=5) == [0, 2, 3, 4, 5]


def run_with(settings: Settings, source: Path, ds: date | None) -> list[Bucket]:
    """Prepare with the column map of this file."""
    night = open_night(settings, ds)
    log = replace(night.inputs.log, source=load_config(SourceSpec, source))
    night = replace(night, inputs=replace(night.inputs, log=log))
    prepare(LocalRunner(settings), open_job(night, settings))
    return [read_bucket(night.storage, night.histories, b) for b in range(settings.output.num_buckets)]


def test_a_log_that_goes_on_after_the_day_does_not_say_what_will_be_seen(tmp_path):
    days = pa.array([NOON + timedelta(days=day) for day in (0, 0, 1, 1)])
    table = events(4, user_id=pa.array(["u"] * 4), item_id=pa.array(["i0", "i1", "i1", "i2"]), event_ts=days)
    write(tmp_path / "lake" / "a.parquet", table)
    (bucket,) = [bucket for bucket in run(settings_for(tmp_path, tmp_path / "lake"), DS)[0] if bucket.num_users]
    assert bucket.seen("whole")[0].tolist() == [0, 1]
    assert bucket.also_seen[0].tolist() == []


def test_a_day_without_an_event_is_no_day_to_serve(tmp_path):
    write(tmp_path / "lake" / "a.parquet", events())
    settings = settings_for(tmp_path, tmp_path / "lake")
    with pytest.raises(InputError, match=r"no event of the day 2026-11-25 \(--ds\); the newest is of 2026-11-20"):
        run(settings, date(2026, 11, 25))
