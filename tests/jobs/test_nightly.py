"""The nightly job as a scheduler runs it: as a process, sometimes twice, sometimes again after a crash."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pytest

from pipeline.distributed.restart_notice import NOTICE
from pipeline.io.publication.reader import latest_files, read_latest
from tests.conftest import use_aws_environment
from tests.jobs.nightly import REPOSITORY, Ended, command_line, run_job

pytestmark = pytest.mark.ray

PROVENANCE = ["ds", "model_version", "run_id"]
LOCAL = {"cluster.mode": "local"}
PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": REPOSITORY}


@dataclass(frozen=True)
class Published:
    root: str
    ended: Ended
    table: pl.DataFrame


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Published:
    root = str(tmp_path_factory.mktemp("night"))
    ended = run_job("nightly_candidates", root)
    assert ended.code == 0, ended.stderr[-4_000:]
    return Published(root, ended, pl.from_arrow(read_latest(root, "candidates")))


def snapshot(root: str) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in Path(root).rglob("*") if path.is_file()}


def test_a_night_ends_with_a_published_table_and_one_line_of_json(published):
    assert published.ended.last_line["status"] == "published"
    assert published.ended.stdout.count("\n") == 1
    assert published.table.height == published.ended.last_line["rows"] > 1_000


def test_every_published_row_keeps_the_promises(published):
    table = published.table
    assert table.select("user_id", "item_id").is_duplicated().sum() == 0
    assert table["score"].is_finite().all()
    ordered = table.sort("user_id", "rank")
    per_user = ordered.group_by("user_id", maintain_order=True).agg(
        pl.col("rank"), pl.col("score"), pl.struct(-pl.col("score"), "item_id").alias("order")
    )
    for ranks, scores, order in per_user.select("rank", "score", "order").iter_rows():
        assert ranks == list(range(1, len(ranks) + 1))
        assert scores == sorted(scores, reverse=True)
        assert [tuple(o.values()) for o in order] == sorted(tuple(o.values()) for o in order)


def test_a_night_that_goes_well_prints_nothing_that_reads_like_a_failure(published):
    """Ray's own lines begin with a date or with [; ours with the time of the day and the level."""
    lines = published.ended.stderr.splitlines()
    assert any(re.match(r"\d\d:\d\d:\d\d I ── publish", line) for line in lines)
    failures = [line for line in lines if re.match(r"\[|\d{4}-|\d\d:\d\d:\d\d [WE]|Traceback|\(raylet", line)]
    assert all("worse than counting" in line for line in failures)  # two epochs are few
    assert NOTICE.decode() not in published.ended.stderr


def test_nobody_is_shown_what_they_have_seen(published):
    logs = Path(published.root).glob("simulated/*/log/ds=*/*.parquet")
    seen = pl.concat([pl.read_parquet(path, columns=["user_id", "item_id"]) for path in logs])
    assert published.table.join(seen, on=["user_id", "item_id"], how="semi").height == 0


def test_every_user_is_accounted_for_once(published):
    users = pl.from_arrow(read_latest(published.root, "candidates", table="users"))
    assert users["user_id"].is_unique().all()
    returned = published.table.group_by("user_id").len()
    joined = users.join(returned, on="user_id", how="left").with_columns(pl.col("len").fill_null(0))
    assert (joined["len"] == joined["num_returned"]).all()
    short = users.filter(pl.col("status") != "ok")
    assert (short["reason"].str.len_chars() > 0).all()


def test_polars_and_duckdb_read_the_same_rows(published):
    files = latest_files(published.root, "candidates")
    assert pl.read_parquet(files).height == published.table.height
    assert duckdb.read_parquet(files).count("*").fetchall() == [(published.table.height,)]


def test_a_second_run_does_no_work_and_says_so_without_ray_or_torch(published):
    before = snapshot(published.root)
    again = run_job("nightly_candidates", published.root, {"PYTHONPROFILEIMPORTTIME": "1"})
    assert again.code == 0
    assert again.last_line["status"] == "already published"
    assert again.last_line["run_id"] == published.ended.last_line["run_id"]
    assert snapshot(published.root) == before
    imported = set(re.findall(r"^import time:.*\| +([\w.]+)$", again.stderr, re.MULTILINE))
    assert "pyarrow" in imported, "the imports are listed"
    assert not imported & {"ray", "torch"}, "what takes seconds to load is not loaded"


