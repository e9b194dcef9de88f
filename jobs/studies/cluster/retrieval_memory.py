"""Peak memory of a search against the number of queries: python -m jobs.studies.cluster.retrieval_memory 10000 100000

Buckets hold 1,000 users whatever their number, on 50,000 items in 4 shards, TopKAvg with a small random model. Each
size runs in a process of its own, with a Ray of its own. Measured every half second over that process and all its
descendants (raylet, workers): RSS, in which a shared page counts for each that maps it; anonymous and shared memory, in
which it counts once and program files do not; the object store alone; and the units that are under way.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

USERS_PER_BUCKET = 1_000
NUM_ITEMS = 50_000


def main() -> None:
    print("  queries  peak RSS MB  anonymous + shared MB  shared MB  units under way  seconds", flush=True)
    for size in sys.argv[1:]:
        subprocess.run([sys.executable, "-m", "jobs.studies.cluster.retrieval_memory", "--one", size], check=True)


def measure(num_queries: int) -> None:
    from pipeline.distributed import search
    from pipeline.distributed.cluster import connect
    from pipeline.stages import search as stages
    from tests.distributed.worlds import make_world, run_search

    with tempfile.TemporaryDirectory() as folder:
        world = make_world(
            Path(folder) / "root",
            num_users=num_queries,
            num_items=NUM_ITEMS,
            overrides=[
                f"output.num_buckets={num_queries // USERS_PER_BUCKET}",
                "corpus.num_shards=4",
                "model.mol.num_query_components=2",
                "model.mol.component_dim=16",
                "search.k=100",
                "search.method=topk_avg",
                "search.num_preselected=200",
                "search.query_tile=256",
                "search.item_tile=4096",
                *sys.argv[3:],
            ],
        )
        marks = Path(folder) / "marks"
        marks.mkdir()

        class MarkedEncoder(stages.QueryEncoder):
            def __call__(self, unit, payload):
                result = super().__call__(unit, payload)
                (marks / f"begun-{unit}").touch()
                return result

        search.QueryEncoder = MarkedEncoder
        connect(world.settings)
        peaks = np.zeros(4)
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.5):
                begun = len(list(marks.iterdir()))
                done = len(list((Path(folder) / "root").glob("candidates/**/unit-*.json")))
                np.maximum(peaks, [*tree_memory(), begun - done], out=peaks)

        watcher = threading.Thread(target=watch)
        watcher.start()
        started = time.monotonic()
        run_search(world)
        seconds = time.monotonic() - started
        over.set()
        watcher.join()
        rss, ours, shared = peaks[:3] / 1e6
        print(
            f"{num_queries:>9} {rss:>12.0f} {ours:>22.0f} {shared:>10.0f} {peaks[3]:>16.0f} {seconds:>8.1f}", flush=True
        )


def tree_memory() -> tuple[int, int, int]:
    """Bytes of this process and all its descendants: RSS, anonymous and shared memory, shared memory."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    family, grown = {os.getpid()}, True
    while grown:
        children = {pid for pid, parent in parents.items() if parent in family} - family
        family |= children
        grown = bool(children)
    rss = anonymous = shared = 0
    for pid in family:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
        rss += sizes["Rss"]
        anonymous += sizes["Pss_Anon"]
        shared += sizes["Pss_Shmem"]
    return rss, anonymous + shared, shared


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        measure(int(sys.argv[2]))
    else:
        main()
