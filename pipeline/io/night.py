"""The night: its day, its inputs and the id of every artifact, all fixed before anything is computed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from typing import Any, Literal

from pipeline.artifacts import Artifact, CandidateRun
from pipeline.config import fingerprint
from pipeline.io.earlier import Earlier, find_earlier
from pipeline.io.inputs import Inputs, list_blocks, list_items, list_log, list_queries
from pipeline.io.newest import check_age, newest_day
from pipeline.io.storage import open_storage
from pipeline.io.storage.base import Storage
from pipeline.settings import Settings


@dataclass(frozen=True)
class Night:
    """The store, inputs and artifacts of one night, for every function that works on it. Small: it holds no data."""

    storage: Storage
    inputs: Inputs
    histories: Artifact
    selected_neighbours: Artifact  # counted in the training events
    measured_neighbours: Artifact  # counted in the events before the test
    neighbours: Artifact  # that serve: counted in all events where the model is refitted on all
    training: Artifact  # where the last state of the selected model's training lies, for one that ends later
    selected: Artifact  # the model that was selected on the validation events; it has learned from none of them
    measured: Artifact  # the selected one, refitted on the events before the test: what the evaluation measures
    checkpoint: Artifact  # the model that serves: the selected one, refitted on all events
    memory: Artifact  # the weight of the counts in the score, chosen with the selected model
    measured_corpus: Artifact
    corpus: Artifact
    tuning: Artifact
    evaluation: Artifact
    run: CandidateRun

    @property
    def ds(self) -> date:
        return self.inputs.ds

    @property
    def earlier(self) -> Earlier | None:
        """The models of an earlier night that tonight's training starts from, or that tonight takes over."""
        return self.inputs.earlier

    @property
    def taken_over(self) -> Earlier | None:
        """The models of an earlier night that tonight takes over, without a training step."""
        return self.earlier if self.earlier is not None and self.earlier.is_reused else None

    @property
    def selection(self) -> "Night":
        """This night with the selected model, and counts of its events, in the place of those that serve: for choices
        on the validation events. Its items are not embedded."""
        return replace(self, neighbours=self.selected_neighbours, checkpoint=self.selected)

    @property
    def measurement(self) -> "Night":
        """This night with the model, counts and corpus of the events before the test in the place of those that serve:
        made in the same way, but of nothing that the test is about."""
        return replace(self, neighbours=self.measured_neighbours, checkpoint=self.measured, corpus=self.measured_corpus)

    @property
    def has_refit(self) -> bool:
        """Whether the model of this night is a refitted one."""
        return self.checkpoint != self.selected

    @property
    def learned_part(self) -> Literal["train", "before_test", "whole"]:
        """The part of the histories (`pipeline.data.seen.PARTS`) that this night's model and counts are made of."""
        if not self.has_refit:
            return "train"
        return "before_test" if self.checkpoint == self.measured else "whole"


@dataclass(frozen=True)
class Recipe:
    """The ingredients of an artifact's id: a version, the ids in `made_from`, and some of the settings.

    Raise `version` by hand when the same inputs would give other content. Settings that cannot change the content
    (replicas, tiles, locations) stay out, so that a night that changes them finds its finished work. Threads of the
    training and GPUs change the last bits of sums, so they are in the ids.
    """

    version: int
    made_from: tuple[str, ...]
    settings: Callable[[Settings], dict[str, Any]]


def _of_histories(settings: Settings) -> dict[str, Any]:
    return {
        "prepare": settings.prepare.model_dump(mode="json", exclude={"rows_per_task", "keep_partitions"}),
        "split": settings.split.model_dump(mode="json"),
        "num_buckets": settings.output.num_buckets,
        "time_zone": settings.log.time_zone,
        "items": settings.items.model_dump(mode="json", exclude={"uri", "max_gigabytes"}),
    }


ENDS = {"max_epochs", "max_minutes", "patience"}  # keys of `train` that say when a training ends, and no more


