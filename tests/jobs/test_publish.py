import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pytest

from jobs import publish
from pipeline.errors import ConflictError, GateError, InfrastructureError, InputError, InvalidRunError
from pipeline.io.evaluation import write_metrics
from pipeline.io.night import open_night
from pipeline.io.publication.commits import published, read_run_manifest
from pipeline.io.publication.reader import read_latest
from pipeline.io.publication.units import units_of, write_unit
from pipeline.io.storage import open_storage
from pipeline.io.storage.base import Storage
from pipeline.settings import Settings
from tests.jobs.crashing import Crash, CrashingStorage
from tests.quality.nights import NUM_UNITS, clone, compute_night, fresh_memory, other_settings, settings_for, unit_of
from tests.quality.test_gates import metrics as metrics_of
from tests.quality.units import DS
from tests.s3_server import Fault, S3Server


def run_publish(settings: Settings) -> dict[str, Any]:
    return publish.run(settings, open_night(settings, DS))


@pytest.mark.parametrize("layout", ["long", "nested"])
def test_a_sound_run_becomes_the_table_of_its_day(storage: Storage, layout: str) -> None:
    root = storage.uri
    settings = settings_for(root, output={"num_buckets": NUM_UNITS, "surface": "home", "layout": layout})
    night = compute_night(settings)
    storage = night.storage
    outcome = run_publish(settings)
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
        "backends": {},
        "hit_rates": {},
        "warnings": [],
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
    storage = compute_night(settings).storage
    first = run_publish(settings)
    before = storage.list()
    assert run_publish(settings) == first | {"status": "already published"}
    assert storage.list() == before


def test_new_inputs_are_a_new_commit_and_the_old_rows_stay() -> None:
    root = fresh_memory()
    storage = open_storage(root)
    settings, other = settings_for(root), other_settings(root)
    for chosen in (settings, other):
        compute_night(chosen)
        run_publish(chosen)
    assert run_publish(settings)["commit"] == 3  # back to the first: it is the newest again
    assert len(storage.list("candidates/home/_commits/")) == 3
    assert len(storage.list("candidates/home/_manifests/")) == 2


Tamper = Callable[[list[dict[str, Any]], list[dict[str, Any]]], object]


def publish_tampered(tamper: Tamper) -> None:
    """A night whose unit 1 was changed before it was written."""
    settings = settings_for(fresh_memory())
    night = compute_night(settings)
    storage = night.storage
    for info in storage.list(f"{night.run.prefix}/"):
        if "-00001" in info.key:
            storage.delete(info.key)
    unit = unit_of(night, settings, 1)
    tamper(unit.candidates, unit.users)
    write_unit(storage, night.run, 1, *unit.tables(), 0, {})
    try:
        run_publish(settings)
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
    night = compute_night(settings)
    storage = night.storage
    storage.delete(units_of(storage, night.run).key(1))
    with pytest.raises(InputError, match=r"1 of 2 units are not there \(the first is 1\)"):
        run_publish(settings)


def test_a_file_that_rotted_since_it_was_written_is_named() -> None:
    settings = settings_for(fresh_memory())
    night = compute_night(settings)
    storage = night.storage
    key = next(info.key for info in storage.list(f"{night.run.prefix}/users-00001"))
    data = storage.read(key)
    storage.delete(key)
    storage.create(key, data[:60] + bytes([data[60] ^ 4]) + data[61:])
    with pytest.raises(InputError, match=rf"{key}: damaged, its SHA-256"):
        run_publish(settings)


def test_a_file_of_another_run_is_refused() -> None:
    settings, other = settings_for(root := fresh_memory()), other_settings(root)
    night = compute_night(settings)
    storage = night.storage
    foreign = compute_night(other)
    sidecar = storage.read(units_of(storage, foreign.run).key(0))
    storage.delete(units_of(storage, night.run).key(0))
    storage.create(units_of(storage, night.run).key(0), sidecar)
    with pytest.raises((InvalidRunError, InputError)):
        run_publish(settings)


def measure(settings: Settings, model: float, popularity: float, overlap: float, counts: float = 0.0) -> None:
    """Write an evaluation with these hit rates at its first cutoff; at the second, the floors are far ahead."""
    night = compute_night(settings)
    write_metrics(night, settings, metrics_of(model, popularity, overlap, counts), "# card", [])


GATED = {"min_overlap": 0.95, "min_lift_over_popularity": 2.0}


def test_a_run_that_reaches_its_gates_is_published_with_the_figures() -> None:
    settings = settings_for(fresh_memory(), gates=GATED)
    measure(settings, model=0.3, popularity=0.1, overlap=0.97, counts=0.25)
    outcome = run_publish(settings)
    storage = open_storage(settings.root)
    head = published(storage, "home")
    assert head is not None
    rows, overlap, lift, over_counts, fallback, errors = read_run_manifest(storage, "home", head).audits
    assert (rows["audit"], rows["units"]) == ("every row", 2)
    assert overlap == {"gate": "overlap", "measured": 0.97, "required": 0.95, "passed": True, "hit_rates": {}}
    assert lift["measured"] == pytest.approx(3.0)
    assert over_counts["hit_rates"] == {"model": 0.3, "counts": 0.25}
    assert (fallback["gate"], fallback["measured"], fallback["required"]) == ("fallback_share", 0.0, 1.0)
    assert (errors["gate"], errors["measured"], errors["required"]) == ("error_share", 0.0, 0.01)
    assert outcome["hit_rates"] == {"model": 0.3, "popularity": 0.1, "counts": 0.25}
    assert outcome["warnings"] == []


