"""Training: the artifact, the work of one rank, and the model that is kept."""

from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.artifacts import Manifest
from pipeline.io.artifacts import read_manifest, require_manifest
from pipeline.io.checkpoint import load_state, read_best_weights, read_history, write_checkpoint
from pipeline.io.histories import read_eligible
from pipeline.io.night import Night
from pipeline.model.model import RetrievalModel
from pipeline.model.results import training_metrics
from pipeline.model.training import (
    VALIDATION_CUTOFF,
    Ranks,
    TrainingState,
    best_round,
    ended_by,
    fit,
    new_state,
    popular_hit_rate,
    seed_everything,
)
from pipeline.settings import Settings, TrainSettings
from pipeline.stages.devices import PROCESS_BYTES
from pipeline.stages.runner import Runner
from pipeline.stages.training_data import read_training_data

STATES_KEPT = 2  # of an unfinished training: the newest state, and one more in case the newest is damaged


def train_checkpoint(runner: Runner, night: Night, settings: Settings) -> Manifest:
    """Train tonight's model unless it exists, and return the manifest of the Checkpoint artifact.

    Raises InputError when the histories do not exist, and the errors of `Runner.train`.
    """
    existing = read_manifest(night.storage, night.checkpoint.prefix)
    if existing is not None:
        return existing
    require_manifest(night.storage, night.histories, "prepare")
    runner.train(night, settings)
    return require_manifest(night.storage, night.checkpoint, "train")


def training_memory(night: Night, settings: Settings) -> int:
    """About the memory, in bytes, that one training process takes. Raises InputError without histories.

    Measured on a table of 300,000 items of 64 numbers: 49 bytes a number at the peak, when a state is saved.
    """
    counts = require_manifest(night.storage, night.histories, "prepare").counts
    num_events = counts.get("train_events", 0) // settings.train.num_workers
    return PROCESS_BYTES + 58 * counts.get("items", 0) * settings.model.dim + 28 * num_events


def train_rank(
    night: Night,
    settings: Settings,
    ranks: Ranks,
    device: torch.device,
    state_folder: Path | None,
    report: Callable[[TrainingState, float], None],
    say: Callable[[str], None],
) -> float:
    """Train as one of the ranks, from the state in `state_folder`, or from the start without one.

    Returns the hit rate of popularity on the validation users. `report` is called with the state and this hit rate, as
    `fit` calls `on_state`; `say` gets a line about the speed now and then. Raises InputError when no user has two
    events.
    """
    torch.set_num_threads(settings.train.threads_per_worker)
    data = read_training_data(night, settings, ranks, device)
    seed_everything(settings.train.seed)  # the same first weights on every rank
    model = RetrievalModel(settings.model, len(data.item_counts_N)).to(device)
    state = new_state(model, settings.train)
    if state_folder is not None:
        load_state(state_folder, state)
    popularity = popular_hit_rate(data, ranks, device)
    fit(state, data, settings.train, ranks, lambda state: report(state, popularity), say)
    return popularity


def keep_best(night: Night, settings: Settings, state_folder: Path, popularity: float) -> Manifest:
    """Write the Checkpoint artifact from the last state of a training, which holds the weights of the best epoch.

    `popularity` is the hit rate of popularity on the validation users.
    """
    history = read_history(state_folder)
    model = RetrievalModel(settings.model, len(read_eligible(night.storage, night.histories)))
    model.load_state_dict(read_best_weights(state_folder))
    return write_checkpoint(night, model, settings, training_metrics(history, popularity, settings.train))


def remove_states(night: Night) -> None:
    """Remove the states of an unfinished training of tonight's model, in this process or on Ray."""
    for info in night.storage.list(f"training/{night.checkpoint.id}"):
        night.storage.delete(info.key)


def progress_line(state: TrainingState, popularity: float, settings: TrainSettings) -> str:
    """The log line of a state: of the round that ended, or of the one under way."""
    if not state.history or state.history[-1].step < state.step:
        return f"step {state.step} is done and saved"
    report = state.history[-1]
    is_best = best_round(state.history) is report
    why = ended_by(state.history, settings)
    return (
        f"epoch {report.epoch:g} of at most {settings.max_epochs}: loss {report.loss:.3f}, validation "
        f"HR@{VALIDATION_CUTOFF} {report.hit_rate:.4f} (popularity {popularity:.4f}), NDCG@{VALIDATION_CUTOFF} "
        f"{report.ndcg:.4f}{', the best so far' if is_best else ''}; {report.num_positions / report.seconds:,.0f} "
        f"positions/s, {report.total_seconds:.0f} s" + (f"; train.{why} ends the training" if why else "")
    )
