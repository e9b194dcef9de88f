"""Training: the artifact, the work of one rank, and the model that is kept."""

import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pipeline.artifacts import Manifest
from pipeline.errors import InfrastructureError
from pipeline.io.artifacts import read_manifest, require_manifest
from pipeline.io.checkpoint import load_model, load_state, read_history, read_metrics, read_weights, write_checkpoint
from pipeline.io.histories import read_eligible
from pipeline.io.night import Night
from pipeline.model.backends import training_backend
from pipeline.model.encoders import columns_read
from pipeline.model.model import RetrievalModel
from pipeline.model.ranks import Ranks
from pipeline.model.results import refit_metrics, training_metrics
from pipeline.model.rounds import RoundReport, best_round, ended_by
from pipeline.model.training import (
    VALIDATION_CUTOFF,
    TrainingData,
    TrainingState,
    finish_round,
    fit,
    new_state,
    popular_hit_rate,
    seed_everything,
)
from pipeline.model.validation import Validate
from pipeline.native.backend import Backend
from pipeline.retrieval.all_items import memory_of_indexes
from pipeline.settings import Settings, TrainSettings
from pipeline.stages.content import read_features
from pipeline.stages.devices import PROCESS_BYTES
from pipeline.stages.earlier_models import start_from, take_over
from pipeline.stages.runner import Runner
from pipeline.stages.training_data import read_training_data
from pipeline.stages.training_states import fetch_ended, keep_ended
from pipeline.stages.validation import rank_by_search

log = logging.getLogger("nightrails")

LEARNED = {"before_test": "the events before the test", "whole": "all events"}  # of a refit, by part
NEVER = 1_000_000_000  # rounds of patience: a refit goes to its end
MIN_REFIT_SHARE = 0.8  # of the selection's NDCG on the validation events; with few users it is noisy
COLUMN_BYTES = {"times": 32, "weights": 16}  # of an event in memory: four copies while buckets are joined


def train_checkpoint(runner: Runner, night: Night, settings: Settings) -> Manifest:
    """Train tonight's models unless they exist, and return the manifest of the one that serves.

    First the model that is selected on the validation events, then its refits, if there are any: on the events before
    the test, to be measured, and on all events, to serve. A night that takes over the models of an earlier one trains
    none. Raises InputError when the histories do not exist, or the models to take over were removed, and the errors of
    `Runner.train`.
    """
    if not are_trained(night):
        require_manifest(night.storage, night.histories, "prepare")
        if night.taken_over:
            return take_over(night, settings, night.taken_over)
        runner.train(night, settings)
        for each in models_of(night):
            remove_states(each)
            _warn_unless_sound(each)
    return require_manifest(night.storage, night.checkpoint, "train")


def models_of(night: Night) -> list[Night]:
    """The night with each of its models, in the order in which they are trained."""
    return [night.selection, night.measurement, night] if night.has_refit else [night]


def are_trained(night: Night) -> bool:
    """Whether all models of the night exist."""
    return all(is_trained(each) for each in models_of(night))


def is_trained(night: Night) -> bool:
    """Whether the model of this night exists that serves."""
    return read_manifest(night.storage, night.checkpoint.prefix) is not None


def refit_settings(train: TrainSettings, best_epoch: float) -> TrainSettings:
    """The settings of the refit of a model that took `best_epoch` epochs: a share of them, at least one, to the end."""
    num_epochs = max(1, round(train.refit * best_epoch))
    return train.model_copy(update={"max_epochs": num_epochs, "max_minutes": None, "patience": NEVER})


def training_memory(night: Night, settings: Settings) -> int:
    """About the memory, in bytes, that one training process takes. Raises InputError without histories.

    Measured on a table of 300,000 items of 64 numbers: 73 bytes a number at the peak, when a state is saved. With few
    items the search of a validation takes more.
    """
    counts = require_manifest(night.storage, night.histories, "prepare").counts
    num_events = counts.get("train_events", 0) // settings.train.num_workers
    event_bytes = 28 + sum(COLUMN_BYTES[name] for name in columns_read(settings.model))
    item_bytes = 74 * counts.get("items", 0) * settings.model.dim + memory_of_indexes(settings.model.mol)
    content = settings.model.content
    content_bytes = 28 * content.num_hashes * settings.model.dim if content.columns else 0  # seven copies at the peak
    return PROCESS_BYTES + item_bytes + content_bytes + event_bytes * num_events


