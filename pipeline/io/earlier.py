"""The trained models of an earlier night, which tonight's training starts from or which tonight takes over."""

import logging
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from pipeline.artifacts import Artifact
from pipeline.errors import InputError
from pipeline.io.publication.commits import RunManifest, published_before, read_run_manifest
from pipeline.io.storage.base import Storage
from pipeline.settings import Settings

WAY_OUT = "set train.start_from to scratch and train.every_days to 1 to train tonight's models from scratch"

log = logging.getLogger("nightrails")


@dataclass(frozen=True)
class Earlier:
    """The models of one training: that of the last published night, or the one whose models that night took over."""

    ds: date  # of the night that trained them
    # A training starts from the selected model. The one that serves has learned the days that tonight validates on, so
    # that validation would judge what it has learned by heart.
    selected: Artifact
    measured: Artifact
    served: Artifact
    is_reused: bool  # tonight takes over all three as they are, without a training step

    def identity(self) -> list[str]:
        """The part in the ids of tonight's models."""
        reused = ["reused", self.selected.id, self.measured.id, self.served.id]
        return reused if self.is_reused else ["started", self.selected.id]

    def lineage(self) -> dict[str, str]:
        """The part in the lineage of tonight's run."""
        if not self.is_reused:
            return {"started_from": self.selected.id}
        return {
            "selected_carried_from": self.selected.id,
            "measured_carried_from": self.measured.id,
            "carried_from": self.served.id,
            "trained_on": self.ds.isoformat(),
        }


def find_earlier(storage: Storage, settings: Settings, ds: date, training: dict[str, Any]) -> Earlier | None:
    """Find the models that the night of `ds` starts from or takes over, and say in the log why, or why there are none.

    Only commits of days before `ds` count, and only what they say: whether the models still exist is asked when they
    are read, so that a published night keeps its name when they are removed. `training` are the settings of a training
    that a night's manifest records. Raises InputError when the last commit's manifest is gone or damaged.
    """
    train = settings.train
    if train.start_from == "scratch" and train.every_days == 1:
        return None
    commit = published_before(storage, settings.name, ds)
    if commit is None:
        log.info("training starts from scratch: no night of %r before ds=%s is published", settings.name, ds)
        return None
    try:
        manifest = read_run_manifest(storage, settings.name, commit)
    except InputError as error:
        raise InputError(f"{error}, or {WAY_OUT}") from None
    then = manifest.settings.get("training")
    if then is None:
        log.info(
            "training starts from scratch: the night of ds=%s does not say how its models were trained, because an "
            "earlier version of nightrails published it",
            manifest.ds,
        )
        return None
    return _choose(_models_of(manifest), settings, ds, [name for name in training if then.get(name) != training[name]])


def _choose(models: Earlier, settings: Settings, ds: date, changed: list[str]) -> Earlier | None:
    """The models as tonight uses them; None to train from scratch. `changed` names the settings that are others now."""
    train, age_days = settings.train, (ds - models.ds).days
    if age_days < train.every_days and not changed:
        log.info(
            "the models that were trained on ds=%s are taken over (train.every_days %d)", models.ds, train.every_days
        )
        return replace(models, is_reused=True)
    fixed = [name for name in changed if name != "train"]
    if train.start_from == "previous" and not fixed:
        log.info("training starts from the selected model of ds=%s, %s", models.ds, models.selected.id)
        return models
    why = f"were trained with other settings ({', '.join(changed)})" if changed else f"are {age_days} days old"
    log.info("training starts from scratch: the models of ds=%s %s", models.ds, why)
    return None


def _models_of(manifest: RunManifest) -> Earlier:
    """The models that were trained for this run, or for the run that it took them over from."""
    lineage = manifest.lineage
    selected = lineage.get("selected_carried_from", lineage["selected"])
    # Earlier versions of nightrails measured the selected model.
    measured = lineage.get("measured_carried_from", lineage.get("measured", selected))
    return Earlier(
        ds=date.fromisoformat(lineage.get("trained_on", manifest.ds.isoformat())),
        selected=Artifact("models", selected),
        measured=Artifact("models", measured),
        served=Artifact("models", lineage.get("carried_from", lineage["model"])),
        is_reused=False,
    )
