import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pyarrow as pa
import pytest

from jobs import publish
from pipeline.errors import ConflictError, GateError, InfrastructureError, InputError, InvalidRunError
from pipeline.evaluation.results import Comparison, Estimate, Metrics, Overlap
from pipeline.io.evaluation import write_metrics
from pipeline.io.publication.commits import published, read_run_manifest
from pipeline.io.publication.reader import latest_files, read_latest
from pipeline.io.publication.units import sidecar_key, write_unit
from pipeline.io.storage import open_storage
from pipeline.io.storage.base import Storage
from pipeline.settings import Settings
from tests.jobs.crashing import Crash, CrashingStorage
from tests.quality.nights import NUM_UNITS, clone, compute_night, fresh_memory, other_settings, settings_for, unit_of
from tests.quality.units import DS, K
from tests.s3_server import Fault, S3Server

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.parametrize("layout", ["long", "nested"])
def test_a_sound_run_becomes_the_table_of_its_day(storage: Storage, layout: str) -> None:
    root = storage.uri
    settings = settings_for(root, output={"num_buckets": NUM_UNITS, "surface": "home", "layout": layout})
    storage, night = compute_night(settings)
    outcome = publish.run(settings, DS)
    expected = pa.concat_tables(unit_of(night, settings, unit).tables()[0] for unit in range(NUM_UNITS))
    pairs = sum(len(unit_of(night, settings, unit).candidates) for unit in range(NUM_UNITS))
    assert outcome == {
        "status": "published",
        "run_id": night.run.run_id,
        "uri": f"{root}/candidates/home",
        "ds": "2026-11-20",
        "rows": pairs,
        "users": 16,
        "commit": 1,
    }
    assert read_latest(root, "home").equals(expected)
    head = published(storage, "home", DS)
    assert head is not None
    manifest = read_run_manifest(storage, "home", head)
    assert {file.key for file in manifest.files} == {
        info.key.removeprefix("candidates/home/")
        for info in storage.list(f"{night.run.prefix}/")
        if info.key.endswith(".parquet")
    }
    assert manifest.counts == {"candidates": pairs, "users": 16, "ok": 12, "short": 4}
    assert manifest.lineage["model"] == night.checkpoint.id
    assert manifest.schemas["candidates"]["columns"][0] == {"name": "user_id", "type": "string", "nullable": False}
    assert json.loads(storage.read("candidates/home/latest.json"))["run_id"] == night.run.run_id


def test_a_second_run_writes_nothing_and_says_so() -> None:
    settings = settings_for(fresh_memory())
    storage, _ = compute_night(settings)
    first = publish.run(settings, DS)
    before = storage.list()
    assert publish.run(settings, DS) == first | {"status": "already published"}
    assert storage.list() == before


def test_new_inputs_are_a_new_commit_and_the_old_rows_stay() -> None:
    root = fresh_memory()
    storage = open_storage(root)
    settings, other = settings_for(root), other_settings(root)
    for chosen in (settings, other):
        compute_night(chosen)
        publish.run(chosen, DS)
    assert publish.run(settings, DS)["commit"] == 3  # back to the first: it is the newest again
    assert len(storage.list("candidates/home/_commits/")) == 3
    assert len(storage.list("candidates/home/_manifests/")) == 2


Tamper = Callable[[list[dict[str, Any]], list[dict[str, Any]]], object]


def publish_tampered(tamper: Tamper) -> None:
    """A night whose unit 1 was changed before it was written."""
    settings = settings_for(fresh_memory())
    storage, night = compute_night(settings)
    for info in storage.list(f"{night.run.prefix}/"):
        if "-00001" in info.key:
            storage.delete(info.key)
    unit = unit_of(night, settings, 1)
    tamper(unit.candidates, unit.users)
    write_unit(storage, night.run, 1, *unit.tables(), {})
    try:
        publish.run(settings, DS)
    finally:
        assert published(storage, "home", DS) is None
        assert storage.list("candidates/home/_manifests/") == []


@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (lambda c, _: c[0].update(score=float("nan")), "scores are finite: 1 times, first user ü100, rank 1"),
        (lambda c, _: c.pop(), "num_returned is the length of the list"),
        (lambda _, u: u.pop(), "every requested user is accounted for"),
        (lambda c, _: c[2].update(run_id="run-of-yesterday"), "run_id is run-"),
        (lambda c, _: c[2].update(item_id="item 999"), "the item is in the item index"),
    ],
)
def test_one_wrong_row_stops_the_publication(tamper: Tamper, says: str) -> None:
    with pytest.raises(InvalidRunError, match=says) as raised:
        publish_tampered(tamper)
    assert re.search(r"candidates-00001-[0-9a-f]{16}\.parquet", str(raised.value))


def test_a_missing_unit_is_named() -> None:
    settings = settings_for(fresh_memory())
    storage, night = compute_night(settings)
    storage.delete(sidecar_key(night.run, 1))
    with pytest.raises(InputError, match=r"1 of 2 units are not there \(the first is 1\)"):
        publish.run(settings, DS)


