"""A bench world made ready to be searched, and the choice of a search. B queries, N items, R rank."""

import logging
import time
from dataclasses import dataclass

import torch

from jobs.studies import searches
from jobs.studies.search.worlds import BenchWorld
from pipeline.data.lists import Lists
from pipeline.model.mol import QuerySide
from pipeline.retrieval.backends import open_index
from pipeline.retrieval.backends.native.index import NativeIndex
from pipeline.retrieval.backends.torch.index import TorchIndex
from pipeline.retrieval.filters import Rules
from pipeline.retrieval.index import ShardIndex
from pipeline.retrieval.low_rank import DistilledMap, Fit, low_rank_table, pair_multiply_adds, score_all
from pipeline.retrieval.low_rank_fit import fit_low_rank
from pipeline.retrieval.shard import Shard, make_shard
from pipeline.retrieval.topk import TopK
from pipeline.retrieval.tuning import SampleQueries, Tuning, tune
from pipeline.settings import SearchSettings, TableDtype

log = logging.getLogger("nightrails")

FIT_ITEMS = 32_768
TUNING_SECONDS = 600


@dataclass(frozen=True)
class Prepared:
    """A world with its low-rank table, laid out for both backends."""

    world: BenchWorld
    fit: Fit
    shard: Shard
    native: ShardIndex
    portable: ShardIndex
    fit_seconds: float
    table_seconds: float

    @property
    def query_map(self) -> DistilledMap:
        """The map from a query to its vector, whose products with the low-rank table follow the scores."""
        return self.fit.query_map

    def index_with(self, table_dtype: TableDtype) -> ShardIndex:
        """The native index with its tables in this type."""
        if table_dtype == SearchSettings().table_dtype:
            return self.native
        return open_index(self.world.mol, self.shard, SearchSettings(table_dtype=table_dtype))

    def search(
        self, index: ShardIndex, queries: QuerySide, settings: SearchSettings, excluded: Lists | None = None
    ) -> TopK:
        """Search one of the indices; without `excluded` every item may be found."""
        return searches.search(index, queries, settings, self.query_map, excluded)


def prepare(world: BenchWorld, ranks: list[int], num_sample: int) -> Prepared:
    """Fit and make the low-rank table, as the nightly job does."""
    settings = SearchSettings()
    num_items = len(world.items.gate_NP)
    begun = time.monotonic()
    sample = world.sample.take(slice(0, num_sample))
    drawn_rows = torch.randperm(num_items, generator=torch.Generator().manual_seed(0))[:FIT_ITEMS].sort().values
    drawn = searches.lay_out(world.mol, world.items.take(drawn_rows))
    item_share = len(drawn) / num_items
    fit = fit_low_rank(sample, score_all(drawn, sample), ranks, item_share, pair_multiply_adds(world.mol))
    fitted = time.monotonic()
    table_NR = low_rank_table(searches.lay_out(world.mol, world.items), fit.low_rank)
    shard = make_shard(0, world.items, table_NR)
    made = time.monotonic()
    native = open_index(world.mol, shard, settings)
    if not isinstance(native, NativeIndex):
        log.warning("no native kernels here: both backends are PyTorch")
    portable = TorchIndex(world.mol, shard)
    return Prepared(world, fit, shard, native, portable, fitted - begun, made - fitted)


def choose(prepared: Prepared, k: int, target: float, queries: slice) -> tuple[Tuning, SearchSettings]:
    """Tune on these evaluation queries, which should not be timed later: the cheapest search at the target recall."""
    asked = prepared.world.queries.take(queries)
    settings = SearchSettings(k=k, method="tuned", target_recall=target)
    sample = SampleQueries(asked, Rules(Lists.empty(len(asked.gate_BP))), prepared.query_map)
    tuning = tune(prepared.index_with, sample, settings, TUNING_SECONDS)
    return tuning, settings.model_copy(update=tuning.chosen.settings)
