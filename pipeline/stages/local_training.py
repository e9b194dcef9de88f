"""Training in this process, as the only rank; a killed training resumes from its last state."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.artifacts import FileEntry
from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.io.artifacts import Claims, read_file, sizes_of, write_file
from pipeline.io.checkpoint import HISTORY, TENSORS, save_state
from pipeline.io.night import Night
from pipeline.model.ranks import Ranks
from pipeline.model.training import TrainingState
from pipeline.settings import Settings
from pipeline.stages.train import STATES_KEPT, keep_best, remove_states, train_rank

STATE_FILES = (TENSORS, HISTORY)


class SavedState(Config):
    """A state, in the store."""

    files: tuple[FileEntry, FileEntry]  # of STATE_FILES


def train_locally(night: Night, settings: Settings, report_line: Callable[[str], None]) -> None:
    """Train tonight's model and leave it as the Checkpoint artifact; `report_line` gets a line per state, and one
    every half minute.

    Raises InputError when the settings ask for a GPU, or for several workers, which would train another model;
    InfrastructureError when another process that trains the same model has meanwhile removed the state to resume from.
    """
    if settings.train.num_workers != 1 or settings.train.use_gpu:
        raise InputError("cluster.mode local trains in one process on the CPU: set train.num_workers 1, use_gpu false")
    states = saved_states(night)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)  # holds the newest state

        def report(state: TrainingState, popularity: float) -> None:
            save_state(folder, state)
            upload(states, folder, state.number)

        state_folder = folder if fetch_last(states, folder) else None
        popularity = train_rank(night, settings, Ranks(0, 1), torch.device("cpu"), state_folder, report, report_line)
        keep_best(night, settings, folder, popularity)
    remove_states(night)


def saved_states(night: Night) -> Claims[SavedState]:
    """The numbers of the states of an unfinished training in this process that lie in the store."""
    prefix = f"training/{night.checkpoint.id}-local"
    return Claims(night.storage, prefix, "state", SavedState, lambda state: sizes_of(prefix, *state.files))


def upload(states: Claims[SavedState], folder: Path, number: int) -> None:
    """Write the state in `folder` to the store and delete all but the newest STATES_KEPT."""
    storage, prefix = states.storage, states.prefix
    tensors, history = (write_file(storage, prefix, name, (folder / name).read_bytes(), 1) for name in STATE_FILES)
    states.claim(number, SavedState(files=(tensors, history)))
    for old_number, old in sorted(states.done().items())[:-STATES_KEPT]:
        storage.delete(states.key(old_number))
        for entry in old.files:
            storage.delete(f"{prefix}/{entry.key}")


def fetch_last(states: Claims[SavedState], folder: Path) -> bool:
    """Copy the files of the last state into `folder`; False when there is no state.

    Raises InfrastructureError when the state was removed meanwhile, InputError when a file is damaged.
    """
    done = states.done()
    if not done:
        return False
    number = max(done)
    try:
        for name, entry in zip(STATE_FILES, done[number].files, strict=True):
            data = read_file(states.storage, states.prefix, entry, "remove it to train from the start")
            (folder / name).write_bytes(data)
    except InputError:
        states.require(number, "does another process train the same model? Run again")
        raise
    return True
