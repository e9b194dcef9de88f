"""Choose how to search tonight's model: the cheapest search that reaches a recall, measured on one shard.

How well each algorithm does depends on the model, so nothing is assumed: exact search is the judge, on a seeded sample
of queries with their own exclusions. B queries, K wanted, M candidates.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.lists import NO_ITEM, Int64
from pipeline.evaluation.metrics import MeanSum, overlap_at_k
from pipeline.model.mol import QuerySide
from pipeline.retrieval.filters import Rules
from pipeline.retrieval.index import ShardIndex
from pipeline.retrieval.search import search_shard
from pipeline.retrieval.stage1 import QueryMap
from pipeline.settings import SearchMethod, SearchSettings, TableDtype

METHODS: tuple[SearchMethod, ...] = ("topk_low_rank", "topk_avg", "comb_topk", "topk_per_embd")
# K' begins at START times k and grows by the factor STEP until the recall is reached or a cheaper search is known.
START, STEP = 1.25, math.sqrt(2)
# A method whose candidates exceed this share of the shard is no shortcut.
MAX_SHARE = 0.25
# A search is timed until this many seconds or runs have passed.
TIMING_SECONDS, TIMING_RUNS = 0.5, 5
JUDGE_SHARE = 0.5  # share of the time that exact search may take
MIN_JUDGES = 8  # queries that judge, however little time there is


@dataclass(frozen=True)
class Trial:
    """One search that was tried. Recall is the mean over the queries, `recall_low` its 95 % lower bound."""

    method: SearchMethod
    num_preselected: int
    num_per_embd: int
    table_dtype: TableDtype
    recall: float
    recall_low: float
    milliseconds_per_query: float

    @property
    def settings(self) -> dict[str, object]:
        """The fields of `SearchSettings` that make this search."""
        names = ("method", "num_preselected", "num_per_embd", "table_dtype")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Tuning:
    """The search that was chosen, the target it was chosen for, and everything that was tried."""

    chosen: Trial
    target_recall: float
    k: int  # length of a list; all of its items may be in this one shard
    num_queries: int
    num_items: int
    exact_milliseconds_per_query: float
    trials: tuple[Trial, ...]

    @property
    def reason(self) -> str:
        """Why it was chosen, in a sentence."""
        recall = f"recall@{self.k} {self.chosen.recall:.4f} (at least {self.chosen.recall_low:.4f})"
        cost = f"{self.chosen.milliseconds_per_query:.2f} ms a query, exact {self.exact_milliseconds_per_query:.2f}"
        if self.chosen.method == "exact":
            return f"nothing that was tried reaches recall {self.target_recall} for less than exact search ({cost})"
        return f"{recall} on {self.num_queries} queries, the cheapest of {len(self.trials)} trials ({cost})"


@dataclass(frozen=True)
class SampleQueries:
    """Queries to try searches with, their rules and their query map."""

    queries: QuerySide
    rules: Rules
    query_map: QueryMap | None  # None: the shard has no low-rank table

    def __len__(self) -> int:
        return len(self.rules)

    def first(self, num_queries: int) -> "SampleQueries":
        """Keep the first queries only."""
        queries = self.queries.take(slice(0, num_queries))
        return SampleQueries(queries, self.rules.take(np.arange(num_queries)), self.query_map)

    def search(self, index: ShardIndex, settings: SearchSettings) -> Int64:
        """Search for all queries; returns (B, K) item rows."""
        result = search_shard(index, self.queries, self.rules, settings, query_map=self.query_map)
        rows_BK: Int64 = result.rows_BK.cpu().numpy()
        return rows_BK

    def seconds(self, index: ShardIndex, settings: SearchSettings) -> float:
        """Median seconds of a search for all queries."""
        times: list[float] = []
        while len(times) < TIMING_RUNS and sum(times) < TIMING_SECONDS:
            begun = time.monotonic()
            self.search(index, settings)
            times.append(time.monotonic() - begun)
        return float(np.median(times))


@dataclass(frozen=True)
class Judge:
    """Sample queries with their exact lists, which every trial is compared with."""

    sample: SampleQueries
    truth_BK: Int64
    exact: Trial

    def trial(self, index: ShardIndex, settings: SearchSettings) -> Trial:
        """Search with these settings; note recall and time."""
        recall = MeanSum.of(overlap_at_k(self.sample.search(index, settings), self.truth_BK, settings.k))
        # Recall 1 on a few queries is no proof: the rule of three then gives the lower bound.
        num_true = max(1, int((self.truth_BK != NO_ITEM).sum()))
        low = 1 - 3 / num_true if recall.mean == 1 else recall.normal_interval()[0]
        return make_trial(settings, recall.mean, low, self.sample.seconds(index, settings) / recall.count)


def tune(
    open_with: Callable[[TableDtype], ShardIndex],
    sample: SampleQueries,
    settings: SearchSettings,
    max_seconds: float,
) -> Tuning:
    """Try every algorithm on one shard and choose the fastest whose recall@k is at least `settings.target_recall`.

    The recall's lower bound must reach the target. Ends soon after `max_seconds` and chooses among the trials so far.
    When exact search is too slow for the time, fewer queries judge. The choice is tried again with narrower tables, in
    an index that `open_with` makes; there is never more than one index in memory.
    """
    deadline = time.monotonic() + max_seconds
    index = open_with(settings.table_dtype)
    num_items, dtypes = len(index), index.table_dtypes
    judge = appoint_judge(index, sample, settings, max_seconds)
    trials = [judge.exact]
    for method in METHODS:
        if method != "topk_low_rank" or sample.query_map is not None:
            trials += try_in_turn(index, grid(method, settings, sample, num_items), judge, trials, deadline)
    del index
    widest = cheapest(trials, settings.target_recall)
    if widest.method in ("topk_low_rank", "topk_avg") and settings.table_dtype in dtypes:
        for dtype in dtypes[dtypes.index(settings.table_dtype) + 1 :]:
            narrow = settings.model_copy(update={"table_dtype": dtype})
            enough = (
                config
                for config in grid(widest.method, narrow, sample, num_items)
                if config.num_preselected >= widest.num_preselected
            )
            trials += try_in_turn(open_with(dtype), enough, judge, trials, deadline)
    return Tuning(
        cheapest(trials, settings.target_recall),
        settings.target_recall,
        settings.k,
        len(judge.sample),
        num_items,
        judge.exact.milliseconds_per_query,
        tuple(trials),
    )


def appoint_judge(index: ShardIndex, sample: SampleQueries, settings: SearchSettings, max_seconds: float) -> Judge:
    """Search exactly for as many of the queries as there is time for."""
    exact = settings.model_copy(update={"method": "exact"})
    few = sample.first(min(MIN_JUDGES, len(sample)))
    num_affordable = int(JUDGE_SHARE * max_seconds / few.seconds(index, exact) * len(few))
    judges = sample.first(min(len(sample), max(len(few), num_affordable)))
    begun = time.monotonic()
    truth_BK = judges.search(index, exact)
    seconds_per_query = (time.monotonic() - begun) / len(judges)
    return Judge(judges, truth_BK, make_trial(exact, 1.0, 1.0, seconds_per_query))


def try_in_turn(
    index: ShardIndex, configs: Iterable[SearchSettings], judge: Judge, earlier: Sequence[Trial], deadline: float
) -> list[Trial]:
    """Try ever costlier settings until one reaches the target, or costs more than a trial that does, or time is up."""
    trials: list[Trial] = []
    for config in configs:
        if time.monotonic() > deadline:
            break
        trial = judge.trial(index, config)
        trials.append(trial)
        best = cheapest([*earlier, *trials], config.target_recall)
        if trial.recall_low >= config.target_recall or trial.milliseconds_per_query > best.milliseconds_per_query:
            break
    return trials


def cheapest(trials: Iterable[Trial], target_recall: float) -> Trial:
    """The fastest trial that reaches the target; exact search always does."""
    good = [trial for trial in trials if trial.recall_low >= target_recall]
    return min(good, key=lambda trial: trial.milliseconds_per_query)


def grid(
    method: SearchMethod, settings: SearchSettings, sample: SampleQueries, num_items: int
) -> Iterator[SearchSettings]:
    """Yield settings of a method with ever more candidates, up to a share of the shard."""
    most = max(settings.k, int(MAX_SHARE * num_items))
    fixed = {"method": method, "max_escalated": 0}
    if method in ("topk_avg", "topk_low_rank"):
        num_kept = START * settings.k
        while num_kept <= most:
            yield settings.model_copy(update=fixed | {"num_preselected": int(num_kept)})
            num_kept *= STEP
        return
    num_pairs = sample.queries.gate_BP.shape[1]
    per_embd = float(settings.k) if method == "topk_per_embd" else settings.k / 4
    while per_embd * num_pairs <= 4 * most:  # the lists overlap
        num_preselected = min(num_items, max(settings.k, int(10 * per_embd)))
        candidates = {"num_per_embd": max(1, int(per_embd)), "num_preselected": num_preselected}
        yield settings.model_copy(update=fixed | candidates)
        per_embd *= STEP


def make_trial(settings: SearchSettings, recall: float, recall_low: float, seconds_per_query: float) -> Trial:
    """Make the trial of a search with these settings."""
    return Trial(
        settings.method,
        settings.num_preselected,
        settings.num_per_embd,
        settings.table_dtype,
        recall,
        recall_low,
        1e3 * seconds_per_query,
    )
