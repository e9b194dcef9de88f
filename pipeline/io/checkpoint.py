"""The Checkpoint artifact: weights as safetensors, configuration and metrics as JSON, never a pickle.

The files carry their hash in their names, so that what an interrupted run left behind is never in the way of the next
one. The manifest, written last, says which files are the model.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pipeline.artifacts import Checkpoint, FileEntry, Manifest
from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.io.artifacts import file_entry, now, read_manifest, versions, write_manifest
from pipeline.io.storage.base import ObjectNotFoundError, Storage, put
from pipeline.model.model import RetrievalModel
from pipeline.model.results import TrainingMetrics
from pipeline.model.training import EpochReport, TrainingState
from pipeline.settings import ModelSettings, Settings

TENSORS, HISTORY = "state.safetensors", "history.json"  # of an unfinished training run


class ModelConfig(Config):
    """`config.json`: all that is needed to build the model whose weights lie beside it."""

    model: ModelSettings
    num_items: int


def write_checkpoint(
    storage: Storage,
    checkpoint: Checkpoint,
    model: RetrievalModel,
    settings: Settings,
    metrics: TrainingMetrics,
    lineage: Mapping[str, str],
) -> Manifest:
    """Write weights, configuration and metrics, then the manifest that makes the artifact exist.

    Raises ConflictError when another run wrote this checkpoint meanwhile with other weights.
    """
    config = ModelConfig(model=model.settings, num_items=model.num_items)
    files = {
        "model": (".safetensors", save_tensors({k: v.contiguous().cpu() for k, v in model.state_dict().items()})),
        "config": (".json", config.model_dump_json(indent=1).encode()),
        "metrics": (".json", metrics.model_dump_json(indent=1).encode()),
    }
    entries = []
    for name, (suffix, data) in files.items():
        key = f"{name}-{hashlib.sha256(data).hexdigest()[:16]}{suffix}"
        put(storage, f"{checkpoint.prefix}/{key}", data)
        entries.append(file_entry(key, data, rows=model.num_items if name == "model" else 1))
    manifest = Manifest(
        kind="checkpoint",
        id=checkpoint.id,
        lineage=dict(lineage),
        settings={"model": settings.model.model_dump(mode="json"), "train": settings.train.model_dump(mode="json")},
        files=tuple(entries),
        counts={"num_items": model.num_items, "num_parameters": sum(p.numel() for p in model.parameters())},
        created_at=now(),
        versions=versions(),
    )
    write_manifest(storage, checkpoint.prefix, manifest)
    return manifest


def load_model(storage: Storage, checkpoint: Checkpoint) -> RetrievalModel:
    """The model in evaluation mode, on the CPU. Raises InputError when it is missing or damaged."""
    manifest = _manifest(storage, checkpoint)
    try:
        config = ModelConfig.model_validate_json(_read(storage, checkpoint, manifest, "config"))
        model = RetrievalModel(config.model, config.num_items)
        model.load_state_dict(load_tensors(_read(storage, checkpoint, manifest, "model")))
    except (ValidationError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{storage.uri}/{checkpoint.prefix}: not a model of ours ({reason}); train again") from None
    return model.eval().requires_grad_(False)


def read_metrics(storage: Storage, checkpoint: Checkpoint) -> TrainingMetrics:
    """What training measured: the history by epoch and the figures of the chosen one."""
    data = _read(storage, checkpoint, _manifest(storage, checkpoint), "metrics")
    try:
        return TrainingMetrics.model_validate_json(data)
    except ValidationError as error:
        raise InputError(
            f"{storage.uri}/{checkpoint.prefix}: metrics of another version ({error.error_count()} faults); train again"
        ) from None


def _manifest(storage: Storage, checkpoint: Checkpoint) -> Manifest:
    manifest = read_manifest(storage, checkpoint.prefix)
    if manifest is None:
        raise InputError(f"{storage.uri}/{checkpoint.prefix}: there is no such model; run jobs/train.py first")
    return manifest


def _read(storage: Storage, checkpoint: Checkpoint, manifest: Manifest, name: str) -> bytes:
    """One file of the artifact, checked against the manifest."""
    entry = _entry(manifest, name)
    key = f"{checkpoint.prefix}/{entry.key}"
    try:
        data = storage.read(key)
    except ObjectNotFoundError:
        raise InputError(f"{storage.uri}/{key}: the file is gone, though the manifest names it; train again") from None
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise InputError(f"{storage.uri}/{key}: damaged, its SHA-256 is not that of the manifest; train again")
    return data


def _entry(manifest: Manifest, name: str) -> FileEntry:
    return next(entry for entry in manifest.files if entry.key.startswith(f"{name}-"))


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
