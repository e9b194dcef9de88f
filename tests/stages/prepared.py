"""Prepare, run in this process on small logs, for the tests of it."""

import json
from datetime import date
from pathlib import Path

from pipeline.artifacts import Manifest
from pipeline.data.histories import Bucket
from pipeline.io.artifacts import require_manifest
from pipeline.io.histories import read_bucket
from pipeline.io.night import Night, open_night
from pipeline.io.simulated import write_simulated_log
from pipeline.io.storage import open_storage
from pipeline.settings import Settings
from pipeline.stages.local import LocalRunner
from pipeline.stages.prepare.passes import open_job, prepare
from pipeline.stages.runner import Runner

DS = date(2026, 11, 20)
TINY = {"num_users": 60, "num_items": 40, "num_events": 3_000, "num_days": 8, "bot_share": 0.02, "num_tastes": 5}


class Backwards(LocalRunner):
    """A local runner that does the last task first: prepare must not depend on the order."""

    def run_tasks(self, label, function, arguments):
        yield from super().run_tasks(label, function, list(reversed(arguments)))


def simulated(root: Path | str, **sections: dict) -> Settings:
    values = {"root": str(root), "simulate": TINY, "train": {"num_negatives": 5}, "search": {"k": 5}} | sections
    settings = Settings.model_validate(values)
    write_simulated_log(open_storage(settings.root), settings.simulate)
    return settings


def run(settings: Settings, ds: date | None = None, runner: Runner | None = None) -> tuple[list[Bucket], Manifest]:
    night = open_night(settings, ds)
    manifest = prepare(runner or Backwards(settings), open_job(night, settings))
    buckets = [read_bucket(night.storage, night.histories, b) for b in range(settings.output.num_buckets)]
    return buckets, manifest


def validation_of(settings: Settings, ds: date | None = None) -> dict:
    night = open_night(settings, ds)
    return json.loads(night.storage.read(file_of(night, "validation")))


def file_of(night: Night, name: str) -> str:
    """The key of a file of the Histories artifact."""
    manifest = require_manifest(night.storage, night.histories, "prepare")
    (key,) = (file.key for file in manifest.files if file.key.startswith(f"{name}-"))
    return night.histories.key(key)