def rows_of(root: str, name: str = "candidates") -> pl.DataFrame:
    """The published rows without the columns that name the run."""
    table = pl.from_arrow(read_latest(root, name))
    return table.select(column for column in table.columns if column not in PROVENANCE).sort("user_id", "rank")


def test_layout_of_the_work_does_not_change_the_table(published):
    """An exact search gives the same rows with other shards, searched in this process instead of on Ray."""
    other = run_job("nightly_candidates", published.root, name="other", **LOCAL, **{"corpus.num_shards": 2})
    assert other.code == 0, other.stderr[-4_000:]
    assert rows_of(published.root, "other").equals(rows_of(published.root))


def test_a_night_in_one_process_gives_the_same_table_and_starts_no_ray(published, tmp_path):
    """Even when its training was told to stop and resumed."""
    job = subprocess.Popen(command_line("nightly_candidates", str(tmp_path), **LOCAL), **PIPES)
    wait_for_line(job, "epoch 1")
    job.send_signal(signal.SIGTERM)
    assert end(job) == (30, "stopped by SIGTERM; run the same command again to resume")
    local = run_job("nightly_candidates", str(tmp_path), **LOCAL)
    assert local.code == 0, local.stderr[-4_000:]
    assert local.last_line["run_id"] == published.ended.last_line["run_id"]
    assert pl.from_arrow(read_latest(str(tmp_path), "candidates")).equals(published.table)
    assert "Ray" not in local.stderr
    assert metrics_in(str(tmp_path)) == metrics_in(published.root)


def metrics_in(root: str) -> dict[str, Any]:
    """The metrics of the night of the newest table, but for the time that they took."""
    (file,) = Path(root).glob(f"evaluations/{last_manifest(root)['lineage']['evaluation']}/metrics-*.json")
    return {name: value for name, value in json.loads(file.read_text()).items() if name != "seconds"}


def last_manifest(root: str) -> dict[str, Any]:
    table = Path(root) / "candidates" / "candidates"
    commit = json.loads(max(table.glob("_commits/ds=*/*.json")).read_text())
    return json.loads((table / commit["manifest"]).read_text())


def test_a_gate_says_no_before_the_search_for_everybody(published):
    keys = {"name": "refused", "gates.min_lift_over_popularity": 1_000.0, "evaluate.seed": 1}
    ended = run_job("nightly_candidates", published.root, **LOCAL, **keys)
    assert ended.code == 10
    assert "lift_over_popularity is" in ended.last_line["error"]
    assert "── evaluate" in ended.stderr
    assert "── retrieve" not in ended.stderr
    assert not (Path(published.root) / "candidates" / "refused").exists()


def test_no_item_that_the_catalogue_hides_is_shown(published):
    """The simulated catalogue has retired items, and items whose time is over or has not come yet."""
    (items,) = Path(published.root).glob("simulated/*/items-*.parquet")
    end_of_day = datetime(2026, 11, 21, tzinfo=UTC)
    over = pl.col("available_until").fill_null(end_of_day) < end_of_day
    hidden = pl.read_parquet(items).filter(
        (pl.col("status") == "retired") | over | (pl.col("available_from") >= end_of_day)
    )
    assert hidden.height > 0
    assert published.table.join(hidden, on="item_id", how="semi").height == 0
    users = pl.from_arrow(read_latest(published.root, "candidates", table="users"))
    assert users.filter(pl.col("status") == "ok")["num_rule_filtered"].max() <= hidden.height
    bots = users.filter(pl.col("reason").str.starts_with("taken for a bot"))
    assert (bots["status"] == "skipped").all()