def test_a_model_worse_than_counting_is_published_with_a_warning() -> None:
    settings = settings_for(fresh_memory(), gates=GATED)
    measure(settings, model=0.3, popularity=0.1, overlap=0.97, counts=0.4)
    outcome = run_publish(settings)
    (warning,) = outcome["warnings"]
    assert "hr@10 is 0.3000, that of item-to-item counts 0.4000" in warning
    assert outcome["hit_rates"]["counts"] == 0.4
    assert run_publish(settings) == outcome | {"status": "already published"}


@pytest.mark.parametrize(
    ("model", "popularity", "overlap", "says"),
    [
        (0.3, 0.1, 0.9, "overlap is 0.9000, at least 0.9500 is required"),
        (0.1, 0.1, 0.97, "lift_over_popularity is 1.0000, at least 2.0000 is required"),
        (0.0, 0.0, 0.97, "lift_over_popularity cannot be computed: neither the model nor popularity hits"),
        (0.0, 0.1, 0.0, "overlap is 0.0000.*; lift_over_popularity is 0.0000"),
    ],
)
def test_a_run_below_a_gate_leaves_yesterdays_table(model: float, popularity: float, overlap: float, says: str) -> None:
    settings = settings_for(fresh_memory(), gates=GATED)
    measure(settings, model, popularity, overlap)
    with pytest.raises(GateError, match=says):
        run_publish(settings)
    assert published(open_storage(settings.root), "home") is None


def test_a_gate_that_is_set_is_not_passed_unmeasured() -> None:
    settings = settings_for(fresh_memory(), gates=GATED)
    compute_night(settings)
    with pytest.raises(GateError, match=r"run jobs/evaluate\.py first"):
        run_publish(settings)


def table_of(root: str) -> str:
    """The id of the run that readers see; all its files are read and verified."""
    (run_id,) = read_latest(root, "home")["run_id"].unique().to_pylist()
    return str(run_id)


@pytest.fixture(params=["memory", "local"])
def two_nights(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str, str]:
    """A root with one run published and another computed, and the ids of both runs."""
    root = fresh_memory() if request.param == "memory" else str(tmp_path / "root")
    yesterday = compute_night(settings_for(root))
    run_publish(settings_for(root))
    night = compute_night(other_settings(root))
    return root, yesterday.run.run_id, night.run.run_id


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_publisher_that_dies_at_any_operation_leaves_the_old_table_and_can_run_again(
    two_nights: tuple[str, str, str], when: Literal["before", "after"]
) -> None:
    base, old, new = two_nights
    for at in range(1, 100):
        root = clone(base)
        dying = CrashingStorage(open_storage(root), at, when)
        night = replace(open_night(other_settings(root), DS), storage=dying)
        try:
            publish.run(other_settings(root), night)
        except Crash:
            pass
        else:
            assert at > 20  # operations of a publication
            return
        assert table_of(root) in (old, new)
        assert run_publish(other_settings(root))["run_id"] == table_of(root) == new
        assert len(open_storage(root).list("candidates/home/_commits/")) == 2
        assert json.loads(open_storage(root).read("candidates/home/latest.json"))["run_id"] == new
    pytest.fail("a publication takes more operations than this test tries")


def test_another_run_published_at_any_moment_is_either_before_us_or_a_conflict(
    two_nights: tuple[str, str, str],
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
        night = replace(open_night(other_settings(root), DS), storage=watched)
        try:
            answers.append(publish.run(other_settings(root), night)["status"])
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
    return str(run_publish(settings_for(root))["status"])


@pytest.mark.s3
def test_a_commit_whose_answer_was_lost_is_published_once(s3_uri: str, s3_server: S3Server) -> None:
    settings = settings_for(s3_uri)
    storage = compute_night(settings).storage
    with s3_server.fault(Fault("PUT", "/_commits/", "lose_answer")):
        assert run_publish(settings)["status"] == "published"
    assert len(storage.list("candidates/home/_commits/")) == 1
    assert run_publish(settings)["status"] == "already published"
    secret = s3_server.environment["AWS_SECRET_ACCESS_KEY"].encode()
    assert not any(secret in storage.read(info.key) for info in storage.list())


@pytest.mark.s3
def test_a_store_that_never_says_whether_it_took_the_commit_is_asked_again_by_the_next_run(
    s3_uri: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.io.storage.s3.LONGEST_PAUSE", 0.1)
    settings = settings_for(s3_uri)
    storage = compute_night(settings).storage
    with (
        s3_server.fault(Fault("PUT", "/_commits/", "refuse", "500 Internal Error", times=6)),
        pytest.raises(InfrastructureError, match="run again"),
    ):
        run_publish(settings)
    assert published(storage, "home") is None
    assert run_publish(settings)["status"] == "published"


def test_a_backend_that_was_fallen_back_to_is_a_warning_with_its_reason():
    backends = {"native avx512": 2, "torch (no kernels: no C++ compiler)": 6}
    assert publish.fallbacks(backends) == ["6 units were searched with torch (no kernels: no C++ compiler)"]
