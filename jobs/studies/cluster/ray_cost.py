"""What Ray costs a search.

The same users are searched twice against the same corpus, with the same kernels on as many threads in all: by the job's
own chain on Ray, and by a plain loop over the units that calls the chain's stages one after the other, each on all
threads. The model has the sizes of the paper's Books model (8 × 8 × 32, gates of 128), and the method is TopKAvg.
"""

import time
from collections.abc import Callable

import torch

from jobs.studies.cluster.nights import CONFIG, night_before
from pipeline.artifacts import Night
from pipeline.config import load_config
from pipeline.distributed.cluster import connect
from pipeline.distributed.search import search_units
from pipeline.io.corpus import open_corpus, shard_entries
from pipeline.io.night import open_night
from pipeline.io.storage.base import Storage
from pipeline.settings import Settings
from pipeline.stages.candidates import CandidateSink
from pipeline.stages.queries import TonightsUsers
from pipeline.stages.search import QueryEncoder, ShardSearcher, Writer

USERS_PER_BUCKET = 4_000
THREADS = 2
EVENTS_PER_USER = 10
OVERRIDES = (
    "model.mol.num_query_components=8",
    "model.mol.num_item_components=8",
    "model.mol.component_dim=32",
    "model.mol.gate_hidden_dim=128",
    "corpus.num_shards=1",
    f"cluster.replicas={THREADS}",
    "search.k=100",
    "search.method=topk_avg",
    "search.num_preselected=1000",
)


def main(num_users: int, num_items: int, overrides: list[str]) -> None:
    """Search both ways and print the seconds."""
    sizes = (
        f"simulate.num_users={num_users}",
        f"simulate.num_items={num_items}",
        f"simulate.num_events={EVENTS_PER_USER * num_users}",
        f"output.num_buckets={max(1, num_users // USERS_PER_BUCKET)}",
    )
    with night_before("retrieve", (*OVERRIDES, *sizes, *overrides)) as given:
        settings = load_config(Settings, CONFIG, given)
        storage, night = open_night(settings, None)
        on_ray = time_on_ray(storage, night, settings)
        for info in storage.list(night.run.prefix):
            storage.delete(info.key)
        seconds = time_bare(storage, night, settings)
    bare = sum(seconds.values())
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    print(f"{num_users} users × {num_items} items, {THREADS} cores")
    print(f"on Ray {on_ray:.1f} s, bare loop {bare:.1f} s ({parts}): {100 * bare / on_ray:.0f} % of the bare loop")


def time_on_ray(storage: Storage, night: Night, settings: Settings) -> float:
    """Seconds of the search by the job's own chain, on a Ray that is already up."""
    connect(settings)
    begun = time.monotonic()
    units = range(settings.output.num_buckets)
    search_units(storage.uri, night, settings, units, TonightsUsers, CandidateSink, f"{night.run.prefix}/_wave")
    return time.monotonic() - begun


def time_bare(storage: Storage, night: Night, settings: Settings) -> dict[str, float]:
    """Seconds of each stage in a loop over the units, without Ray."""
    torch.set_num_threads(THREADS)
    (entry,) = shard_entries(open_corpus(storage, night.corpus))
    scratch = f"{night.run.prefix}/_wave"
    stages: dict[str, Callable[[int, bytes], bytes]] = {
        "encode": QueryEncoder(storage.uri, night, settings, TonightsUsers, scratch, num_covered=0),
        "search": ShardSearcher(storage.uri, night, settings, entry),
        "write": Writer(storage.uri, night, settings, CandidateSink),
    }
    seconds = dict.fromkeys(stages, 0.0)
    for unit in range(settings.output.num_buckets):
        payload = b""
        for name, stage in stages.items():
            begun = time.monotonic()
            payload = stage(unit, payload)
            seconds[name] += time.monotonic() - begun
    return seconds