def train_rank(
    night: Night,
    settings: Settings,
    ranks: Ranks,
    device: torch.device,
    state_folder: Path | None,
    report: Callable[[TrainingState, float], None],
    say: Callable[[str], None],
) -> float:
    """Train the model of `night` that serves, as one of the ranks: from the state in `state_folder`, or from the start.

    Returns the hit rate of popularity on the validation users. `report` is called with the state and this hit rate, as
    `fit` calls `on_state`; `say` gets a line for each state, and one about the speed every half minute. Raises
    InputError when no user has two events, or when `train.backend` cannot run here.
    """
    torch.set_num_threads(settings.train.threads_per_worker)
    data = read_training_data(night, settings, ranks, device, night.learned_part)
    train = settings.train
    seed_everything(train.seed)  # the same first weights on every rank
    model = RetrievalModel(settings.model, len(data.item_counts_N)).to(device)
    if night.has_refit:
        model.load_state_dict(load_model(night.storage, night.selected).state_dict())
        best_epoch = read_metrics(night.storage, night.selected).best_epoch
        train = refit_settings(train, best_epoch)
        say(
            f"refit of model {night.selected.id} on {LEARNED[night.learned_part]}: "
            f"{train.max_epochs} epochs, after {best_epoch:g} of the selection"
        )
    describe_items(model, night, settings, data.item_counts_N > 0)
    _log_backend(training_backend(model.mol, train))
    validate = partial(rank_by_search, train.backend)
    if state_folder is None and not night.has_refit:
        state = _first_state(night, model, data, train, ranks, validate, say)
    else:
        state = new_state(model, train)
        if state_folder is not None:
            load_state(state_folder, state)
    popularity = popular_hit_rate(data, ranks, device)

    def on_state(state: TrainingState) -> None:
        say(progress_line(state, popularity, train, night.has_refit))
        report(state, popularity)

    if state_folder is None and state.is_finished(train):
        on_state(state)  # nothing is left to do, but the state is not saved yet as one of this training
    fit(state, data, train, ranks, on_state, say, validate)
    return popularity


def describe_items(model: RetrievalModel, night: Night, settings: Settings, is_met_N: Tensor) -> None:
    """Tell a model with content what tonight's catalogue says of the items, and which of them it learns from."""
    if model.item_embedding.content is not None:
        model.item_embedding.describe(read_features(night, settings), is_met_N)


def _first_state(
    night: Night,
    model: RetrievalModel,
    data: TrainingData,
    train: TrainSettings,
    ranks: Ranks,
    validate: Validate,
    say: Callable[[str], None],
) -> TrainingState:
    """The state that a training begins with: the last one of a training that ended sooner, the weights of an earlier
    night's model, or random weights."""
    with tempfile.TemporaryDirectory() as name:
        if _fetch_ended_everywhere(night, train, ranks, Path(name), model.device):
            state = new_state(model, train)
            load_state(Path(name), state)
            say(f"go on where a training that ended sooner stands: after epoch {state.history[-1].epoch:g}")
            return state
    if night.earlier is None:
        return new_state(model, train)
    num_new = start_from(model, night, night.earlier)
    where = f"model {night.earlier.selected.id} of ds={night.earlier.ds}"
    say(f"start from {where}; {num_new} of {model.num_items} items are new")
    state = new_state(model, train)
    finish_round(state, data, train, ranks, validate)
    say(f"before the first step: validation NDCG@{VALIDATION_CUTOFF} {state.history[0].ndcg:.4f}")
    return state