def _of_training(settings: Settings) -> dict[str, Any]:
    # How the models came to be chosen is no part of this, but the models themselves are, as the input `earlier`.
    others = {"steps_between_states", "refit", "start_from", "every_days"}
    train = settings.train.model_dump(mode="json", exclude=others | ENDS)
    return {"model": settings.model.model_dump(mode="json"), "train": train}


def _of_selected(settings: Settings) -> dict[str, Any]:
    return settings.train.model_dump(mode="json", include=ENDS)


def _of_refit(settings: Settings) -> dict[str, Any]:
    return {"refit": settings.train.refit}


def _of_neighbours(settings: Settings) -> dict[str, Any]:
    return settings.counts.model_dump(mode="json") | {"pairs": settings.counted_pairs}


def _of_whole_neighbours(settings: Settings) -> dict[str, Any]:
    return _of_neighbours(settings) | {"part": "whole"}


def _of_measured(settings: Settings) -> dict[str, Any]:
    return {"refit": settings.train.refit, "part": "before_test"}


def _of_measured_neighbours(settings: Settings) -> dict[str, Any]:
    return _of_neighbours(settings) | {"part": "before_test"}


def _of_memory(settings: Settings) -> dict[str, Any]:
    if not settings.memory.enabled:
        return {"enabled": False}
    return {"on_gpu": settings.cluster.gpus_per_actor > 0} | settings.memory.model_dump(mode="json")


def _of_corpus(settings: Settings) -> dict[str, Any]:
    device = {"on_gpu": settings.cluster.gpus_per_actor > 0}
    if not settings.has_low_rank:
        return device | settings.corpus.model_dump(mode="json", exclude={"low_rank"})
    # The low-rank table is made from quick scores, whose rounding differs between backends. A tuned search does without
    # one where there are few users and items, or too few users for it.
    search = settings.search
    tuned = {"min_pairs": search.tuning.min_pairs} if search.method == "tuned" else {}
    return device | settings.corpus.model_dump(mode="json") | {"backend": search.backend} | tuned


def _of_search(settings: Settings) -> dict[str, Any]:
    chosen_tonight = {"num_preselected", "num_per_embd"}
    only_for_the_choice = {"target_recall", "tuning"}
    left_out = chosen_tonight if settings.search.method == "tuned" else only_for_the_choice
    device: dict[str, Any] = {"encoded_on_gpu": settings.cluster.gpus_per_encoder > 0}
    rules = settings.rules
    if rules.are_there:
        device["show_if"] = rules.show_if
    if rules.are_of_lists:
        device["of_lists"] = rules.model_dump(mode="json", exclude={"show_if", "block", "max_groups"})
    return device | settings.search.model_dump(mode="json", exclude=left_out)


def _of_evaluation(settings: Settings) -> dict[str, Any]:
    return settings.evaluate.model_dump(mode="json")


def _of_run(settings: Settings) -> dict[str, Any]:
    cold_users = settings.queries.cold_users
    return {"output": settings.output.model_dump(mode="json"), "name": settings.name, "cold_users": cold_users}


# In the order of the night. `day`, `log`, `items`, `queries`, `blocks` and `earlier` are inputs, and so is
# `attributes`: the queries table, where rules read its columns. The other names are artifacts.
RECIPES = {
    "histories": Recipe(7, ("day", "log", "items"), _of_histories),
    "selected_neighbours": Recipe(1, ("histories",), _of_neighbours),
    "measured_neighbours": Recipe(1, ("histories",), _of_measured_neighbours),
    "neighbours": Recipe(1, ("histories",), _of_whole_neighbours),
    "training": Recipe(7, ("histories", "earlier"), _of_training),
    "selected": Recipe(1, ("training",), _of_selected),
    "measured": Recipe(1, ("selected",), _of_measured),
    "model": Recipe(1, ("selected",), _of_refit),
    "memory": Recipe(2, ("selected", "selected_neighbours"), _of_memory),
    "measured_corpus": Recipe(7, ("measured",), _of_corpus),
    "corpus": Recipe(7, ("model",), _of_corpus),
    "search": Recipe(7, ("corpus", "memory", "neighbours", "blocks", "attributes"), _of_search),
    "evaluation": Recipe(7, ("search", "measured_corpus", "measured_neighbours"), _of_evaluation),
    "run": Recipe(4, ("search", "queries", "day"), _of_run),
}