def test_a_killed_night_resumes_and_yesterdays_table_stays_readable(published):
    """The driver alone is killed, in the middle of a night with new settings: its Ray ends too, and another run
    finishes the night (in one process, which is faster here)."""
    keys = {"search.k": 15}
    environment = os.environ | {"NIGHTRAILS_TEST": published.root}

    def what_is_done() -> list[dict[str, int]]:
        return [snapshot(f"{published.root}/{kind}") for kind in ("histories", "neighbours", "models", "corpora")]

    killed = subprocess.Popen(command_line("nightly_candidates", published.root, **keys), env=environment, **PIPES)
    wait_for_line(killed, "── evaluate")
    wait_for_line(killed, "1 node searches with")  # and a chain of actors starts
    killed.kill()
    killed.wait()
    wait_until_all_ended(f"NIGHTRAILS_TEST={published.root}".encode())
    before = what_is_done()
    assert pl.from_arrow(read_latest(published.root, "candidates")).equals(published.table)
    resumed = run_job("nightly_candidates", published.root, **keys, **LOCAL)
    assert resumed.code == 0, resumed.stderr[-4_000:]
    assert what_is_done() == before, "what was done is not done again"
    shorter = pl.from_arrow(read_latest(published.root, "candidates"))
    columns = [name for name in shorter.columns if name not in PROVENANCE]
    expected = published.table.filter(pl.col("rank") <= 15).select(columns).sort("user_id", "rank")
    assert shorter.select(columns).sort("user_id", "rank").equals(expected)


def test_ctrl_c_in_the_training_on_ray_ends_the_night_within_seconds_and_leaves_no_process(published):
    """As at a terminal, whose signal goes to the group of processes of which the job is not the leader. Ray would leave
    that group, and Ray Train would wait for three interrupts."""
    leader = subprocess.Popen(["sleep", "600"], process_group=0)
    keys = {"train.max_epochs": 500, "train.patience": 500}
    environment = os.environ | {"NIGHTRAILS_TEST": f"{published.root}/stopped"}
    command = command_line("nightly_candidates", published.root, **keys)
    job = subprocess.Popen(command, env=environment, process_group=leader.pid, **PIPES)
    wait_for_line(job, "epoch 1")
    os.killpg(leader.pid, signal.SIGINT)
    started = time.monotonic()
    assert end(job) == (30, "stopped by SIGINT; run the same command again to resume")
    assert time.monotonic() - started < 20  # on a busy machine; else two
    assert leader.wait() == -signal.SIGINT
    variable = f"NIGHTRAILS_TEST={published.root}/stopped".encode()
    give_up = time.monotonic() + 10
    while left := [title_of(process) for process in processes_with(variable)]:  # orphans, which see it a little later
        assert time.monotonic() < give_up, left
        time.sleep(0.1)


def wait_for_line(job: subprocess.Popen[str], words: str) -> None:
    """Wait until the job has printed a line with these words."""
    assert job.stderr is not None
    seen = []
    for line in job.stderr:
        seen.append(line)
        if words in line:
            return
    raise AssertionError(f"no line with {words!r}:\n{''.join(seen)}")


