"""How fast the search is, against the paper's public way of searching, faiss, PyTorch and the machine's peak.

All contenders of a ratio are measured side by side. The last line on standard output is one JSON object with the table;
everything else goes to standard error. The trained model is made once, which takes minutes, and kept in a cache.
"""

import importlib.util
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch

from jobs.studies.machine import has_amx, processor
from jobs.studies.search.memory import compare_memory
from jobs.studies.search.prepared import Prepared, choose, prepare
from jobs.studies.search.reference import ReferenceSearch
from jobs.studies.search.stage1 import compare_yardsticks, share_of_peak
from jobs.studies.search.worlds import WorldName, load_bench_world
from jobs.studies.timing import Row, Timing, median_ratio, row, time_interleaved
from pipeline.errors import InputError
from pipeline.evaluation.metrics import overlap_at_k
from pipeline.model.mol import QuerySide
from pipeline.native.loader import native_kernels
from pipeline.retrieval.topk import TopK
from pipeline.settings import SearchSettings

log = logging.getLogger("nightrails")

TUNING_QUERIES = 256
# Queries of one call: many for a fast search, few for a slow one, as each is used.
BULK, PORTABLE, EXACT, REFERENCE, BRUTE = 1_024, 128, 32, 16, 1
NUM_JUDGED = 512  # queries of the bulk whose recall is measured against exact search
COMB = "reference CombTopK"  # as in the paper's public code, with K' = 100 and K_avg = 1,000
BRUTE_FORCE = "reference brute force"
# Figure, slow and fast contender, the least ratio that must hold and a ratio to be proud of, with AMX.
RATIOS = (
    (f"best against {COMB} 100/1000", COMB, "best", 200, 800),
    (f"best against {BRUTE_FORCE}", BRUTE_FORCE, "best", 4_000, 12_000),
    (f"exact against {BRUTE_FORCE}", BRUTE_FORCE, "exact", 30, 60),
    (f"portable best against {COMB} 100/1000", COMB, "portable", 25, 80),
)


@dataclass(frozen=True)
class Contender:
    """One way to search, and the number of queries of a call."""

    run: Callable[[], TopK]
    num_queries: int

    def per_query(self, timing: Timing) -> Timing:
        """Seconds of one query, from the seconds of a call."""
        wall, cpu = ([seconds / self.num_queries for seconds in each] for each in (timing.wall, timing.cpu))
        return Timing(tuple(wall), tuple(cpu))


def main(
    world: WorldName,
    num_items: int | None,
    k: list[int],
    target: float,
    ranks: list[int],
    num_sample: int,
    threads: int,
    rounds: int,
) -> None:
    """Measure the table and print it."""
    if importlib.util.find_spec("faiss") is None:
        raise InputError("faiss is not installed; `make bench` installs it, so does pip install -e '.[bench]'")
    torch.set_num_threads(threads)
    native_kernels()
    log.info("%s; %d threads; AMX: %s", processor(), threads, "yes" if has_amx() else "no, half of each ratio")
    prepared = prepare(load_bench_world(world, num_items), ranks, num_sample)
    log_fit(prepared)
    rows: list[Row] = []
    for length in k:
        best = choose_best(prepared, length, target)
        rows += compare(prepared, best, target, rounds)
    rows.append(compare_yardsticks(prepared, threads, rounds))
    rows.append(share_of_peak(prepared, rounds))
    rows.append(compare_threads(prepared, best, threads, rounds))
    rows.append(compare_filtering(prepared, best, rounds))
    rows.append(compare_memory(prepared))
    for each in rows:
        verdict = "holds" if each.holds else "DOES NOT HOLD"
        log.info("%-58s %10.3f  must %-10s proud %-10s %s", each.figure, each.value, each.must, each.proud, verdict)
    print(json.dumps({"rows": [asdict(each) for each in rows]}))


def log_fit(prepared: Prepared) -> None:
    """Log the choice of the low-rank fit, and the ranks that it tried."""
    fit = prepared.fit
    log.info("%d items, %s", len(prepared.native), prepared.world.mol.settings)
    for trial in fit.trials:
        log.info("rank %d: recall %.3f, needs K' = %.0f", trial.rank, trial.recall, trial.num_needed)
    log.info(
        "low rank %d: fitted in %.1f s, table in %.1f s; weight of the mean %s, of the top %s, ridge %s",
        fit.chosen.rank, prepared.fit_seconds, prepared.table_seconds, fit.mean_weight, fit.top_weight, fit.ridge,
    )  # fmt: skip


