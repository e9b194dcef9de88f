"""The growth of a search's time with its sizes.

One number is changed at a time: items N, queries of one call, k, candidates K', pairs of components P. Models are
untrained and low-rank tables random, so that only times mean anything; the ratio to the row above says how they grow.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from jobs.studies.search.market import MarketRecipe
from jobs.studies.search.worlds import synthetic_world
from jobs.studies.searches import lay_out, search
from jobs.studies.timing import median_seconds
from pipeline.model.mol import QuerySide
from pipeline.retrieval.index import ShardIndex
from pipeline.retrieval.low_rank import DistilledMap, query_features
from pipeline.settings import MolSettings, SearchSettings

RANK = 64
NUM_QUERIES, NUM_QUERIES_EXACT = 1_024, 32
MARKET = MarketRecipe(100_000, (60, 600, 6_000), (0.2, 0.4, 0.4), max_tastes=3)
MOL = MolSettings(num_query_components=8, num_item_components=8, component_dim=32, gate_hidden_dim=128)
BASE = SearchSettings(k=100, method="topk_low_rank", num_preselected=500)
EXACT = BASE.model_copy(update={"method": "exact"})
CALLS = (1, 4, 16, 64, 256, 1_024, 4_096)
KS = (10, 100, 200, 500)
CANDIDATES = (100, 250, 500, 1_000, 2_000, 4_000)
SHAPES = ((4, 4), (8, 4), (8, 8), (16, 8))


@dataclass(frozen=True)
class Growth:
    """One measurement: the number that was changed, its value, and milliseconds of one query."""

    changed: str
    value: int
    milliseconds: float


@dataclass(frozen=True)
class Subject:
    """An untrained world, laid out, with a random low-rank table."""

    queries: QuerySide
    query_map: DistilledMap
    index: ShardIndex

    def growth(self, changed: str, value: int, settings: SearchSettings, num_queries: int) -> Growth:
        """Time one query in calls of `num_queries`."""
        queries = self.queries.take(slice(0, num_queries))
        seconds = median_seconds(lambda: search(self.index, queries, settings, self.query_map))
        return Growth(changed, value, 1e3 * seconds / num_queries)


def make_subject(num_items: int, num_query_components: int = 8, num_item_components: int = 8) -> Subject:
    """Draw a world of this size and lay it out."""
    update = {"num_query_components": num_query_components, "num_item_components": num_item_components}
    world = synthetic_world(replace(MARKET, num_items=num_items), MOL.model_copy(update=update), num_sample=1)
    num_features = query_features(world.queries.take(slice(0, 1))).shape[1]
    query_map = DistilledMap(torch.zeros(num_features), torch.randn(num_features, RANK) / num_features**0.5)
    index = lay_out(world.mol, world.items, torch.randn(num_items, RANK) / RANK**0.5)
    return Subject(world.queries, query_map, index)


def measure(nums_items: Sequence[int]) -> Iterator[Growth]:
    """Change one number after the other; N is the middle one of `nums_items` unless it is the one that changes."""
    torch.manual_seed(0)
    middle = sorted(nums_items)[len(nums_items) // 2]
    base = make_subject(middle)
    for value in CALLS:
        yield base.growth("queries of one call", value, BASE, value)
    for value in KS:
        yield base.growth("k", value, BASE.model_copy(update={"k": value}), NUM_QUERIES)
    for value in CANDIDATES:
        yield base.growth("candidates K'", value, BASE.model_copy(update={"num_preselected": value}), NUM_QUERIES)
    for shape in SHAPES:
        subject = make_subject(middle, *shape)
        yield subject.growth("pairs P", shape[0] * shape[1], BASE, NUM_QUERIES)
        yield subject.growth("pairs P, exact", shape[0] * shape[1], EXACT, NUM_QUERIES_EXACT)
    for value in nums_items:
        subject = make_subject(value)
        yield subject.growth("items N", value, BASE, NUM_QUERIES)
        yield subject.growth("items N, exact", value, EXACT, NUM_QUERIES_EXACT)


def main(num_items: list[int]) -> None:
    """Print one line per measurement."""
    before: dict[str, float] = {}
    for growth in measure(num_items):
        earlier = before.get(growth.changed)
        ratio = f"{growth.milliseconds / earlier:6.2f} ×" if earlier else ""
        before[growth.changed] = growth.milliseconds
        line = f"{growth.changed:22s} {growth.value:>9,d}  {growth.milliseconds:10.4f} ms a query  {ratio}"
        print(line, flush=True)