def end(job: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code of a job that fails, and the error in its last line, which is its only one."""
    output, log = job.communicate(timeout=60)
    assert "Traceback" not in log
    return job.returncode, json.loads(output)["error"]


def wait_until_all_ended(variable: bytes, seconds: float = 60.0) -> None:
    """Wait until no worker of Ray has this variable in its environment: one that works on would be a second writer.

    Ray's own agents, which do none of our work, stay for some minutes.
    """
    give_up = time.monotonic() + seconds
    while workers := [
        process for process in processes_with(variable) if re.search(r"ray::(?!\w+Agent)", title_of(process))
    ]:
        assert time.monotonic() < give_up, workers
        time.sleep(0.2)


def processes_with(variable: bytes) -> Iterator[Path]:
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with suppress(OSError):  # it has ended
                if variable in (process / "environ").read_bytes().split(b"\0"):
                    yield process


def title_of(process: Path) -> str:
    with suppress(OSError):
        return (process / "cmdline").read_text()
    return ""


@pytest.mark.s3
def test_the_same_night_on_s3_gives_the_same_table(published, s3_server, monkeypatch):
    """All files are in the store; the simulated inputs have the same names in every store."""
    use_aws_environment(monkeypatch, s3_server.environment)
    root = f"s3://{s3_server.make_bucket()}/nightrails"
    ended = run_job("nightly_candidates", root, **LOCAL)
    assert ended.code == 0, ended.stderr[-4_000:]
    assert ended.last_line["run_id"] == published.ended.last_line["run_id"]
    assert pl.from_arrow(read_latest(root, "candidates")).equals(published.table)


def test_a_night_with_a_catalogue_and_a_list_of_users_serves_those_users_and_accounts_for_strangers(tmp_path):
    """The keys `items` and `queries` of README.md's example, up to the published table."""
    start = datetime(2026, 11, 11, tzinfo=UTC)
    events = [
        {"user_id": f"u{user}", "item_id": f"i{(user + 3 * step) % 40}", "event_ts": start + timedelta(days=step)}
        for user in range(60)
        for step in range(10)
    ]
    pl.DataFrame(events).write_parquet(tmp_path / "log.parquet")
    pl.DataFrame({"item_id": [f"i{item}" for item in range(45)], "title": "A title"}).write_parquet(
        tmp_path / "items.parquet"
    )
    wanted = ["u7", "u3", "u3", "stranger", "u59"]
    pl.DataFrame({"user_id": wanted, "market": "DK"}).write_parquet(tmp_path / "users.parquet")
    keys = {
        "log.uri": tmp_path / "log.parquet",
        "log.source": "default",
        "items.uri": tmp_path / "items.parquet",
        "queries.uri": tmp_path / "users.parquet",
        "gates.min_overlap": 0,
    }
    root = str(tmp_path / "root")
    ended = run_job("nightly_candidates", root, **LOCAL, **keys)
    assert ended.code == 0, ended.stderr[-4_000:]
    table = rows_of(root)
    assert table.group_by("user_id").len().sort("user_id").rows() == [("u3", 20), ("u59", 20), ("u7", 20)]
    assert table.join(pl.DataFrame(events), on=["user_id", "item_id"], how="semi").height == 0
    assert set(table["item_id"]) <= {f"i{item}" for item in range(45)}
    accounts = pl.from_arrow(read_latest(root, "candidates", table="users")).sort("user_id")
    assert accounts.select("user_id", "status", "reason").rows() == [
        ("stranger", "skipped", "no history"),
        ("u3", "ok", ""),
        ("u59", "ok", ""),
        ("u7", "ok", ""),
    ]
    refused = run_job("nightly_candidates", root, **LOCAL, **keys | {"queries.cold_users": "raise"})
    assert refused.code == 20
    assert "1 users have no history (queries.cold_users: raise), first stranger" in refused.last_line["error"]
    fallback = keys | {"queries.cold_users": "fallback"}
    gated = run_job("nightly_candidates", root, **LOCAL, **fallback | {"gates.max_fallback_share": 0.2})
    assert gated.code == 10
    assert "1 of 4 requested users have no history and got popular items" in gated.last_line["error"]
    served = run_job("nightly_candidates", root, **LOCAL, **fallback)
    assert served.code == 0, served.stderr[-4_000:]
    table = rows_of(root)
    assert table.filter(pl.col("source") == "popular").group_by("user_id").len().rows() == [("stranger", 20)]
    assert table.filter(pl.col("source") == "mol")["user_id"].n_unique() == 3


@pytest.mark.s3
def test_wrong_credentials_and_a_missing_bucket_are_a_persons_business(s3_server, monkeypatch):
    use_aws_environment(monkeypatch, s3_server.environment)
    missing = run_job("nightly_candidates", "s3://no-such-bucket/nightrails")
    assert missing.code == 20
    assert "no bucket 'no-such-bucket'" in missing.last_line["error"]
    bucket = s3_server.make_bucket()
    refused = run_job("nightly_candidates", f"s3://{bucket}/nightrails", {"AWS_SECRET_ACCESS_KEY": "wrong"})
    assert refused.code == 20
    assert "standard AWS chain" in refused.last_line["error"]
    assert "Traceback" not in refused.stderr


def test_a_store_that_does_not_answer_is_worth_a_retry():
    nobody = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_MAX_ATTEMPTS": "1",
    }
    ended = run_job("nightly_candidates", "s3://bucket/nightrails", nobody)
    assert ended.code == 30
    assert "Traceback" not in ended.stderr


def test_more_candidates_than_items_are_refused_before_training(tmp_path):
    log = tmp_path / "log.csv"
    rows = [
        f"u{user},i{(user + step) % 12},5,{1_700_000_000 + user * 977 + step * 86_400}"
        for user in range(9)
        for step in range(5)
    ]
    log.write_text("\n".join(rows) + "\n")
    keys = {"log.source": "amazon_ratings", "log.uri": log, "train.num_negatives": 4, "cluster.mode": "local"}
    ended = run_job("nightly_candidates", str(tmp_path / "root"), **keys)
    assert ended.code == 20
    assert "search.k (20) must be at most the number of items" in ended.last_line["error"]
    assert "── train" not in ended.stderr
