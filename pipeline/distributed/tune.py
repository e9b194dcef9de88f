"""Choosing tonight's search: one unit of work, on one shard, with a sample of tonight's users."""

from pipeline.artifacts import Night
from pipeline.distributed.backends import check_backends
from pipeline.distributed.chain import Stage, run_chain
from pipeline.distributed.cluster import ActorNeed, connect, deadline, preflight
from pipeline.io.corpus import open_corpus
from pipeline.io.storage.base import Storage
from pipeline.io.tuning import TuningRecord, read_tuning
from pipeline.settings import Settings
from pipeline.stages.tune import Tuner


def tune_search(storage: Storage, night: Night, settings: Settings) -> TuningRecord:
    """Measure and choose, or take up what was chosen. Raises InputError when there is no corpus."""
    known = read_tuning(storage, night)
    if known is not None:
        return known
    open_corpus(storage, night.corpus)
    cluster, place = connect(settings), settings.cluster
    stage = Stage(
        Tuner,
        {"storage_uri": storage.uri, "night": night, "settings": settings},
        num_actors=1,
        num_cpus=place.cpus_per_actor,
        num_gpus=place.gpus_per_actor,
    )
    preflight(cluster, [ActorNeed("tuner", 1, stage.num_cpus, stage.num_gpus)])
    check_backends(cluster, settings)
    with deadline(place.deadline_minutes):
        run_chain("choose a search", [0], [stage], place.threads_per_actor)
    chosen = read_tuning(storage, night)
    assert chosen is not None
    return chosen
