"""The models that a night starts from or takes over: found by what was published before its day, by nothing else."""

import logging
from datetime import date, timedelta
from typing import Any

import pytest

from pipeline.artifacts import Artifact, CandidateRun
from pipeline.config import apply_overrides
from pipeline.errors import InputError
from pipeline.io.earlier import Earlier, find_earlier
from pipeline.io.night import training_of
from pipeline.io.publication.commits import RunManifest, commit, propose, published, write_run_manifest
from pipeline.io.storage import open_storage
from pipeline.io.storage.base import Storage
from pipeline.settings import Settings
from tests.quality.nights import fresh_memory

DS = date(2026, 11, 20)
PREVIOUS, WEEKLY = "train.start_from=previous", "train.every_days=7"

MODELS = ("selected", "measured", "model")


def settings_of(*overrides: str) -> Settings:
    return Settings.model_validate(apply_overrides({"name": "home"}, overrides))


def publish(
    storage: Storage,
    days_before: int,
    *overrides: str,
    earlier: Earlier | None = None,
    kind: str = "publish",
    **changes: Any,
) -> None:
    """Publish a night with these settings, whose models are called after their day."""
    ds = DS - timedelta(days=days_before)
    run = CandidateRun("home", ds, f"{days_before:016d}")
    manifest = RunManifest(
        table="home",
        ds=ds,
        fp=run.fp,
        run_id=run.run_id,
        files=(),
        rows=0,
        schemas={},
        counts={},
        lineage={name: f"{name}-{ds}" for name in ("selected", "measured", "model")}
        | (earlier.lineage() if earlier else {}),
        settings={"training": training_of(settings_of(*overrides))},
        audits=(),
        versions={},
    )
    manifest = manifest.model_copy(update=changes)
    proposal = propose(run, published(storage, "home", ds), *write_run_manifest(storage, run, manifest))
    commit(storage, run, proposal.model_copy(update={"kind": kind}))


def found(storage: Storage, *overrides: str, ds: date = DS) -> Earlier | None:
    settings = settings_of(*overrides)
    return find_earlier(storage, settings, ds, training_of(settings))


def trained_on(day: str, is_reused: bool) -> Earlier:
    models = (Artifact("models", f"{name}-{day}") for name in MODELS)
    return Earlier(date.fromisoformat(day), *models, is_reused)


@pytest.fixture
def storage() -> Storage:
    return open_storage(fresh_memory())


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def test_a_night_that_trains_from_scratch_reads_nothing(storage, caplog):
    publish(storage, 1)
    for info in storage.list("candidates/home/_manifests"):
        storage.delete(info.key)
    assert found(storage) is None
    assert not caplog.messages
    with pytest.raises(InputError, match=r"is gone, or set train\.start_from to scratch and train\.every_days to 1"):
        found(storage, PREVIOUS)


def test_a_night_starts_from_the_last_one_that_was_published_before_it(storage, caplog):
    assert found(storage, PREVIOUS) is None
    assert "no night of 'home' before ds=2026-11-20 is published" in caplog.messages[-1]
    publish(storage, 3, PREVIOUS)
    publish(storage, 1, PREVIOUS)
    publish(storage, 0, PREVIOUS)  # tonight itself: a second run finds the same
    publish(storage, -1, PREVIOUS)
    assert found(storage, PREVIOUS) == trained_on("2026-11-19", is_reused=False)
    assert found(storage, PREVIOUS, ds=date(2026, 11, 19)) == trained_on("2026-11-17", is_reused=False)
    publish(storage, 1, PREVIOUS, kind="retract", fp="another")
    assert found(storage, PREVIOUS) == trained_on("2026-11-17", is_reused=False)
    assert "starts from the selected model of ds=2026-11-17, selected-2026-11-17" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.dim=32", "the models of ds=2026-11-19 were trained with other settings (model)"),
        ("split.validation_days=2", "were trained with other settings (split)"),
        ("log.time_zone=Europe/Berlin", "were trained with other settings (split)"),
    ],
)
def test_weights_of_another_model_or_of_days_that_are_held_out_now_are_no_start(storage, caplog, change, words):
    publish(storage, 1, PREVIOUS)
    assert found(storage, PREVIOUS, change) is None
    assert found(storage, PREVIOUS, WEEKLY, change) is None
    assert words in caplog.messages[-1]


def test_another_training_may_start_from_the_weights_but_not_take_them_over(storage, caplog):
    publish(storage, 1)
    assert found(storage, "train.learning_rate=0.1", PREVIOUS) == trained_on("2026-11-19", is_reused=False)
    assert found(storage, "train.learning_rate=0.1", WEEKLY) is None
    assert "other settings (train)" in caplog.messages[-1]
    assert found(storage, WEEKLY, "train.steps_between_states=7") == trained_on("2026-11-19", is_reused=True)


def test_models_are_taken_over_until_they_are_too_old_counted_from_their_training(storage, caplog):
    publish(storage, 3)
    assert found(storage, "train.every_days=3") is None
    assert "scratch: the models of ds=2026-11-17 are 3 days old" in caplog.messages[-1]
    started = found(storage, "train.every_days=4", PREVIOUS)
    assert started == trained_on("2026-11-17", is_reused=False), "another start_from is another training"
    reused = found(storage, "train.every_days=4")
    assert reused == trained_on("2026-11-17", is_reused=True)
    assert "trained on ds=2026-11-17 are taken over (train.every_days 4)" in caplog.messages[-1]
    publish(storage, 1, earlier=reused)
    assert found(storage, "train.every_days=4") == reused
    assert found(storage, "train.every_days=3") is None
    assert found(storage, "train.every_days=4", ds=date(2026, 11, 21)) is None


def test_a_start_after_a_night_that_took_over_its_models_is_from_the_training(storage):
    publish(storage, 1, PREVIOUS, earlier=trained_on("2026-11-17", is_reused=True))
    assert found(storage, PREVIOUS) == trained_on("2026-11-17", is_reused=False)


def test_a_night_of_an_earlier_version_is_no_start(storage, caplog):
    publish(storage, 1, settings={})
    assert found(storage, PREVIOUS) is None
    assert "the night of ds=2026-11-19 does not say how its models were trained" in caplog.messages[-1]


def test_a_night_of_an_earlier_version_measured_its_selected_model(storage):
    publish(storage, 1, PREVIOUS, lineage={"selected": "s", "model": "m"})
    earlier = found(storage, PREVIOUS)
    assert earlier is not None
    assert (earlier.selected.id, earlier.measured.id, earlier.served.id) == ("s", "s", "m")