def _fetch_ended_everywhere(
    night: Night, train: TrainSettings, ranks: Ranks, folder: Path, device: torch.device
) -> bool:
    """Fetch the last state of an ended training to go on from, on all ranks or on none.

    Raises InfrastructureError when some ranks find another one than the others.
    """
    number = len(read_history(folder)) if fetch_ended(night, train, folder) else 0
    if int(ranks.sum_(torch.tensor([number], device=device))[0]) != ranks.world_size * number:
        raise InfrastructureError("the state to go on from was replaced meanwhile; run the same command again")
    return number > 0


def _log_backend(backend: Backend) -> None:
    if backend.reason:
        log.warning("the pair network trains with %s, slower: %s", backend.name, backend.reason)
    else:
        log.info("the pair network trains with %s%s", backend.name, f" ({backend.origin})" if backend.origin else "")


def keep_best(night: Night, settings: Settings, state_folder: Path, popularity: float) -> Manifest:
    """Write the Checkpoint artifact from the last state of a training: the weights of the best round, or of a refit.

    `popularity` is the hit rate of popularity on the validation users.
    """
    history = read_history(state_folder)
    if night.has_refit:
        return keep_refit(night, settings, state_folder, history[-1])
    model = RetrievalModel(settings.model, len(read_eligible(night.storage, night.histories)))
    model.load_state_dict(read_weights(state_folder, "best"))
    manifest = write_checkpoint(night, model, settings, training_metrics(history, popularity, settings.train))
    keep_ended(night, state_folder)
    return manifest


def keep_refit(night: Night, settings: Settings, state_folder: Path, last: RoundReport) -> Manifest:
    """Write the Checkpoint artifact of a refit: its last weights, if they are sound, else those of the selection.

    The refit has learned from the validation events, so a sound one ranks them about as high as the selection does, or
    higher.
    """
    model = load_model(night.storage, night.selected)
    selection = read_metrics(night.storage, night.selected)
    is_sound = last.ndcg >= MIN_REFIT_SHARE * selection.validation_ndcg
    if is_sound:
        model.load_state_dict(read_weights(state_folder, "average"))
    return write_checkpoint(night, model, settings, refit_metrics(selection, last, is_sound))


def _warn_unless_sound(night: Night) -> None:
    """A warning when the night's model is a refit that was not sound."""
    metrics = read_metrics(night.storage, night.checkpoint)
    if metrics.refit_ndcg is not None and not metrics.is_refit_served:
        log.warning(
            "the refit on %s ranks even the validation events that it has learned from far lower than the selected "
            "model (NDCG@%d %.4f, selected %.4f): the selected model takes its place; lower train.learning_rate",
            *(LEARNED[night.learned_part], metrics.cutoff, metrics.refit_ndcg, metrics.validation_ndcg),
        )


def remove_states(night: Night) -> None:
    """Remove the states of an unfinished training of the model, in this process or on Ray."""
    for info in night.storage.list(f"training/{night.checkpoint.id}"):
        night.storage.delete(info.key)


def progress_line(state: TrainingState, popularity: float, settings: TrainSettings, is_refit: bool) -> str:
    """The log line of a state: of the round that ended, or of the one under way."""
    if not state.history or state.history[-1].step < state.step:
        return f"step {state.step} is done and saved"
    report = state.history[-1]
    is_best = best_round(state.history) is report
    why = ended_by(state.history, settings)
    speed = f"{report.num_positions / report.seconds:,.0f} positions/s, {report.total_seconds:.0f} s"
    if is_refit:
        return (
            f"refit, epoch {report.epoch:g} of {settings.max_epochs}: loss {report.loss:.3f}, NDCG@{VALIDATION_CUTOFF} "
            f"{report.ndcg:.4f} on validation events that it learns from; {speed}"
        )
    return (
        f"epoch {report.epoch:g} of at most {settings.max_epochs}: loss {report.loss:.3f}, validation "
        f"HR@{VALIDATION_CUTOFF} {report.hit_rate:.4f} (popularity {popularity:.4f}), NDCG@{VALIDATION_CUTOFF} "
        f"{report.ndcg:.4f}{', the best so far' if is_best else ''}; {speed}"
        + (f"; train.{why} ends the training" if why else "")
    )
