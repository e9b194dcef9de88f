"""Training in this process, as the only rank; a killed training resumes from its last state."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.errors import InputError
from pipeline.io.checkpoint import save_state
from pipeline.io.night import Night
from pipeline.model.ranks import Ranks
from pipeline.model.training import TrainingState
from pipeline.settings import Settings
from pipeline.stages.train import keep_best, remove_states, train_rank
from pipeline.stages.training_states import fetch_last, saved_states, upload


def train_locally(night: Night, settings: Settings, report_line: Callable[[str], None]) -> None:
    """Train one model and leave it as the Checkpoint artifact of `night`; `report_line` gets a line per state, and one
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