# Without a refit, each of these is the other: all models are the selected one.
WITHOUT_REFIT = {
    "measured": "selected",
    "model": "selected",
    "corpus": "measured_corpus",
    "measured_neighbours": "selected_neighbours",
    "neighbours": "selected_neighbours",
}


def training_of(settings: Settings) -> dict[str, Any]:
    """The settings of a training, in parts, and its versions: a later night that has the same may use its models.

    Days that were held out stay held out on a later night only if it is split in the same way.
    """
    return {
        "model": settings.model.model_dump(mode="json"),
        "train": settings.train.model_dump(mode="json", exclude={"steps_between_states", "every_days"}),
        "split": settings.split.model_dump(mode="json") | {"time_zone": settings.log.time_zone},
        "versions": [RECIPES[kind].version for kind in ("training", "model")],
    }


def open_night(settings: Settings, ds: date | None = None) -> Night:
    """List the inputs and name every artifact; without `ds` the night is that of the newest day in the log.

    Reads listings only, except to find the newest day: the times of a log without `ds=` partitions, else the footers of
    the newest few. Raises InputError for inputs that are missing or empty, and for a log that is too old.
    """
    log = list_log(settings)
    if ds is None:
        today = open_storage(log.uri if settings.log.uri else settings.root).clock().date()
        day = newest_day(log, settings.log.time_zone, today)
        check_age(log, day, today, settings.log.max_age_days)
    else:
        day = ds
    known = log.until(day, settings.prepare.days_read)
    storage = open_storage(settings.root)
    earlier = find_earlier(storage, settings, day, training_of(settings))
    tables = (list_items(settings, day), list_queries(settings, day))
    inputs = Inputs(day, known, *tables, earlier, list_blocks(settings, day))
    return name_night(storage, settings, inputs)


def name_night(storage: Storage, settings: Settings, inputs: Inputs) -> Night:
    """Compute the id of every artifact from the inputs and from the settings that shape the artifact."""
    ids: dict[str, object] = dict(inputs.identity())
    if settings.rules.show_if:
        ids["attributes"] = ids["queries"]
    same = {} if settings.train.refit else WITHOUT_REFIT
    for kind, recipe in RECIPES.items():
        # What is not there is left out, so that a night has the same name whether it could have been there or not.
        made_from = [ids[name] for name in recipe.made_from if name in ids]
        fresh = fingerprint(kind, recipe.version, made_from, recipe.settings(settings))
        ids[kind] = ids[same[kind]] if kind in same else fresh

    def artifact(folder: str, kind: str) -> Artifact:
        return Artifact(folder, str(ids[kind]))

    return Night(
        storage,
        inputs,
        histories=artifact("histories", "histories"),
        selected_neighbours=artifact("neighbours", "selected_neighbours"),
        measured_neighbours=artifact("neighbours", "measured_neighbours"),
        neighbours=artifact("neighbours", "neighbours"),
        training=artifact("trainings", "training"),
        selected=artifact("models", "selected"),
        measured=artifact("models", "measured"),
        checkpoint=artifact("models", "model"),
        memory=artifact("memories", "memory"),
        measured_corpus=artifact("corpora", "measured_corpus"),
        corpus=artifact("corpora", "corpus"),
        tuning=artifact("tunings", "search"),
        evaluation=artifact("evaluations", "evaluation"),
        run=CandidateRun(settings.name, inputs.ds, str(ids["run"])),
    )
