"""A bench world made ready to be searched, and the choice of how. B queries, N items, R rank."""

import logging
import time
from dataclasses import dataclass

import torch

from jobs.studies.search.worlds import BenchWorld
from pipeline.retrieval.backends import open_index
from pipeline.retrieval.backends.native.index import NativeIndex
from pipeline.retrieval.backends.torch.index import TorchIndex
from pipeline.retrieval.filters import no_exclusions
from pipeline.retrieval.index import ShardIndex
from pipeline.retrieval.low_rank import DistilledMap, Fit, low_rank_table, pair_multiply_adds, score_all
from pipeline.retrieval.low_rank_fit import fit_low_rank
from pipeline.retrieval.shard import Shard, make_shard
from pipeline.retrieval.tuning import Tuning, tune
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
        """Places a query among the items of the low-rank table."""
        return self.fit.query_map

    def index_with(self, table_dtype: TableDtype) -> ShardIndex:
        """The native index, its tables kept in this type."""
        if table_dtype == SearchSettings().table_dtype:
            return self.native
        return open_index(self.world.mol, self.shard, SearchSettings(table_dtype=table_dtype))


def prepare(world: BenchWorld, ranks: list[int], num_sample: int) -> Prepared:
    """Fit and make the low-rank table, as the nightly job does."""
    settings = SearchSettings()
    begun = time.monotonic()
    sample = world.sample.take(slice(0, num_sample))
    rows = (
        torch.randperm(len(world.items.gate_NP), generator=torch.Generator().manual_seed(0))[:FIT_ITEMS].sort().values
    )
    drawn = open_index(world.mol, make_shard(0, world.items.take(rows)), settings)
    item_share = len(rows) / len(world.items.gate_NP)
    fit = fit_low_rank(sample, score_all(drawn, sample), ranks, item_share, pair_multiply_adds(world.mol))
    fitted = time.monotonic()
    plain = make_shard(0, world.items)
    table_NR = low_rank_table(open_index(world.mol, plain, settings), fit.low_rank)
    shard = make_shard(0, world.items, table_NR)
    made = time.monotonic()
    native = open_index(world.mol, shard, settings)
    if not isinstance(native, NativeIndex):
        log.warning("no native kernels here: both backends are PyTorch")
    portable = TorchIndex(world.mol, shard, settings)
    return Prepared(world, fit, shard, native, portable, fitted - begun, made - fitted)


def choose(prepared: Prepared, k: int, target: float, queries: slice) -> tuple[Tuning, SearchSettings]:
    """The cheapest search at the target recall on these evaluation queries, which should not be timed later."""
    asked = prepared.world.queries.take(queries)
    settings = SearchSettings(k=k, method="tuned", target_recall=target)
    nothing = no_exclusions(len(asked.gate_BP))
    tuning = tune(prepared.index_with, asked, nothing, settings, prepared.query_map, TUNING_SECONDS)
    return tuning, settings.model_copy(update=tuning.chosen.settings)