def test_a_file_that_rotted_since_it_was_written_is_named() -> None:
    settings = settings_for(fresh_memory())
    storage, night = compute_night(settings)
    key = next(info.key for info in storage.list(f"{night.run.prefix}/users-00001"))
    data = storage.read(key)
    storage.delete(key)
    storage.create(key, data[:60] + bytes([data[60] ^ 4]) + data[61:])
    with pytest.raises(InputError, match=rf"{key}: damaged since it was written"):
        publish.run(settings, DS)


def test_a_file_of_another_run_is_refused() -> None:
    settings, other = settings_for(root := fresh_memory()), other_settings(root)
    storage, night = compute_night(settings)
    _, foreign = compute_night(other)
    sidecar = json.loads(storage.read(sidecar_key(foreign.run, 0)))
    storage.delete(sidecar_key(night.run, 0))
    storage.create(sidecar_key(night.run, 0), json.dumps(sidecar).encode())
    with pytest.raises((InvalidRunError, InputError)):
        publish.run(settings, DS)


def measure(settings: Settings, model: float, popularity: float, overlap: float) -> None:
    """Leave an evaluation with these hit rates at its first cutoff; at the second, popularity is far ahead."""
    storage, night = compute_night(settings)
    metrics = Metrics(
        queries=100,
        without_history=0,
        protocol="100 users",
        method="exact",
        k=K,
        cutoffs=(10, 50),
        model={"hr@10": estimate(model), "hr@50": estimate(0.0)},
        popularity={"hr@10": estimate(popularity), "hr@50": estimate(1.0)},
        overlap=Overlap(k=K, queries=5, mean=overlap, low=0.0, high=1.0, against="exact search"),
        coverage=Comparison(model=0.5, popularity=0.1),
        gini=Comparison(model=0.5, popularity=0.9),
        seconds=1.0,
    )
    write_metrics(storage, night, settings, metrics)


def estimate(mean: float) -> Estimate:
    return Estimate(mean=mean, low=0.0, high=1.0)


GATED = {"min_overlap": 0.95, "min_lift_over_popularity": 2.0}


def test_a_run_that_reaches_its_gates_is_published_with_the_figures() -> None:
    settings = settings_for(fresh_memory(), gates=GATED)
    measure(settings, model=0.3, popularity=0.1, overlap=0.97)
    publish.run(settings, DS)
    storage = open_storage(settings.root)
    head = published(storage, "home")
    assert head is not None
    rows, overlap, lift = read_run_manifest(storage, "home", head).audits
    assert (rows["audit"], rows["units"]) == ("every row", 2)
    assert overlap == {"gate": "overlap", "measured": 0.97, "required": 0.95, "passed": True}
    assert lift["measured"] == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("model", "popularity", "overlap", "says"),
    [
        (0.3, 0.1, 0.9, "overlap is 0.9000, at least 0.9500 is required"),
        (0.1, 0.1, 0.97, "lift_over_popularity is 1.0000, at least 2.0000 is required"),
        (0.0, 0.0, 0.97, "lift_over_popularity is 1.0000"),
        (0.0, 0.1, 0.0, "overlap is 0.0000.*; lift_over_popularity is 0.0000"),
    ],
)
def test_a_run_below_a_gate_leaves_yesterdays_table(model: float, popularity: float, overlap: float, says: str) -> None:
    settings = settings_for(fresh_memory(), gates=GATED)
    measure(settings, model, popularity, overlap)
    with pytest.raises(GateError, match=says):
        publish.run(settings, DS)
    assert published(open_storage(settings.root), "home") is None


def test_a_gate_that_is_set_is_not_passed_unmeasured() -> None:
    settings = settings_for(fresh_memory(), gates=GATED)
    compute_night(settings)
    with pytest.raises(GateError, match=r"run jobs/evaluate\.py first"):
        publish.run(settings, DS)


def table_of(root: str) -> str:
    """The run that readers see; every file of it is read and verified."""
    (run_id,) = read_latest(root, "home")["run_id"].unique().to_pylist()
    return str(run_id)


