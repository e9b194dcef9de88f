"""Embedding the items into a Corpus: one unit of work per shard, on as many actors as the cluster holds."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import pyarrow as pa
import torch

from pipeline.artifacts import Manifest, Night
from pipeline.distributed.chain import Stage, device_for, run_chain
from pipeline.distributed.cluster import ActorNeed, Cluster, connect, deadline, preflight
from pipeline.distributed.low_rank import LowRankFitter
from pipeline.errors import InputError, MismatchError
from pipeline.io.checkpoint import load_model
from pipeline.io.corpus import done_shards, low_rank_entry, read_low_rank, write_corpus_manifest, write_shard
from pipeline.io.histories import read_items
from pipeline.io.manifests import read_manifest
from pipeline.io.storage import Storage, open_storage
from pipeline.model.model import RetrievalModel
from pipeline.retrieval.backends import open_index
from pipeline.retrieval.low_rank import low_rank_table
from pipeline.retrieval.shard import Shard, embed_rows, make_shard, shard_bounds
from pipeline.settings import ClusterSettings, Settings

MAX_EMBEDDERS_PER_NODE = 4  # each holds the whole model, the item table included


def embed_corpus(storage: Storage, night: Night, settings: Settings) -> Manifest:
    """Embed the shards that are not there yet, then write the manifest. Raises InputError for an empty catalogue."""
    existing = read_manifest(storage, night.corpus.prefix)
    if existing is not None:
        return existing
    num_shards = settings.corpus.num_shards
    if settings.has_low_rank and low_rank_entry(storage, night.corpus) is None:
        _run_stage("fit the low-rank table", LowRankFitter, [0], storage, night, settings)
    pending = sorted(set(range(num_shards)) - set(done_shards(storage, night.corpus)))
    if pending:
        _run_stage("embed shards", ShardEmbedder, pending, storage, night, settings)
    return write_corpus_manifest(storage, night, settings, done_shards(storage, night.corpus))


def _run_stage(
    what: str,
    function: "type[ShardEmbedder] | type[LowRankFitter]",
    units: Sequence[int],
    storage: Storage,
    night: Night,
    settings: Settings,
) -> None:
    cluster = connect(settings)
    stage = Stage(
        function,
        {"storage_uri": storage.uri, "night": night, "settings": settings},
        num_actors=min(len(units), _num_embedders(cluster, settings.cluster)),
        num_cpus=settings.cluster.cpus_per_actor,
        num_gpus=settings.cluster.gpus_per_actor,
    )
    preflight(cluster, [ActorNeed("embedder", stage.num_actors, stage.num_cpus, stage.num_gpus)])
    with deadline(settings.cluster.deadline_minutes):
        run_chain(what, units, [stage], settings.cluster.threads_per_actor)


def _num_embedders(cluster: Cluster, settings: ClusterSettings) -> int:
    if settings.gpus_per_actor:
        return max(1, int(cluster.num_gpus / settings.gpus_per_actor))
    cpus = max(settings.cpus_per_actor, settings.threads_per_actor)
    return max(1, min(int(cluster.num_cpus / cpus) - 1, MAX_EMBEDDERS_PER_NODE * len(cluster.nodes)))


class ShardEmbedder:
    """Holds the model and makes shards: embeds, checks and writes one per call."""

    def __init__(self, storage_uri: str, night: Night, settings: Settings) -> None:
        self._storage, self._night, self._settings = open_storage(storage_uri), night, settings
        self._device = device_for(settings.cluster)
        self._model = load_model(self._storage, night.checkpoint).to(self._device)
        fit = read_low_rank(self._storage, night.corpus)
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
        return read_items(self._storage, self._night.histories)["item_id"].combine_chunks()

    def __call__(self, unit: int, payload: bytes) -> bytes:
        """Make shard `unit`; nothing comes in or goes out but files."""
        low, high = shard_bounds(len(self._item_ids), self._settings.corpus.num_shards)[unit]
        shard = embed_items(self._model, low, high)
        if self._low_rank is not None:
            index = open_index(self._model.mol, shard, self._settings.search)
            shard = replace(shard, low_rank_NR=low_rank_table(index, self._low_rank))
        write_shard(self._storage, self._night.corpus, unit, shard, self._item_ids.slice(low, high - low))
        return payload


def embed_items(model: RetrievalModel, low: int, high: int) -> Shard:
    """The shard of item rows `low` to `high`."""
    return make_shard(low, embed_rows(model, torch.arange(low, high, device=model.item_embedding.weight.device)))
