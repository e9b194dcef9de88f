"""Embedding the items into a Corpus; a unit of work is one shard."""

from dataclasses import replace
from functools import cached_property

import pyarrow as pa
import torch

from pipeline.artifacts import Manifest
from pipeline.errors import InputError, MismatchError
from pipeline.io.artifacts import read_manifest
from pipeline.io.checkpoint import load_model, model_bytes
from pipeline.io.corpus import low_rank_claims, read_low_rank, seal_corpus, shard_claims, write_shard
from pipeline.io.histories import read_item_ids
from pipeline.io.night import Night
from pipeline.model.model import RetrievalModel
from pipeline.retrieval.backends import open_index
from pipeline.retrieval.low_rank import low_rank_table
from pipeline.retrieval.shard import Shard, embed_rows, make_shard, shard_bounds
from pipeline.settings import Settings
from pipeline.stages.devices import device_for, memory_to_hold
from pipeline.stages.low_rank import LowRankFitter
from pipeline.stages.runner import Actors, Payload, Runner, Stage


def embed_corpus(runner: Runner, night: Night, settings: Settings) -> Manifest:
    """Make the shards that do not exist yet and return the manifest of the Corpus artifact.

    Raises InputError when there is no item, too few users for a low-rank table, or an embedding that is not finite;
    MismatchError when the model was trained on other items; and the errors of `Runner.run_chain`.
    """
    existing = read_manifest(night.storage, night.corpus.prefix)
    if existing is not None:
        return existing
    arguments = {"night": night, "settings": settings}
    gpus, memory = settings.cluster.gpus_per_actor, memory_to_hold(model_bytes(night))
    if settings.has_low_rank and low_rank_claims(night.storage, night.corpus).read(0) is None:
        fitter = Stage(LowRankFitter, arguments, Actors.ONE, gpus=gpus, memory=memory, searches=True)
        runner.run_chain("fit the low-rank table", [0], [fitter])
    shards = shard_claims(night.storage, night.corpus)
    missing = shards.missing(range(settings.corpus.num_shards))
    if missing:
        embedder = Stage(ShardEmbedder, arguments, Actors.AS_MANY_AS_FIT, gpus=gpus, memory=memory, searches=True)
        runner.run_chain("embed shards", missing, [embedder])
    return seal_corpus(night, settings, shards.done())


class ShardEmbedder:
    """Holds the model; embeds, checks and writes one shard per call."""

    def __init__(self, night: Night, settings: Settings) -> None:
        self._night, self._settings = night, settings
        self._device = device_for(settings.cluster.gpus_per_actor)
        self._model = load_model(night.storage, night.checkpoint).to(self._device)
        fit = read_low_rank(night.storage, night.corpus)
        self._low_rank = fit.low_rank.to(self._device) if fit else None
        if self._model.num_items != len(self._item_ids):
            raise MismatchError(
                f"model {night.checkpoint.id} knows {self._model.num_items} items, but histories "
                f"{night.histories.id} have {len(self._item_ids)}; train on these histories"
            )
        if not len(self._item_ids):
            raise InputError(f"histories {night.histories.id} have no item; there is nothing to search")

    @cached_property
    def _item_ids(self) -> pa.Array:
        return read_item_ids(self._night.storage, self._night.histories)

    def __call__(self, unit: int, payload: Payload) -> Payload:
        """Make shard number `unit`; the payload passes through."""
        low, high = shard_bounds(len(self._item_ids), self._settings.corpus.num_shards)[unit]
        shard = embed_items(self._model, low, high)
        if self._low_rank is not None:
            index = open_index(self._model.mol, shard, self._settings.search)
            shard = replace(shard, low_rank_NR=low_rank_table(index, self._low_rank))
        write_shard(self._night.storage, self._night.corpus, unit, shard, self._item_ids.slice(low, high - low))
        return payload


def embed_items(model: RetrievalModel, low: int, high: int) -> Shard:
    """The shard of item rows `low` to `high` (exclusive)."""
    return make_shard(low, embed_rows(model, torch.arange(low, high, device=model.device)))
