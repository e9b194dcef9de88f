"""The cost of Ray for a search.

The same users are searched twice against the same corpus, by the same stages with as many threads in all: on Ray with
one replica per thread, and unit by unit in this process. Both times include loading the model and the items, but not
the start of Ray itself. The model has the sizes of the paper's Books model (8 × 8 × 32, gates of 128); the method is
TopKAvg.
"""

import time

from jobs.studies.cluster.nights import CONFIG, night_before
from pipeline.command import open_runner
from pipeline.config import load_config
from pipeline.io.night import Night, open_night
from pipeline.settings import Settings
from pipeline.stages.candidates import CandidateSink
from pipeline.stages.lists import search_units
from pipeline.stages.queries import TonightsUsers
from pipeline.stages.search import Search

USERS_PER_BUCKET = 4_000
THREADS = 2
EVENTS_PER_USER = 10
OVERRIDES = (
    "model.mol.num_query_components=8",
    "model.mol.num_item_components=8",
    "model.mol.component_dim=32",
    "model.mol.gate_hidden_dim=128",
    "corpus.num_shards=1",
    "search.k=100",
    "search.method=topk_avg",
    "search.num_preselected=1000",
)
ON_RAY = ("cluster.mode=ray", f"cluster.replicas={THREADS}")
IN_THIS_PROCESS = ("cluster.mode=local", f"cluster.threads_per_actor={THREADS}")


def main(num_users: int, num_items: int, overrides: list[str]) -> None:
    """Search both ways and print the seconds."""
    sizes = (
        f"simulate.num_users={num_users}",
        f"simulate.num_items={num_items}",
        f"simulate.num_events={EVENTS_PER_USER * num_users}",
        f"output.num_buckets={max(1, num_users // USERS_PER_BUCKET)}",
    )
    with night_before("retrieve", (*OVERRIDES, *sizes, *overrides)) as given:
        night = open_night(load_config(Settings, CONFIG, given))
        on_ray, local = (
            time_search(night, load_config(Settings, CONFIG, (*given, *mode))) for mode in (ON_RAY, IN_THIS_PROCESS)
        )
    print(f"{num_users} users × {num_items} items, {THREADS} threads")
    print(
        f"on Ray {on_ray:.1f} s, in this process {local:.1f} s: Ray reaches {100 * local / on_ray:.0f} % of its speed"
    )


def time_search(night: Night, settings: Settings) -> float:
    """Seconds of the search of all units; leaves nothing behind."""
    runner = open_runner(settings)
    num_units = settings.output.num_buckets
    users = TonightsUsers.of(night, num_units)
    search = Search(night, settings, users, f"{night.run.prefix}/_wave")
    begun = time.monotonic()
    search_units(runner, search, range(num_units), CandidateSink)
    seconds = time.monotonic() - begun
    for info in night.storage.list(night.run.prefix):
        night.storage.delete(info.key)
    return seconds
