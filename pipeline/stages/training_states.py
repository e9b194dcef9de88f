"""States of trainings in the store: those of an unfinished one, to resume from, and the last one of the training that
ended last.

A training that differs from that one in its end alone (`night.ENDS`), and would not have ended sooner, goes on from
there.
"""

import logging
from pathlib import Path

from pipeline.artifacts import FileEntry
from pipeline.config import Config
from pipeline.errors import InfrastructureError, InputError
from pipeline.io.artifacts import Claims, read_file, sizes_of, write_file
from pipeline.io.checkpoint import HISTORY, TENSORS, read_history
from pipeline.io.night import Night
from pipeline.model.rounds import ended_by
from pipeline.settings import TrainSettings

STATE_FILES = (TENSORS, HISTORY)
STATES_KEPT = 2  # of an unfinished training: the newest state, and one more in case the newest is damaged
ENDED = "trainings/"  # the folder of the last state of an ended training

log = logging.getLogger("nightrails")


class SavedState(Config):
    """A state, in the store."""

    files: tuple[FileEntry, FileEntry]  # of STATE_FILES


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


def keep_ended(night: Night, folder: Path) -> None:
    """Keep the last state of the night's training, which lies in `folder`, in the place of that of any other."""
    states = _ended_states(night)
    number = len(read_history(folder))
    upload(states, folder, number)
    kept = states.read(number)
    named = {states.key(number), *(sizes_of(states.prefix, *kept.files) if kept else ())}
    for info in night.storage.list(ENDED):
        if info.key not in named:
            night.storage.delete(info.key)


def fetch_ended(night: Night, train: TrainSettings, folder: Path) -> bool:
    """Copy the files of the last state of an ended training into `folder`, if one was kept that these settings would
    not have ended sooner."""
    states = _ended_states(night)
    try:
        if not fetch_last(states, folder):
            return False
    except (InputError, InfrastructureError) as error:
        log.info("the training begins anew, not where an earlier one has ended: %s", error)
        return False
    history = read_history(folder)
    return all(ended_by(history[:number], train) is None for number in range(1, len(history)))


def _ended_states(night: Night) -> Claims[SavedState]:
    """The last state of an ended training: its number is that of its rounds."""
    prefix = night.training.prefix
    return Claims(night.storage, prefix, "state", SavedState, lambda state: sizes_of(prefix, *state.files))