def choose_best(prepared: Prepared, k: int, target: float) -> SearchSettings:
    """Tune for lists of k, on queries that are not timed."""
    tuning, best = choose(prepared, k, target, slice(BULK, BULK + TUNING_QUERIES))
    log.info("k = %d: best is %s, K' = %d, %s", k, best.method, best.num_preselected, best.table_dtype)
    log.info("  %s", tuning.reason)
    return best


def compare(prepared: Prepared, best: SearchSettings, target: float, num_rounds: int) -> list[Row]:
    """Compare our best, portable and exact search with the paper's CombTopK 100/1000 and brute force."""
    k = best.k
    contenders = make_contenders(prepared, best)
    results: dict[str, TopK] = {}

    def run(name: str) -> None:
        results[name] = contenders[name].run()

    timings = time_interleaved({name: partial(run, name) for name in contenders}, num_rounds)
    each = {name: contenders[name].per_query(timing) for name, timing in timings.items()}
    truth_BK = prepared.search(prepared.native, first_queries(prepared, NUM_JUDGED), exact_of(best)).rows_BK
    recalls: dict[str, float] = {}
    for name, result in results.items():
        num_judged = min(len(result), NUM_JUDGED)
        recalls[name] = float(
            overlap_at_k(result.rows_BK[:num_judged].numpy(), truth_BK[:num_judged].numpy(), k).mean()
        )
        milliseconds = 1e3 * each[name].median_wall
        log.info(
            "  %-22s %9.3f ms a query, recall@%d %.4f of %d queries", name, milliseconds, k, recalls[name], num_judged
        )
    share = 1.0 if has_amx() else 0.5
    rows = [
        row(f"{figure}, k = {k}", median_ratio(each[slow], each[fast]), must * share, proud * share, "higher", "×")
        for figure, slow, fast, must, proud in RATIOS
    ]
    return [*rows, row(f"best: recall, k = {k}", recalls["best"], target, 1.0, "higher")]


def make_contenders(prepared: Prepared, best: SearchSettings) -> dict[str, Contender]:
    """All ways to search that a ratio names, ready to run."""
    reference = ReferenceSearch(prepared.world.mol, prepared.world.item_rows_NE)
    reference.prepare()
    encodings_BE = prepared.world.encodings_BE
    chosen = prepared.index_with(best.table_dtype)
    search, first = prepared.search, partial(first_queries, prepared)
    return {
        "best": Contender(partial(search, chosen, first(BULK), best), BULK),
        "portable": Contender(partial(search, prepared.portable, first(PORTABLE), best), PORTABLE),
        "exact": Contender(partial(search, prepared.native, first(EXACT), exact_of(best)), EXACT),
        COMB: Contender(partial(reference.comb_topk, encodings_BE[:REFERENCE], best.k, 100, 1_000), REFERENCE),
        BRUTE_FORCE: Contender(partial(reference.brute_force, encodings_BE[:BRUTE], best.k), BRUTE),
    }


def first_queries(prepared: Prepared, num_queries: int) -> QuerySide:
    """The first of the evaluation users."""
    return prepared.world.queries.take(slice(0, num_queries))


def exact_of(settings: SearchSettings) -> SearchSettings:
    """Exact search for lists of the same length."""
    return settings.model_copy(update={"method": "exact"})


def compare_threads(prepared: Prepared, best: SearchSettings, num_threads: int, num_rounds: int) -> Row:
    """Compare the best search on one thread and on all."""
    queries, index = first_queries(prepared, BULK), prepared.index_with(best.table_dtype)

    def search(threads: int) -> TopK:
        torch.set_num_threads(threads)
        return prepared.search(index, queries, best)

    contenders = {"one": partial(search, 1), "all": partial(search, num_threads)}
    timings = time_interleaved(contenders, num_rounds)
    torch.set_num_threads(num_threads)
    value = median_ratio(timings["one"], timings["all"])
    return row(f"{num_threads} threads against 1", value, 0.9 * num_threads, 0.975 * num_threads, "higher", "×")


def compare_filtering(prepared: Prepared, best: SearchSettings, num_rounds: int) -> Row:
    """Compare a search that excludes each query's own history with one that excludes nothing."""
    index, queries = prepared.index_with(best.table_dtype), first_queries(prepared, BULK)
    search = partial(prepared.search, index, queries, best)
    histories = prepared.world.exclusions.narrow(0, BULK)
    timings = time_interleaved({"with": lambda: search(histories), "without": search}, num_rounds)
    value = median_ratio(timings["with"], timings["without"])
    return row("time with each query's history excluded", value, 1.1, 1.02, "lower", "×")
