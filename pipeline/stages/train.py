"""Training, as one rank of it runs, and what is kept of a finished run. A rank reads its own user buckets."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.artifacts import FileEntry, Manifest
from pipeline.config import Config
from pipeline.data.batches import (
    ValidationUsers,
    Windows,
    cut_windows,
    join_validation_users,
    join_windows,
    num_steps,
    sample_users,
    validation_users,
)
from pipeline.errors import InputError
from pipeline.io.artifacts import Claims, read_file, read_manifest, require_manifest, write_file
from pipeline.io.checkpoint import (
    HISTORY,
    TENSORS,
    load_state,
    read_best_weights,
    read_history,
    save_state,
    write_checkpoint,
)
from pipeline.io.histories import read_bucket, read_items
from pipeline.io.night import Night
from pipeline.model.model import RetrievalModel
from pipeline.model.results import training_metrics
from pipeline.model.training import (
    VALIDATION_CUTOFF,
    EpochReport,
    Ranks,
    TrainingData,
    TrainingState,
    fit,
    new_state,
    popular_hit_rate,
    seed_everything,
)
from pipeline.settings import Settings
from pipeline.stages.runner import Runner

STATES_KEPT = 2  # of an unfinished run: the newest, and one in case it is damaged
STATE_FILES = (TENSORS, HISTORY)


def train_checkpoint(runner: Runner, night: Night, settings: Settings) -> Manifest:
    """Train tonight's model, unless it exists, and leave it as the Checkpoint artifact."""
    existing = read_manifest(night.storage, night.checkpoint.prefix)
    if existing is not None:
        return existing
    require_manifest(night.storage, night.histories, "prepare")
    runner.train(night, settings)
    return require_manifest(night.storage, night.checkpoint, "train")


def train_rank(
    night: Night,
    settings: Settings,
    ranks: Ranks,
    device: torch.device,
    state_folder: Path | None,
    report: Callable[[TrainingState, float], None],
) -> float:
    """Train as one of the ranks, from the state in `state_folder` if there is one.

    Returns the hit rate of popularity on the validation users. `report` is called with it and the state after each
    epoch.
    """
    torch.set_num_threads(settings.train.threads_per_worker)
    data = read_training_data(night, settings, ranks, device)
    seed_everything(settings.train.seed)  # the same first weights on every rank
    model = RetrievalModel(settings.model, len(data.item_counts_N)).to(device)
    state = new_state(model, settings.train)
    if state_folder is not None:
        load_state(state_folder, state)
    popularity = popular_hit_rate(data, ranks, device)
    fit(state, data, settings.train, ranks, lambda state: report(state, popularity))
    return popularity


def keep_best(night: Night, settings: Settings, state_folder: Path, popularity: float) -> Manifest:
    """Write the Checkpoint artifact from a finished run's last state, which holds the weights of its best epoch."""
    history = read_history(state_folder)
    model = RetrievalModel(settings.model, len(read_items(night.storage, night.histories)))
    model.load_state_dict(read_best_weights(state_folder))
    return write_checkpoint(night, model, settings, training_metrics(history, popularity))


class SavedState(Config):
    """The state of an unfinished local training after an epoch."""

    tensors: FileEntry
    history: FileEntry


def train_locally(night: Night, settings: Settings, say: Callable[[str], None]) -> None:
    """Train in this process, with one rank; a killed training goes on from its last epoch.

    Raises InputError when the configuration asks for several workers, whose result is another, or for a GPU;
    InfrastructureError when another process that trains the same model has meanwhile removed the state to go on from.
    """
    if settings.train.num_workers != 1 or settings.train.use_gpu:
        raise InputError("cluster.mode local trains in one process on the CPU: set train.num_workers 1, use_gpu false")
    states = local_states(night)
    storage, prefix, done = states.storage, states.prefix, states.done()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)  # holds the newest state

        def fetch(epoch: int) -> None:
            try:
                for file, entry in ((TENSORS, done[epoch].tensors), (HISTORY, done[epoch].history)):
                    (folder / file).write_bytes(read_file(storage, prefix, entry, "remove it to train from the start"))
            except InputError:
                states.require(epoch, "does another process train the same model? Run again")
                raise

        def report(state: TrainingState, popularity: float) -> None:
            last = state.history[-1]
            say(progress_line(last, popularity, settings.train.max_epochs))
            save_state(folder, state)
            entries = [write_file(storage, prefix, file, (folder / file).read_bytes(), 1) for file in STATE_FILES]
            states.claim(last.epoch, SavedState(tensors=entries[0], history=entries[1]))
            for epoch, old in sorted(states.done().items())[:-STATES_KEPT]:
                storage.delete(states.key(epoch))
                for entry in (old.tensors, old.history):
                    storage.delete(f"{prefix}/{entry.key}")

        if done:
            fetch(max(done))
        device = torch.device("cpu")
        popularity = train_rank(night, settings, Ranks(0, 1), device, folder if done else None, report)
        keep_best(night, settings, folder, popularity)
    remove_states(night)


def local_states(night: Night) -> Claims[SavedState]:
    """The epochs of an unfinished local training whose state is kept."""
    prefix = f"training/{night.checkpoint.id}-local"
    return Claims(night.storage, prefix, "epoch", SavedState, lambda state: (state.tensors, state.history))


def remove_states(night: Night) -> None:
    """Remove what a training of tonight's model, here or on Ray, has kept to go on from."""
    for info in night.storage.list(f"training/{night.checkpoint.id}"):
        night.storage.delete(info.key)


def progress_line(report: EpochReport, popularity: float, max_epochs: int) -> str:
    """The line that a person sees after each epoch."""
    return (
        f"epoch {report.epoch} of at most {max_epochs}: loss {report.loss:.3f}, HR@{VALIDATION_CUTOFF} "
        f"{report.hit_rate:.4f} (popularity {popularity:.4f}), {report.num_positions / report.seconds:,.0f} "
        f"positions/s, {report.seconds + report.validation_seconds:.0f} s"
    )


def read_training_data(night: Night, settings: Settings, ranks: Ranks, device: torch.device) -> TrainingData:
    """The windows and validation users of this rank's buckets: bucket b belongs to rank b mod world size."""
    windows: list[Windows] = []
    users: list[ValidationUsers] = []
    for index in range(ranks.rank, settings.output.num_buckets, ranks.world_size):
        bucket = read_bucket(night.storage, night.histories, index)
        train = bucket.cut("train")
        windows.append(cut_windows(train, bucket.user_keys, settings.model.max_length))
        users.append(validation_users(train, bucket.held_out("validation"), bucket.user_keys))
    own_windows, own_users = join_windows(windows), join_validation_users(users)
    num_windows = counts_by_rank(len(own_windows), ranks, device)
    if not any(num_windows):
        raise InputError(
            f"{night.storage.uri}/{night.histories.prefix}: no user has two events to train on; give a longer log"
        )
    num_users = sum(counts_by_rank(len(own_users), ranks, device))
    share = settings.train.validation_queries / max(num_users, 1)
    counts = read_items(night.storage, night.histories)["num_train_events"].to_numpy().copy()
    return TrainingData(
        own_windows,
        num_steps(num_windows, settings.train.batch_size),
        sample_users(own_users, share, settings.train.seed),
        torch.from_numpy(counts),
    )


def counts_by_rank(count: int, ranks: Ranks, device: torch.device) -> list[int]:
    """The `count` of every rank, on every rank."""
    counts = torch.zeros(ranks.world_size, dtype=torch.int64, device=device)
    counts[ranks.rank] = count
    summed: list[int] = ranks.sum_(counts).tolist()
    return summed
