"""The state of an unfinished training run in a folder: weights, optimiser and best weights as safetensors, the rest as
JSON. Never a pickle."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pipeline.model.training import EpochReport, TrainingState

TENSORS, HISTORY = "state.safetensors", "history.json"


def save_state(folder: Path, state: TrainingState) -> None:
    """Write all that `load_state` needs; the folder exists."""
    tensors = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in state.best_weights.items()}
    for index, moments in state.optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": value for name, value in moments.items()}
    (folder / TENSORS).write_bytes(save_tensors({name: value.cpu().contiguous() for name, value in tensors.items()}))
    (folder / HISTORY).write_text(json.dumps([asdict(report) for report in state.history]))


def load_state(folder: Path, state: TrainingState) -> None:
    """Make a new state (same settings, same number of items) what `save_state` wrote."""
    tensors = load_tensors((folder / TENSORS).read_bytes())
    state.model.load_state_dict(_below(tensors, "model."))
    device = next(state.model.parameters()).device
    state.best_weights = {name: value.to(device) for name, value in _below(tensors, "best.").items()}
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in _below(tensors, "optimiser.").items():
        index, _, moment = name.partition(".")
        moments.setdefault(int(index), {})[moment] = value
    state.optimiser.load_state_dict(state.optimiser.state_dict() | {"state": moments})
    state.history[:] = read_history(folder)


def read_history(folder: Path) -> list[EpochReport]:
    """The epochs that the saved run has finished."""
    return [EpochReport(**report) for report in json.loads((folder / HISTORY).read_text())]


def read_best_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of the saved run's best epoch, on the CPU."""
    return _below(load_tensors((folder / TENSORS).read_bytes()), "best.")


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
