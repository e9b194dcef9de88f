"""Training in this process, as the only rank; a killed training resumes from its last epoch."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.artifacts import FileEntry
from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.io.artifacts import Claims, read_file, write_file
from pipeline.io.checkpoint import HISTORY, TENSORS, save_state
from pipeline.io.night import Night
from pipeline.model.training import Ranks, TrainingState
from pipeline.settings import Settings
from pipeline.stages.train import STATES_KEPT, keep_best, progress_line, train_rank

STATE_FILES = (TENSORS, HISTORY)


class SavedState(Config):
    """The state after an epoch, in the store."""

    files: tuple[FileEntry, FileEntry]  # of STATE_FILES
    popularity: float  # hit rate of popularity on the validation users


def train_locally(night: Night, settings: Settings, report_line: Callable[[str], None]) -> None:
    """Train tonight's model and leave it as the Checkpoint artifact; `report_line` gets one line per epoch.

    Raises InputError when the settings ask for a GPU, or for several workers, which would train another model.
    """
    if settings.train.num_workers != 1 or settings.train.use_gpu:
        raise InputError("cluster.mode local trains in one process on the CPU: set train.num_workers 1, use_gpu false")
    states = SavedStates(night)

    def report(state: TrainingState, popularity: float) -> None:
        report_line(progress_line(state.history[-1], popularity, settings.train.max_epochs))
        states.save(state, popularity)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        last = states.fetch_last(folder)
        train_rank(night, settings, Ranks(0, 1), torch.device("cpu"), folder if last else None, report)
        last = states.fetch_last(folder)
        assert last is not None
        keep_best(night, settings, folder, last.popularity)
    states.remove()


class SavedStates:
    """The last states of an unfinished training, in the store."""

    def __init__(self, night: Night) -> None:
        self._storage, self._prefix = night.storage, f"training/{night.checkpoint.id}-local"
        self._claims = Claims(self._storage, self._prefix, "epoch", SavedState, lambda state: state.files)

    def save(self, state: TrainingState, popularity: float) -> None:
        """Write the state and delete all but the newest STATES_KEPT."""
        with tempfile.TemporaryDirectory() as folder:
            save_state(Path(folder), state)
            tensors, history = (
                write_file(self._storage, self._prefix, name, (Path(folder) / name).read_bytes(), 1)
                for name in STATE_FILES
            )
        epoch = state.history[-1].epoch
        self._claims.claim(epoch, SavedState(files=(tensors, history), popularity=popularity))
        for old_epoch, old in sorted(self._claims.done().items())[:-STATES_KEPT]:
            self._storage.delete(self._claims.key(old_epoch))
            for entry in old.files:
                self._storage.delete(f"{self._prefix}/{entry.key}")

    def fetch_last(self, folder: Path) -> SavedState | None:
        """Copy the files of the last state into `folder`; None when there is no state.

        Raises InputError when a file is gone or damaged.
        """
        states = self._claims.done()
        if not states:
            return None
        last = states[max(states)]
        for name, entry in zip(STATE_FILES, last.files, strict=True):
            (folder / name).write_bytes(read_file(self._storage, self._prefix, entry, "remove it to start again"))
        return last

    def remove(self) -> None:
        """Delete all states."""
        for info in self._storage.list(f"{self._prefix}/"):
            self._storage.delete(info.key)
