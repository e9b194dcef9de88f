"""What Ray costs a search: python -m jobs.studies.cluster.ray_cost 200000 100000

The same queries against the same corpus, with the same kernels on as many threads in all: once through the job's own
chain on Ray, once by a plain loop over the units (its stages called one after the other, each on all threads), and the
kernel alone. Random weights at the sizes of the paper's Books model (8 × 8 × 32, gates of 128), TopKAvg.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

USERS_PER_BUCKET = 4_000
THREADS = 2


def main() -> None:
    num_queries, num_items = (int(argument) for argument in sys.argv[1:3])
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), num_queries, num_items, sys.argv[3:])


def measure(folder: Path, num_queries: int, num_items: int, overrides: list[str]) -> None:
    from pipeline.distributed.cluster import connect
    from pipeline.distributed.embed import embed_corpus
    from pipeline.distributed.search import search_units
    from pipeline.io.corpus import open_corpus, shard_entries
    from pipeline.stages.candidates import CandidateSink
    from pipeline.stages.queries import TonightsUsers
    from pipeline.stages.search import QueryEncoder, ShardSearcher, Writer
    from tests.distributed.worlds import make_world

    num_buckets = max(1, num_queries // USERS_PER_BUCKET)
    model = {"num_query_components": 8, "num_item_components": 8, "component_dim": 32, "gate_hidden_dim": 128}
    world = make_world(
        folder / "root",
        num_users=num_queries,
        num_items=num_items,
        overrides=[
            *(f"model.mol.{name}={value}" for name, value in model.items()),
            f"output.num_buckets={num_buckets}",
            "corpus.num_shards=1",
            f"cluster.replicas={THREADS}",
            "search.k=100",
            "search.method=topk_avg",
            "search.num_preselected=1000",
            *overrides,
        ],
    )
    connect(world.settings)
    embed_corpus(world.storage, world.night, world.settings)
    (entry,) = shard_entries(open_corpus(world.storage, world.night.corpus))
    common = {"storage_uri": world.storage.uri, "night": world.night, "settings": world.settings}

    begun = time.monotonic()
    scratch = f"{world.night.run.prefix}/_wave"
    search_units(
        world.storage.uri, world.night, world.settings, range(num_buckets), TonightsUsers, CandidateSink, scratch
    )
    on_ray = time.monotonic() - begun

    torch.set_num_threads(THREADS)
    encoder = QueryEncoder(**common, source=TonightsUsers, scratch=scratch, num_covered=0)
    searcher, writer = ShardSearcher(**common, entry=entry), Writer(**common, sink=CandidateSink)
    seconds = dict.fromkeys(("encode", "search", "write"), 0.0)
    for info in world.storage.list(world.night.run.prefix):
        world.storage.delete(info.key)
    for unit in range(num_buckets):
        payload = b""
        for name, stage in (("encode", encoder), ("search", searcher), ("write", writer)):
            begun = time.monotonic()
            payload = stage(unit, payload)
            seconds[name] += time.monotonic() - begun
    bare = sum(seconds.values())
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    print(f"{num_queries} queries × {num_items} items, {THREADS} cores")
    print(f"on Ray {on_ray:.1f} s, bare loop {bare:.1f} s ({parts}): {100 * bare / on_ray:.0f} % of the bare loop")


if __name__ == "__main__":
    main()
