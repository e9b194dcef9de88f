"""Embedding the items into a Corpus: one unit of work per shard, on as many actors as the cluster holds."""

from collections.abc import Sequence

from pipeline.artifacts import Manifest, Night
from pipeline.distributed.backends import check_backends
from pipeline.distributed.chain import Stage, run_chain
from pipeline.distributed.cluster import ActorNeed, Cluster, connect, deadline, preflight
from pipeline.io.artifacts import read_manifest
from pipeline.io.corpus import done_shards, low_rank_entry, write_corpus_manifest
from pipeline.io.storage.base import Storage
from pipeline.settings import ClusterSettings, Settings
from pipeline.stages.embed import ShardEmbedder
from pipeline.stages.low_rank import LowRankFitter

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
    check_backends(cluster, settings)
    with deadline(settings.cluster.deadline_minutes):
        run_chain(what, units, [stage], settings.cluster.threads_per_actor)


def _num_embedders(cluster: Cluster, settings: ClusterSettings) -> int:
    if settings.gpus_per_actor:
        return max(1, int(cluster.num_gpus / settings.gpus_per_actor))
    cpus = max(settings.cpus_per_actor, settings.threads_per_actor)
    return max(1, min(int(cluster.num_cpus / cpus) - 1, MAX_EMBEDDERS_PER_NODE * len(cluster.nodes)))
