"""How the time of a search grows: python -m jobs.studies.search.scaling

One number is changed at a time: items N, queries of one call, k, candidates K', pairs of components P. Models are
untrained and low-rank tables random, so that only times mean anything; the ratio to the row above says how it grows.
"""

import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from jobs.studies.search.market import MarketRecipe
from jobs.studies.search.worlds import synthetic_world
from pipeline.model.mol import QuerySide
from pipeline.retrieval.backends import open_index
from pipeline.retrieval.filters import no_exclusions
from pipeline.retrieval.index import ShardIndex
from pipeline.retrieval.low_rank import DistilledMap, query_features
from pipeline.retrieval.search import search_shard
from pipeline.retrieval.shard import make_shard
from pipeline.settings import MolSettings, SearchSettings

RANK = 64
NUM_ROUNDS = 5
NUM_QUERIES = 1_024
MARKET = MarketRecipe(100_000, (60, 600, 6_000), (0.2, 0.4, 0.4), max_tastes=3)
MOL = MolSettings(num_query_components=8, num_item_components=8, component_dim=32, gate_hidden_dim=128)
BASE = SearchSettings(k=100, method="topk_low_rank", num_preselected=500)
ITEMS = (25_000, 50_000, 100_000, 200_000, 400_000)
CALLS = (1, 4, 16, 64, 256, 1_024, 4_096)
KS = (10, 100, 200, 500)
CANDIDATES = (100, 250, 500, 1_000, 2_000, 4_000)
SHAPES = ((4, 4), (8, 4), (8, 8), (16, 8))


class Subject:
    """An untrained world, laid out, with a random low-rank table."""

    def __init__(self, num_items: int, shape: tuple[int, int]) -> None:
        mol = MOL.model_copy(update={"num_query_components": shape[0], "num_item_components": shape[1]})
        world = synthetic_world(replace(MARKET, num_items=num_items), mol, num_sample=1)
        self.queries = world.queries
        num_features = query_features(world.queries.take(slice(0, 1))).shape[1]
        self.query_map = DistilledMap(torch.zeros(num_features), torch.randn(num_features, RANK) / num_features**0.5)
        self.index: ShardIndex = open_index(
            world.mol, make_shard(0, world.items, torch.randn(num_items, RANK) / RANK**0.5), BASE
        )

    def milliseconds(self, settings: SearchSettings, num_queries: int = NUM_QUERIES) -> float:
        """Median wall time of one query, in calls of so many."""
        queries: QuerySide = self.queries.take(slice(0, num_queries))
        times = []
        for _ in range(NUM_ROUNDS + 1):
            begun = time.perf_counter()
            search_shard(self.index, queries, no_exclusions(num_queries), settings, query_map=self.query_map)
            times.append(time.perf_counter() - begun)
        return 1e3 * sorted(times[1:])[NUM_ROUNDS // 2] / num_queries


def measure() -> Iterator[tuple[str, int, float]]:
    """What was changed, to what, and milliseconds of one query."""
    torch.manual_seed(0)
    exact = BASE.model_copy(update={"method": "exact"})
    base = Subject(MARKET.num_items, (8, 8))
    for number in CALLS:
        yield "queries of one call", number, base.milliseconds(BASE, number)
    for number in KS:
        yield "k", number, base.milliseconds(BASE.model_copy(update={"k": number}))
    for number in CANDIDATES:
        yield "candidates K'", number, base.milliseconds(BASE.model_copy(update={"num_preselected": number}))
    del base
    for number in ITEMS:
        subject = Subject(number, (8, 8))
        yield "items N", number, subject.milliseconds(BASE)
        yield "items N, exact", number, subject.milliseconds(exact, 32)
    for shape in SHAPES:
        subject = Subject(MARKET.num_items, shape)
        yield "pairs P", shape[0] * shape[1], subject.milliseconds(BASE)
        yield "pairs P, exact", shape[0] * shape[1], subject.milliseconds(exact, 32)


def main() -> None:
    """Print one line per number."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    before: dict[str, float] = {}
    for what, number, milliseconds in measure():
        ratio = f"{milliseconds / before[what]:6.2f} ×" if what in before else ""
        before[what] = milliseconds
        print(f"{what:22s} {number:>9,d}  {milliseconds:10.4f} ms a query  {ratio}", flush=True)


if __name__ == "__main__":
    main()