@pytest.fixture(params=["memory", "local"])
def two_nights(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str, str]:
    """A root with one run published and another computed, and the ids of both runs."""
    root = fresh_memory() if request.param == "memory" else str(tmp_path / "root")
    _, yesterday = compute_night(settings_for(root))
    publish.run(settings_for(root), DS)
    _, night = compute_night(other_settings(root))
    return root, yesterday.run.run_id, night.run.run_id


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_publisher_that_dies_at_any_operation_leaves_the_old_table_and_can_run_again(
    two_nights: tuple[str, str, str], when: Literal["before", "after"], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, old, new = two_nights
    for at in range(1, 100):
        root = clone(base)
        dying = CrashingStorage(open_storage(root), at, when)
        with monkeypatch.context() as patch:
            patch.setattr("pipeline.io.night.open_storage", lambda _, dying=dying: dying)
            try:
                publish.run(other_settings(root), DS)
            except Crash:
                pass
            else:
                assert at > 20  # operations of a publication
                return
        assert table_of(root) in (old, new)
        assert publish.run(other_settings(root), DS)["run_id"] == table_of(root) == new
        assert len(open_storage(root).list("candidates/home/_commits/")) == 2
        assert json.loads(open_storage(root).read("candidates/home/latest.json"))["run_id"] == new
    pytest.fail("a publication takes more operations than this test tries")


def test_another_run_published_at_any_moment_is_either_before_us_or_a_conflict(
    two_nights: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, theirs, ours = two_nights
    conflicts = []
    for at in range(1, 100):
        root = clone(base)
        plain = open_storage(root)
        for info in plain.list("candidates/home/_commits/"):
            plain.delete(info.key)  # both are computed, none is published
        answers: list[str] = []
        watched = CrashingStorage(
            plain, at, "before", lambda root=root, answers=answers: answers.append(publish_at(root))
        )
        with monkeypatch.context() as patch:
            patch.setattr("pipeline.io.night.open_storage", lambda uri, watched=watched: watched)
            try:
                answers.append(publish.run(other_settings(root), DS)["status"])
            except ConflictError as error:
                conflicts.append(str(error))
        if len(watched.operations) < at:
            break
        head = published(plain, "home", DS)
        assert head is not None
        assert head.seq == answers.count("published")
        assert table_of(root) == head.run_id
    assert len(conflicts) > 5
    assert all(f"found {theirs}" in conflict and f"nothing of {ours}" in conflict for conflict in conflicts)


def publish_at(root: str) -> str:
    """Publish the first run of `root` in the middle of another publication, through a store of its own."""
    storage = open_storage(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.io.night.open_storage", lambda _: storage)
        return str(publish.run(settings_for(root), DS)["status"])


@pytest.mark.s3
def test_a_commit_whose_answer_was_lost_is_published_once(s3_uri: str, s3_server: S3Server) -> None:
    settings = settings_for(s3_uri)
    storage, _ = compute_night(settings)
    with s3_server.fault(Fault("PUT", "/_commits/", "lose_answer")):
        assert publish.run(settings, DS)["status"] == "published"
    assert len(storage.list("candidates/home/_commits/")) == 1
    assert publish.run(settings, DS)["status"] == "already published"
    secret = s3_server.environment["AWS_SECRET_ACCESS_KEY"].encode()
    assert not any(secret in storage.read(info.key) for info in storage.list())


@pytest.mark.s3
def test_a_store_that_never_says_whether_it_took_the_commit_is_asked_again_by_the_next_run(
    s3_uri: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.io.storage.s3.LONGEST_PAUSE", 0.1)
    settings = settings_for(s3_uri)
    storage, _ = compute_night(settings)
    with (
        s3_server.fault(Fault("PUT", "/_commits/", "refuse", "500 Internal Error", times=6)),
        pytest.raises(InfrastructureError, match="run again"),
    ):
        publish.run(settings, DS)
    assert published(storage, "home") is None
    assert publish.run(settings, DS)["status"] == "published"


def readme_reader() -> Callable[..., pa.Table]:
    """The reader that README.md gives to people without our package."""
    text = README.read_text(encoding="utf-8")
    found = re.search(r"<!-- reader -->\s*```python\n(.*?)```\s*<!-- /reader -->", text, re.DOTALL)
    assert found, "README.md has no reader between <!-- reader --> and <!-- /reader -->"
    assert "pipeline" not in found[1]
    assert len([line for line in found[1].splitlines() if line.strip()]) <= 22
    names: dict[str, Any] = {}
    exec(found[1], names)  # noqa: S102 - our own README
    reader: Callable[..., pa.Table] = names["read_latest"]
    return reader


@pytest.mark.parametrize("where", ["local", pytest.param("s3", marks=pytest.mark.s3)])
def test_the_reader_of_the_readme_reads_what_ours_does(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = str(tmp_path) if where == "local" else request.getfixturevalue("s3_uri")
    read = readme_reader()
    for settings in (settings_for(root), other_settings(root)):
        compute_night(settings)
        publish.run(settings, DS)
        assert read(root, "home").equals(read_latest(root, "home"))
    assert read(root, "home", ds="2026-11-20", table="users").equals(read_latest(root, "home", table="users"))


def test_the_reader_of_the_readme_refuses_a_damaged_file(tmp_path: Path) -> None:
    settings = settings_for(str(tmp_path))
    compute_night(settings)
    publish.run(settings, DS)
    path = Path(latest_files(str(tmp_path), "home")[0])
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    with pytest.raises(Exception, match="SHA-256"):
        readme_reader()(str(tmp_path), "home")


def test_polars_reads_the_listed_files(tmp_path: Path) -> None:
    settings = settings_for(str(tmp_path))
    compute_night(settings)
    publish.run(settings, DS)
    table = pl.read_parquet(latest_files(str(tmp_path), "home"), hive_partitioning=False)
    assert table.equals(pl.from_arrow(read_latest(str(tmp_path), "home")))
