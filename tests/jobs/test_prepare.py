"""Prepare as a scheduler runs it: exit codes, and one clear sentence about bad input."""

from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from tests.io.inputs_on_disk import NOON, events, write
from tests.jobs.nightly import Ended, run_job

ON_RAY = {"cluster.mode": "ray"}


def prepare(root: Path, lake: Path, source: str = "default", **keys: object) -> Ended:
    few = {"train.num_negatives": 1, "search.k": 1, "cluster.mode": "local"}  # the logs here have a handful of items
    return run_job("prepare", str(root), **{"log.uri": lake, "log.source": source} | few | keys)


def empty(lake: Path) -> None:
    lake.mkdir()


def missing_column(lake: Path) -> None:
    write(lake / "a.parquet", events().rename_columns(["user", "item_id", "event_ts"]))


def truncated(lake: Path) -> None:
    path = write(lake / "a.parquet", events(1_000))
    path.write_bytes(path.read_bytes()[:-40])


def zero_bytes(lake: Path) -> None:
    lake.mkdir()
    (lake / "a.parquet").touch()
    (lake / "b.parquet").touch()


def one_event_each(lake: Path) -> None:
    write(lake / "a.parquet", events())


def numbers_as_times(lake: Path) -> None:
    write(lake / "ds=2026-11-20" / "a.parquet", events(event_ts=pa.array([1, 2, 3, 4])))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (empty, "nothing there; give a folder or a file that exists"),
        (missing_column, "no column 'user_id'"),
        (truncated, "a.parquet: damaged or cut short"),
        (zero_bytes, "nothing but 2 empty or hidden files there"),
        (one_event_each, "no user has two events to train on"),
        (numbers_as_times, "say what its numbers count with time_unit"),
    ],
)
def test_a_log_that_cannot_be_read_ends_with_20_and_one_sentence(tmp_path, spoil, says):
    spoil(tmp_path / "lake")
    ended = prepare(tmp_path / "root", tmp_path / "lake")
    assert ended.code == 20
    assert says in ended.last_line["error"]
    assert "\n" not in ended.last_line["error"]
    assert "Traceback" not in ended.stderr


@pytest.mark.ray
def test_a_log_with_null_ids_ends_with_20_also_through_ray(tmp_path):
    bad = pa.array([None, "u1", "u2", "u3"])
    write(tmp_path / "bad" / "ds=2026-11-20" / "a.parquet", events(user_id=bad))
    ended = prepare(tmp_path / "root", tmp_path / "bad", **ON_RAY)
    assert ended.code == 20
    assert "column 'user_id': 1 values are null or empty, for example None in row 0" in ended.last_line["error"]
    assert "\n" not in ended.last_line["error"]


def test_a_second_run_needs_no_ray(tmp_path):
    times = pa.array([NOON - timedelta(days=days) for days in (5, 4, 0)] * 20)
    users, items = pa.array([f"u{i // 3}" for i in range(60)]), pa.array(["i0", "i1", "i2"] * 20)
    good = events(60, user_id=users, item_id=items, event_ts=times)
    write(tmp_path / "good" / "ds=2026-11-20" / "a.parquet", good)
    made = prepare(tmp_path / "root", tmp_path / "good")
    assert (made.code, made.last_line["status"], made.last_line["users"]) == (0, "made", 20)
    again = prepare(tmp_path / "root", tmp_path / "good", **ON_RAY)
    assert (again.code, again.last_line["status"]) == (0, "exists")
    assert again.last_line["histories"] == made.last_line["histories"]
    assert "Ray" not in again.stderr
