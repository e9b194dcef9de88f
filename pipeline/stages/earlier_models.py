"""Tonight's models made from those of an earlier night: as the start of a training, or as they are."""

import logging

import numpy as np
import torch

from pipeline.artifacts import Artifact, Manifest
from pipeline.data.ids import rows_among
from pipeline.data.lists import Int64
from pipeline.errors import InputError
from pipeline.io.artifacts import read_manifest
from pipeline.io.checkpoint import load_model, read_metrics, write_checkpoint
from pipeline.io.earlier import WAY_OUT, Earlier
from pipeline.io.histories import items_claims, read_item_ids
from pipeline.io.night import Night
from pipeline.model.model import RetrievalModel
from pipeline.settings import Settings
from pipeline.stages.content import read_features

log = logging.getLogger("nightrails")


def start_from(model: RetrievalModel, night: Night, earlier: Earlier) -> int:
    """Give a new model of tonight's items the weights of the earlier selected model; returns the number of items that
    this does not know, whose rows stay as they were drawn.

    Raises InputError when the earlier model, or the histories that number its items, were removed.
    """
    rows_N = torch.from_numpy(_earlier_rows(night, earlier, earlier.selected))
    model.copy_from(load_model(night.storage, earlier.selected), rows_N.to(model.device))
    return int((rows_N < 0).sum())


def take_over(night: Night, settings: Settings, earlier: Earlier) -> Manifest:
    """Leave the earlier models as tonight's; returns the manifest of the one that serves.

    Raises InputError as `start_from` does.
    """
    others = [(night.selection, earlier.selected), (night.measurement, earlier.measured)] if night.has_refit else []
    for each, source in others:
        if read_manifest(night.storage, each.checkpoint.prefix) is None:
            _take_over_one(each, settings, earlier, source)
    manifest = _take_over_one(night, settings, earlier, earlier.served)
    log.info(
        "the models of ds=%s do not know %d of %d items; these are shown only where counts speak for them",
        *(earlier.ds, manifest.counts["num_unknown_items"], manifest.counts["num_items"]),
    )
    return manifest


def _take_over_one(night: Night, settings: Settings, earlier: Earlier, source: Artifact) -> Manifest:
    """Leave the model `source` as the night's Checkpoint artifact, with the metrics of its training.

    An item that it does not know gets the mean row of the others: users may have taken it, so the encoder reads it. If
    the model reads content, an item that has features is known by these.
    """
    rows_N = _earlier_rows(night, earlier, source)
    trained = load_model(night.storage, source)
    model = RetrievalModel(settings.model, len(rows_N))
    with torch.no_grad():
        model.item_embedding.weight[:] = trained.item_embedding.weight[:-1].mean(dim=0, dtype=torch.float64)
    model.copy_from(trained, torch.from_numpy(rows_N))
    is_unknown_N = rows_N < 0
    if model.item_embedding.content is not None:
        features = read_features(night, settings)
        is_met_N = trained.item_embedding.is_met[torch.from_numpy(rows_N)] & torch.from_numpy(~is_unknown_N)
        model.item_embedding.describe(features, is_met_N)
        is_unknown_N &= features.lengths == 0
    unknown = np.flatnonzero(is_unknown_N).tolist()
    metrics = read_metrics(night.storage, source).model_copy(update={"num_unknown_items": len(unknown)})
    return write_checkpoint(night, model, settings, metrics, unknown)


def _earlier_rows(night: Night, earlier: Earlier, source: Artifact) -> Int64:
    """(N,): the row of each of tonight's items in an earlier model, -1 for an item that it does not know."""
    storage = night.storage
    manifest = read_manifest(storage, source.prefix)
    if manifest is None:
        raise _removed(night, earlier, source)
    histories = Artifact("histories", manifest.lineage["histories"])
    if items_claims(storage, histories).read(0) is None:
        raise _removed(night, earlier, histories)
    return rows_among(read_item_ids(storage, night.histories), read_item_ids(storage, histories))


def _removed(night: Night, earlier: Earlier, artifact: Artifact) -> InputError:
    use = "taken over" if earlier.is_reused else "started from"
    return InputError(
        f"{night.storage.uri}/{artifact.prefix}: removed, but the models of ds={earlier.ds} are to be {use}; restore "
        f"the folder, or {WAY_OUT}"
    )
