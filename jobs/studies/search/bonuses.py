"""The cost of bonuses in a search: CPU milliseconds of one query with none, with 200 and with 1,000.

The items are cut into shards, and every query goes through all of them. The approximate search is the one that tuning
chooses on the first shard. A query's bonuses are for items drawn from those with the best mean logits, as a memory of
similar items would choose. B queries, N items, M candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from jobs.studies.search.prepared import Prepared, prepare
from jobs.studies.search.worlds import WorldName, load_bench_world
from jobs.studies.searches import preselect
from jobs.studies.timing import time_interleaved
from pipeline.data.lists import Lists
from pipeline.model.mol import QuerySide
from pipeline.retrieval.backends import open_index
from pipeline.retrieval.bonuses import Bonuses
from pipeline.retrieval.filters import Rules
from pipeline.retrieval.index import ShardIndex
from pipeline.retrieval.search import search_shard
from pipeline.retrieval.shard import Shard, make_shard, shard_bounds
from pipeline.retrieval.topk import TopK
from pipeline.retrieval.tuning import SampleQueries, Tuning, tune
from pipeline.settings import SearchSettings, TableDtype

NUM_SHARDS = 4
NUM_JUDGES, NUM_TIMED = 100, 64
AMONG = 5  # a query's bonuses are drawn from this many times as many items
LARGEST = 2.0  # the largest bonus
TUNING_SECONDS = 60


@dataclass(frozen=True)
class Cut:
    """A prepared world cut into shards."""

    prepared: Prepared
    shards: tuple[Shard, ...]

    @staticmethod
    def of(prepared: Prepared) -> "Cut":
        items, table_NR = prepared.shard.items, prepared.shard.low_rank_NR
        parts = [slice(low, high) for low, high in shard_bounds(len(prepared.shard), NUM_SHARDS)]
        return Cut(prepared, tuple(make_shard(part.start, items.take(part), table_NR[part]) for part in parts))

    def open_with(self, table_dtype: TableDtype, shard: Shard) -> ShardIndex:
        """Lay out one of the shards."""
        return open_index(self.prepared.world.mol, shard, SearchSettings(table_dtype=table_dtype))

    def tune(self, k: int, target: float) -> Tuning:
        """Choose a search on the first shard, with queries that are not timed."""
        judges = self.prepared.world.queries.take(slice(NUM_TIMED, NUM_TIMED + NUM_JUDGES))
        sample = SampleQueries(judges, Rules(Lists.empty(len(judges.gate_BP))), self.prepared.query_map)
        settings = SearchSettings(k=k, method="tuned", target_recall=target)
        return tune(partial(self.open_with, shard=self.shards[0]), sample, settings, TUNING_SECONDS)

    def search(self, indices: Sequence[ShardIndex], queries: QuerySide, rules: Rules, settings: SearchSettings) -> TopK:
        """Search all shards, one after the other."""
        found = None
        for index in indices:
            found = search_shard(index, queries, rules, settings, found, self.prepared.query_map)
        assert found is not None
        return found


def draw_bonuses(prepared: Prepared, queries: QuerySide, num_bonuses: int) -> Bonuses:
    """Draw as many items for each query, and a bonus of 0 to `LARGEST` for each item."""
    rng, num_items = np.random.default_rng(0), len(prepared.shard)
    good_BM = preselect(prepared.native, "mean", queries.mean_BD, min(AMONG * num_bonuses, num_items)).at_BM.numpy()
    rows = Lists.of(np.sort(rng.choice(good_M, num_bonuses, replace=False)) for good_M in good_BM)
    return Bonuses(rows, rng.uniform(0, LARGEST, len(rows.values)).astype(np.float32), num_items)


def main(
    world: WorldName, num_items: int | None, ranks: list[int], num_sample: int, threads: int, k: int, target: float
) -> None:
    """Print one line for each search and number of bonuses."""
    torch.set_num_threads(threads)
    prepared = prepare(load_bench_world(world, num_items), ranks, num_sample)
    cut = Cut.of(prepared)
    tuning = cut.tune(k, target)
    print(f"{len(prepared.shard):,d} items in {NUM_SHARDS} shards, k {k}; {tuning.chosen.settings}: {tuning.reason}")
    asked = prepared.world.queries.take(slice(0, NUM_TIMED))
    excluded = prepared.world.exclusions.narrow(0, NUM_TIMED)
    drawn = {number: draw_bonuses(prepared, asked, number) if number else None for number in (0, 200, 1_000)}
    for name, chosen in (("exact", {"method": "exact"}), (tuning.chosen.method, tuning.chosen.settings)):
        settings = SearchSettings(k=k).model_copy(update=chosen)
        indices = [cut.open_with(settings.table_dtype, shard) for shard in cut.shards]
        contenders = {
            f"{name}, {number:5,d} bonuses": partial(
                cut.search, indices, asked, Rules(excluded, bonuses=bonuses), settings
            )
            for number, bonuses in drawn.items()
        }
        timings = time_interleaved(contenders)
        without = next(iter(timings.values())).median_cpu
        for contender, timing in timings.items():
            milliseconds, extra = (1e3 * each / NUM_TIMED for each in (timing.median_cpu, timing.median_cpu - without))
            print(f"{contender:32s} {milliseconds:9.3f} ms a query  {extra:+8.3f}", flush=True)
