"""Choosing how to search tonight's model: the cheapest way that reaches a recall, measured on one shard.

How well each algorithm does depends on the model, so nothing is assumed: exact search is the judge, on a seeded sample
of queries with their own exclusions. B queries, K wanted, M candidates.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pipeline.data.lists import NO_ITEM, Lists
from pipeline.evaluation.metrics import MeanSum, overlap_at_k
from pipeline.model.mol import QuerySide
from pipeline.retrieval.index import ShardIndex
from pipeline.retrieval.search import search_shard
from pipeline.retrieval.stage1 import QueryMap
from pipeline.settings import SearchMethod, SearchSettings, TableDtype

# K' begins at so many times k. It grows until the recall is reached, or the method costs more than the best so far.
START, STEP = 1.25, math.sqrt(2)
# A method whose candidates exceed this share of the shard is no shortcut.
MAX_SHARE = 0.25
# Timed until so many seconds or runs have passed.
TIMING_SECONDS, TIMING_RUNS = 0.5, 5
JUDGE_SHARE = 0.5  # of the time: what exact search may take


@dataclass(frozen=True)
class Trial:
    """One way to search and what it did. Recall is the mean over the queries, `recall_low` its 95 % lower bound."""

    method: SearchMethod
    num_preselected: int
    num_per_embd: int
    table_dtype: TableDtype
    recall: float
    recall_low: float
    milliseconds_per_query: float

    @property
    def settings(self) -> dict[str, object]:
        """What of `SearchSettings` this is."""
        names = ("method", "num_preselected", "num_per_embd", "table_dtype")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Tuning:
    """What was chosen, against which target, and everything that was tried."""

    chosen: Trial
    target_recall: float
    k: int  # of a list: all of its items may be in this shard
    num_queries: int
    num_items: int
    exact_milliseconds_per_query: float
    trials: tuple[Trial, ...]

    @property
    def reason(self) -> str:
        """In a sentence."""
        found = f"recall@{self.k} {self.chosen.recall:.4f} (at least {self.chosen.recall_low:.4f})"
        cost = f"{self.chosen.milliseconds_per_query:.2f} ms a query, exact {self.exact_milliseconds_per_query:.2f}"
        if self.chosen.method == "exact":
            return f"nothing that was tried reaches recall {self.target_recall} for less than exact search ({cost})"
        return f"{found} on {self.num_queries} queries, the cheapest of {len(self.trials)} trials ({cost})"


def tune(
    open_with: Callable[[TableDtype], ShardIndex],
    queries: QuerySide,
    excluded: Lists,
    settings: SearchSettings,
    query_map: QueryMap | None,
    max_seconds: float,
) -> Tuning:
    """Try every algorithm on one shard and choose the fastest whose recall@k is at least `settings.target_recall`.

    The recall's lower bound must reach the target. Ends soon after `max_seconds`; then what was tried decides. When
    exact search is too slow for the time, fewer queries judge. What is chosen is tried again with narrower tables, in
    an index that `open_with` makes; there is never more than one.
    """
    started = time.monotonic()
    index = open_with(settings.table_dtype)
    num_items, num_pairs, dtypes = len(index), queries.gate_BP.shape[1], index.table_dtypes
    queries, excluded, truth_BK, exact = _judge(index, queries, excluded, settings, query_map, max_seconds)
    trials: list[Trial] = [exact]

    def try_each(configs: Iterable[SearchSettings]) -> None:
        """Until the target is reached, or it costs more than what reaches it."""
        for config in configs:
            if time.monotonic() - started > max_seconds:
                return
            trial = _try(index, queries, excluded, config, query_map, truth_BK)
            trials.append(trial)
            too_slow = trial.milliseconds_per_query > _best(trials, settings.target_recall).milliseconds_per_query
            if too_slow or trial.recall_low >= settings.target_recall:
                return

    methods: tuple[SearchMethod, ...] = ("topk_low_rank", "topk_avg", "comb_topk", "topk_per_embd")
    for method in methods:
        if method != "topk_low_rank" or query_map is not None:
            try_each(_grid(method, settings, num_items, num_pairs))
    wide = _best(trials, settings.target_recall)
    if wide.method in ("topk_low_rank", "topk_avg"):
        for dtype in dtypes[dtypes.index(settings.table_dtype) + 1 :] if settings.table_dtype in dtypes else ():
            del index
            index = open_with(dtype)
            narrow = settings.model_copy(update={"table_dtype": dtype})
            grid = _grid(wide.method, narrow, num_items, num_pairs)
            try_each(config for config in grid if config.num_preselected >= wide.num_preselected)
    chosen = _best(trials, settings.target_recall)
    return Tuning(
        chosen,
        settings.target_recall,
        settings.k,
        len(excluded),
        num_items,
        exact.milliseconds_per_query,
        tuple(trials),
    )


def _best(trials: Sequence[Trial], target: float) -> Trial:
    good = [trial for trial in trials if trial.recall_low >= target]
    return min(good, key=lambda trial: trial.milliseconds_per_query)


def _judge(
    index: ShardIndex,
    queries: QuerySide,
    excluded: Lists,
    settings: SearchSettings,
    query_map: QueryMap | None,
    max_seconds: float,
) -> tuple[QuerySide, Lists, Tensor, Trial]:
    """The queries that there is time for, with their exact lists."""
    exact = settings.model_copy(update={"method": "exact"})
    few = min(8, len(excluded))
    seconds = _seconds(index, queries.take(slice(0, few)), excluded.narrow(0, few), exact, query_map) / few
    num_queries = min(len(excluded), max(few, int(JUDGE_SHARE * max_seconds / seconds)))
    queries, excluded = queries.take(slice(0, num_queries)), excluded.narrow(0, num_queries)
    begun = time.monotonic()
    truth = search_shard(index, queries, excluded, exact, query_map=query_map)
    milliseconds = 1e3 * (time.monotonic() - begun) / num_queries
    trial = Trial(
        "exact", settings.num_preselected, settings.num_per_embd, settings.table_dtype, 1.0, 1.0, milliseconds
    )
    return queries, excluded, truth.rows_BK, trial


def _grid(method: SearchMethod, settings: SearchSettings, num_items: int, num_pairs: int) -> Iterator[SearchSettings]:
    """Ever more candidates, up to a share of the shard."""
    most = max(settings.k, int(MAX_SHARE * num_items))
    fixed = {"method": method, "max_escalated": 0}
    if method in ("topk_avg", "topk_low_rank"):
        num_kept = START * settings.k
        while num_kept <= most:
            yield settings.model_copy(update=fixed | {"num_preselected": int(num_kept)})
            num_kept *= STEP
        return
    per_embd = float(settings.k) if method == "topk_per_embd" else settings.k / 4
    while per_embd * num_pairs <= 4 * most:  # the lists overlap
        num_kept = min(num_items, max(settings.k, int(10 * per_embd)))
        yield settings.model_copy(update=fixed | {"num_per_embd": max(1, int(per_embd)), "num_preselected": num_kept})
        per_embd *= STEP


def _try(
    index: ShardIndex,
    queries: QuerySide,
    excluded: Lists,
    config: SearchSettings,
    query_map: QueryMap | None,
    truth_BK: Tensor,
) -> Trial:
    found = search_shard(index, queries, excluded, config, query_map=query_map)
    recall = MeanSum.of(overlap_at_k(found.rows_BK.cpu().numpy(), truth_BK.cpu().numpy(), config.k))
    # A perfect score on a few queries is no proof: then the rule of three bounds what can have been missed.
    is_perfect = recall.mean == 1
    low = 1 - 3 / max(1, int((truth_BK != NO_ITEM).sum())) if is_perfect else recall.normal_interval()[0]
    seconds = _seconds(index, queries, excluded, config, query_map)
    return Trial(
        config.method,
        config.num_preselected,
        config.num_per_embd,
        config.table_dtype,
        recall.mean,
        low,
        1e3 * seconds / recall.count,
    )


def _seconds(
    index: ShardIndex, queries: QuerySide, excluded: Lists, config: SearchSettings, query_map: QueryMap | None
) -> float:
    """Median time of a search of all queries."""
    times: list[float] = []
    while len(times) < TIMING_RUNS and sum(times) < TIMING_SECONDS:
        begun = time.monotonic()
        search_shard(index, queries, excluded, config, query_map=query_map)
        times.append(time.monotonic() - begun)
    return float(np.median(times))
