"""The Checkpoint artifact: weights as safetensors, configuration and metrics as JSON, never a pickle; and the state of
an unfinished training run, in the same formats."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pipeline.artifacts import Artifact, FileEntry, Manifest
from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.io.artifacts import parse, read_file, require_manifest, seal, write_file
from pipeline.io.night import Night
from pipeline.io.storage.base import Storage
from pipeline.model.model import RetrievalModel
from pipeline.model.results import TrainingMetrics
from pipeline.model.rounds import RoundProgress, RoundReport
from pipeline.model.training import TrainingState
from pipeline.settings import ModelSettings, Settings

REMEDY = "remove the model and train again"
TENSORS, HISTORY = "state.safetensors", "history.json"  # files of an unfinished training run


class ModelConfig(Config):
    """The settings that build the model; the weights are in a file beside this one."""

    model: ModelSettings
    num_items: int
    unknown_rows: tuple[int, ...] = ()  # of the items that a model which was taken over has never seen


def write_checkpoint(
    night: Night,
    model: RetrievalModel,
    settings: Settings,
    metrics: TrainingMetrics,
    unknown_rows: Sequence[int] = (),
) -> Manifest:
    """Write weights, configuration and metrics, then the manifest that makes the artifact exist.

    `unknown_rows` are the items that a model which was taken over has never seen. Returns the manifest of the first
    attempt, which stands.
    """
    config = ModelConfig(model=model.settings, num_items=model.num_items, unknown_rows=tuple(unknown_rows))
    weights = save_tensors({name: weight.contiguous().cpu() for name, weight in model.state_dict().items()})
    storage, prefix = night.storage, night.checkpoint.prefix
    return seal(
        storage,
        night.checkpoint,
        kind="checkpoint",
        lineage={"histories": night.histories.id} | _lineage(night),
        settings=settings.model_dump(mode="json", include={"model", "train"}),
        files=(
            write_file(storage, prefix, "model.safetensors", weights, model.num_items),
            write_file(storage, prefix, "config.json", config.model_dump_json(indent=1).encode(), 1),
            write_file(storage, prefix, "metrics.json", metrics.model_dump_json(indent=1).encode(), 1),
        ),
        counts={"num_items": model.num_items, "num_parameters": sum(p.numel() for p in model.parameters())}
        | ({"num_unknown_items": len(unknown_rows)} if night.taken_over else {}),
    )


def _lineage(night: Night) -> dict[str, str]:
    """What a model was made of beside the histories."""
    if night.taken_over:
        models = night.taken_over
        source = {"train": models.selected, "before_test": models.measured, "whole": models.served}[night.learned_part]
        return {"carried_from": source.id, "trained_on": night.taken_over.ds.isoformat()}
    if night.has_refit:
        return {"selected": night.selected.id}
    return night.earlier.lineage() if night.earlier else {}


def load_model(storage: Storage, checkpoint: Artifact) -> RetrievalModel:
    """Load the model in evaluation mode, on the CPU. Raises InputError when it is missing or damaged."""
    manifest = require_manifest(storage, checkpoint, "train")
    try:
        config = ModelConfig.model_validate_json(_read(storage, checkpoint, manifest, "config"))
        with torch.device("meta"):  # draws no random weights, which would be replaced
            model = RetrievalModel(config.model, config.num_items)
        model.load_state_dict(load_tensors(_read(storage, checkpoint, manifest, "model")), assign=True)
    except (ValidationError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{storage.uri}/{checkpoint.prefix}: no model can be built from these files ({reason}); {REMEDY}"
        ) from None
    return model.eval().requires_grad_(False)


def load_config(storage: Storage, checkpoint: Artifact) -> ModelConfig:
    """Read what builds the model. Raises InputError when the model is missing or damaged."""
    manifest = require_manifest(storage, checkpoint, "train")
    data = _read(storage, checkpoint, manifest, "config")
    return parse(ModelConfig, data, f"{storage.uri}/{checkpoint.prefix}", REMEDY)


def model_bytes(night: Night) -> int:
    """The size of the weights' file. Raises InputError when the model is not trained yet."""
    manifest = require_manifest(night.storage, night.checkpoint, "train")
    return _entry(night.storage, night.checkpoint, manifest, "model").bytes


def read_metrics(storage: Storage, checkpoint: Artifact) -> TrainingMetrics:
    """Read the metrics of training, of every epoch and of the chosen one. Raises InputError for damaged files."""
    manifest = require_manifest(storage, checkpoint, "train")
    entry = _entry(storage, checkpoint, manifest, "metrics")
    data = read_file(storage, checkpoint.prefix, entry, REMEDY)
    return parse(TrainingMetrics, data, f"{storage.uri}/{checkpoint.key(entry.key)}", REMEDY)


def _read(storage: Storage, checkpoint: Artifact, manifest: Manifest, name: str) -> bytes:
    return read_file(storage, checkpoint.prefix, _entry(storage, checkpoint, manifest, name), REMEDY)


def _entry(storage: Storage, checkpoint: Artifact, manifest: Manifest, name: str) -> FileEntry:
    for entry in manifest.files:
        if entry.key.startswith(f"{name}-"):
            return entry
    raise InputError(f"{storage.uri}/{checkpoint.prefix}: its manifest lists no file {name!r}; {REMEDY}")


def save_state(folder: Path, state: TrainingState) -> None:
    """Write the state of a training run into an existing folder, for `load_state`."""
    tensors = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in state.average.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in state.best_weights.items()}
    tensors |= {f"optimiser.{name}": value for name, value in state.optimiser.tensors()}
    (folder / TENSORS).write_bytes(save_tensors({name: value.cpu().contiguous() for name, value in tensors.items()}))
    reports = [asdict(report) for report in state.history]
    history = {
        "reports": reports,
        "step": state.step,
        "progress": asdict(state.progress),
        "number": state.number,
    }
    (folder / HISTORY).write_text(json.dumps(history))


def load_state(folder: Path, state: TrainingState) -> None:
    """Fill a new state, made with the same settings and number of items, from the files of `save_state`."""
    tensors = load_tensors((folder / TENSORS).read_bytes())
    state.model.load_state_dict(_below(tensors, "model."))
    state.average.load_state_dict(_below(tensors, "average."))
    device = next(state.model.parameters()).device
    state.best_weights = {name: value.to(device) for name, value in _below(tensors, "best.").items()}
    state.optimiser.load(_below(tensors, "optimiser."))
    history = json.loads((folder / HISTORY).read_text())
    state.history[:] = read_history(folder)
    state.step, state.number = history["step"], history["number"]
    state.progress = RoundProgress(**history["progress"])


def read_history(folder: Path) -> list[RoundReport]:
    """Read the reports of the rounds that the saved run has finished."""
    return [RoundReport(**report) for report in json.loads((folder / HISTORY).read_text())["reports"]]


def read_weights(folder: Path, which: Literal["best", "average"]) -> dict[str, Tensor]:
    """Read the averaged weights of the saved run's best round, or of its last step, by parameter name, on the CPU."""
    return _below(load_tensors((folder / TENSORS).read_bytes()), f"{which}.")


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
