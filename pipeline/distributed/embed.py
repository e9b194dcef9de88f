"""Embedding the items into a Corpus: one unit of work per shard, on as many actors as the cluster holds."""

from functools import cached_property

import pyarrow as pa
import torch

from pipeline.artifacts import Manifest, Night
from pipeline.distributed.chain import Stage, device_for, run_chain
from pipeline.distributed.cluster import ActorNeed, Cluster, connect, deadline, preflight
from pipeline.errors import InputError, MismatchError
from pipeline.io.checkpoint import load_model
from pipeline.io.corpus import done_shards, write_corpus_manifest, write_shard
from pipeline.io.histories import read_items
from pipeline.io.manifests import read_manifest
from pipeline.io.storage import Storage, open_storage
from pipeline.model.model import RetrievalModel
from pipeline.model.mol import ItemSide
from pipeline.retrieval.shard import Shard, make_shard, shard_bounds
from pipeline.settings import ClusterSettings, Settings

# Items that are projected at once. Always exactly so many (the last tile is padded): a matrix product of another
# shape may differ in its last bits, and an item's vectors must not depend on how the corpus is cut.
ITEM_TILE = 1_024
MAX_EMBEDDERS_PER_NODE = 4  # each holds the whole model, the item table included


def embed_corpus(storage: Storage, night: Night, settings: Settings) -> Manifest:
    """Embed the shards that are not there yet, then write the manifest. Raises InputError for an empty catalogue."""
    existing = read_manifest(storage, night.corpus.prefix)
    if existing is not None:
        return existing
    num_shards = settings.corpus.num_shards
    pending = sorted(set(range(num_shards)) - set(done_shards(storage, night.corpus)))
    if pending:
        cluster = connect(settings)
        stage = Stage(
            ShardEmbedder,
            {"storage_uri": storage.uri, "night": night, "settings": settings},
            num_actors=min(len(pending), _num_embedders(cluster, settings.cluster)),
            num_cpus=settings.cluster.cpus_per_actor,
            num_gpus=settings.cluster.gpus_per_actor,
        )
        preflight(cluster, [ActorNeed("embedder", stage.num_actors, stage.num_cpus, stage.num_gpus)])
        with deadline(settings.cluster.deadline_minutes):
            run_chain("embed shards", pending, [stage], settings.cluster.threads_per_actor)
    return write_corpus_manifest(storage, night, settings, done_shards(storage, night.corpus))


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
        write_shard(self._storage, self._night.corpus, unit, shard, self._item_ids.slice(low, high - low))
        return payload


@torch.inference_mode()
def embed_items(model: RetrievalModel, low: int, high: int) -> Shard:
    """The shard of item rows `low` to `high`, computed in tiles of one shape."""
    device = model.item_embedding.weight.device
    tiles = []
    for start in range(low, high, ITEM_TILE):
        rows = torch.arange(start, start + ITEM_TILE, device=device).clamp_max(high - 1)
        tiles.append(model.item_side(rows).take(slice(0, min(ITEM_TILE, high - start))))
    if not tiles:  # more shards than items
        tiles = [model.item_side(torch.zeros(1, dtype=torch.int64, device=device)).take(slice(0, 0))]
    components_NXD = torch.cat([tile.components_NXD for tile in tiles])
    return make_shard(low, ItemSide(components_NXD, torch.cat([tile.gate_NP for tile in tiles])))
