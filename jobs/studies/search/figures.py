"""The figures of `make bench`: our search against the paper's public way, faiss and the machine, side by side.

B queries, N items, K kept, M preselected, D width.
"""

import ctypes
import json
import logging
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from jobs.studies.search.dot_product import faiss_threads
from jobs.studies.search.methods import as_json, compare_methods, draw
from jobs.studies.search.prepared import Prepared, choose, prepare
from jobs.studies.search.reference import ReferenceSearch
from jobs.studies.search.worlds import load_bench_world
from jobs.studies.timing import Row, Timing, median_ratio, row, time_interleaved
from pipeline.model.mol import ItemSide
from pipeline.retrieval.backends import open_index
from pipeline.retrieval.backends.native.library import cpu_flags, native_library
from pipeline.retrieval.filters import Exclusions, mask_shard, no_exclusions
from pipeline.retrieval.index import ShardIndex
from pipeline.retrieval.search import search_shard
from pipeline.retrieval.shard import make_shard
from pipeline.retrieval.topk import TopK
from pipeline.retrieval.tuning import overlaps
from pipeline.settings import SearchSettings

log = logging.getLogger("nightrails")

ITEMS_OF_PEAK, WIDTH_OF_PEAK = 100_000, 256
WIDTH_OF_FAISS = 64
TUNING_QUERIES = 256
# Queries of one call: many for what is fast, few for what is slow, as each is used.
BULK, PORTABLE, EXACT, REFERENCE, BRUTE = 1_024, 128, 32, 16, 1
JUDGED = 512  # of the bulk: recall, against exact search


@dataclass(frozen=True)
class Plan:
    """What `jobs/bench.py` was asked for."""

    world: str
    num_items: int | None
    k: list[int]
    target: float
    ranks: list[int]
    num_sample: int
    threads: int
    rounds: int
    cache: Path | None
    methods: Path | None


def measure(plan: Plan) -> list[Row]:
    """The whole table, also in the log line by line."""
    torch.set_num_threads(plan.threads)
    native_library()
    log.info("%s; %d threads; AMX: %s", processor(), plan.threads, "yes" if has_amx() else "no, half of each ratio")
    world = load_bench_world(plan.world, plan.num_items, plan.cache)
    log.info("%s: %d items, %s", plan.world, len(world.item_rows_NE), world.mol.settings)
    prepared = prepare(world, plan.ranks, plan.num_sample)
    for trial in prepared.fit.trials:
        log.info("rank %d: recall %.3f, needs K' = %.0f", trial.rank, trial.recall, trial.num_needed)
    log.info(
        "low rank %d: fitted in %.1f s, table in %.1f s; weight of the mean %s, of the top %s, ridge %s",
        prepared.fit.chosen.rank, prepared.fit_seconds, prepared.table_seconds,
        prepared.fit.mean_weight, prepared.fit.top_weight, prepared.fit.ridge,
    )  # fmt: skip
    if plan.methods is not None:
        write_methods(prepared, plan)
    rows: list[Row] = []
    for k in plan.k:
        found, best = compare(prepared, k, plan.target, plan.rounds)
        rows += found
    rows.append(compare_faiss(prepared, plan.threads, plan.rounds))
    rows.append(share_of_peak(prepared, plan.rounds))
    rows.append(scaling(prepared, best, plan.threads, plan.rounds))
    rows.append(filtering(prepared, best, plan.rounds))
    rows.append(memory(prepared))
    for each in rows:
        verdict = "holds" if each["holds"] else "DOES NOT HOLD"
        log.info(
            "%-58s %10.3f  must %-10s proud %-10s %s",
            each["figure"],
            each["value"],
            each["must"],
            each["proud"],
            verdict,
        )
    return rows


def write_methods(prepared: Prepared, plan: Plan) -> None:
    """Every algorithm on every backend: a table in the log, a file of figures and a picture."""
    assert plan.methods is not None
    found = compare_methods(prepared, plan.threads)
    plan.methods.mkdir(parents=True, exist_ok=True)
    num_items = len(prepared.native)
    name = f"{plan.world}-{num_items}"
    (plan.methods / f"{name}.json").write_text(json.dumps(as_json(found), indent=1))
    draw(
        found, f"{plan.world}: {num_items:,} items, {processor()}, {plan.threads} threads", plan.methods / f"{name}.svg"
    )


def processor() -> str:
    """What the machine calls its CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def has_amx() -> bool:
    """Whether the CPU has matrix tiles: without them half of each ratio is asked for."""
    return "amx_bf16" in cpu_flags()


def compare(prepared: Prepared, k: int, target: float, num_rounds: int) -> tuple[list[Row], SearchSettings]:
    """Our best, portable and exact search against the paper's CombTopK 100/1000 and brute force; and what is best."""
    world, native, portable = prepared.world, prepared.native, prepared.portable
    tuning, best = choose(prepared, k, target, slice(BULK, BULK + TUNING_QUERIES))
    log.info("k = %d: best is %s, K' = %d, %s", k, best.method, best.num_preselected, best.table_dtype)
    log.info("  %s", tuning.reason)
    chosen = prepared.index_with(best.table_dtype)
    exact = best.model_copy(update={"method": "exact"})
    reference = ReferenceSearch(world.mol, world.item_rows_NE)
    reference.prepare()
    found: dict[str, TopK] = {}

    def ours(name: str, index: ShardIndex, settings: SearchSettings, num_queries: int) -> Callable[[], None]:
        def run() -> None:
            queries = world.queries.take(slice(0, num_queries))
            nothing = no_exclusions(num_queries)
            found[name] = search_shard(index, queries, nothing, settings, query_map=prepared.query_map)

        return run

    def comb() -> None:
        found["reference CombTopK"] = reference.comb_topk(world.encodings_BE[:REFERENCE], k, 100, 1_000)

    def brute() -> None:
        found["reference brute force"] = reference.brute_force(world.encodings_BE[:BRUTE], k)

    timings = time_interleaved(
        {
            "best": ours("best", chosen, best, BULK),
            "portable": ours("portable", portable, best, PORTABLE),
            "exact": ours("exact", native, exact, EXACT),
            "reference CombTopK": comb,
            "reference brute force": brute,
        },
        num_rounds,
    )
    sizes = {"best": BULK, "portable": PORTABLE, "exact": EXACT, "reference CombTopK": REFERENCE}
    sizes["reference brute force"] = BRUTE
    each = {name: _per_query(timing, sizes[name]) for name, timing in timings.items()}
    ours("exact", native, exact, JUDGED)()
    truth = found["exact"].rows_BK
    recalls: dict[str, float] = {}
    for name, result in found.items():
        n = min(len(result), len(truth))
        recalls[name] = float(overlaps(result.rows_BK[:n], truth[:n]).mean())
        spent = 1e3 * each[name].median_wall
        log.info("  %-22s %9.3f ms a query, recall@%d %.4f of %d queries", name, spent, k, recalls[name], n)
    share = 1.0 if has_amx() else 0.5
    ratio = {
        "best against reference CombTopK 100/1000": ("reference CombTopK", "best", 200, 800),
        "best against reference brute force": ("reference brute force", "best", 4_000, 12_000),
        "exact against reference brute force": ("reference brute force", "exact", 30, 60),
        "portable best against reference CombTopK 100/1000": ("reference CombTopK", "portable", 25, 80),
    }
    rows = [
        row(f"{figure}, k = {k}", median_ratio(each[a], each[b]), must * share, proud * share, "higher", "×")
        for figure, (a, b, must, proud) in ratio.items()
    ]
    rows.append(row(f"best: recall, k = {k}", recalls["best"], target, 1.0, "higher", ""))
    return rows, best


def _as_wide(rows_ND: Tensor, width: int) -> Tensor:
    """Rows of this width: the same numbers over and over, or cut."""
    return rows_ND.repeat(1, -(-width // rows_ND.shape[1]))[:, :width].contiguous()


def compare_faiss(prepared: Prepared, num_threads: int, num_rounds: int) -> Row:
    """Stage 1, top-1000, against faiss's exact search of the same vectors: the low-rank table's, made 64 wide."""
    import faiss

    queries_BD = _as_wide(prepared.query_map(prepared.world.queries.take(slice(0, 512))), WIDTH_OF_FAISS)
    rows_ND = _as_wide(prepared.shard.low_rank_NR, WIDTH_OF_FAISS)
    index = open_index(prepared.world.mol, make_shard(0, prepared.world.items, rows_ND), SearchSettings())
    items, queries = rows_ND.numpy(), queries_BD.numpy()
    mask = mask_shard(prepared.shard.is_eligible_N, 0, no_exclusions(512))

    def flat() -> None:
        with faiss_threads(num_threads):
            faiss.knn(queries, items, 1_000, metric=faiss.METRIC_INNER_PRODUCT)

    timings = time_interleaved(
        {"faiss": flat, "ours": lambda: index.preselect("low_rank", queries_BD, 1_000, mask)}, num_rounds
    )
    for name, timing in timings.items():
        nanoseconds = 1e9 * timing.median_wall / 512 / len(rows_ND)
        log.info("  stage 1, width %d: %s %.3f ns a pair", rows_ND.shape[1], name, nanoseconds)
    share = 1.0 if has_amx() else 0.5
    value = median_ratio(timings["faiss"], timings["ours"])
    return row(
        f"stage 1 top-1000 (d = {rows_ND.shape[1]}) against faiss.knn", value, 2 * share, 5 * share, "higher", "×"
    )


def share_of_peak(prepared: Prepared, num_rounds: int) -> Row:
    """Stage 1 at width 256 in bfloat16, one thread, as a share of what registers alone can do."""
    library = native_library()
    figure = f"share of bf16 peak in stage 1, d = {WIDTH_OF_PEAK}"
    if library is None:
        return row(figure, math.nan, 30, 60, "higher", "%")
    generator = torch.Generator().manual_seed(0)
    rows_NR = torch.randn(ITEMS_OF_PEAK, WIDTH_OF_PEAK, generator=generator)
    queries_BR = torch.randn(512, WIDTH_OF_PEAK, generator=generator)
    items = ItemSide(*(side[:1].expand(ITEMS_OF_PEAK, *side.shape[1:]) for side in _sides(prepared.world.items)))
    index = open_index(prepared.world.mol, make_shard(0, items, rows_NR), SearchSettings())
    mask = mask_shard(index.is_eligible_N, 0, no_exclusions(512))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    timing = time_interleaved({"ours": lambda: index.preselect("low_rank", queries_BR, 200, mask)}, num_rounds)["ours"]
    torch.set_num_threads(threads)
    peak = library.nr_peak(ctypes.c_int(1), ctypes.c_double(0.5), ctypes.c_int(1))
    reached = 2 * WIDTH_OF_PEAK * ITEMS_OF_PEAK * 512 / timing.median_cpu
    log.info("  bf16 peak of a core %.0f GFLOP/s, stage 1 reaches %.0f", peak / 1e9, reached / 1e9)
    return row(figure, 100 * reached / peak, 30, 60, "higher", "%")


def scaling(prepared: Prepared, best: SearchSettings, num_threads: int, num_rounds: int) -> Row:
    """The best search on one thread and on all."""
    queries, index = prepared.world.queries.take(slice(0, BULK)), prepared.index_with(best.table_dtype)

    def run(threads: int) -> Callable[[], None]:
        def search() -> None:
            torch.set_num_threads(threads)
            search_shard(index, queries, no_exclusions(BULK), best, query_map=prepared.query_map)

        return search

    timings = time_interleaved({"one": run(1), "all": run(num_threads)}, num_rounds)
    torch.set_num_threads(num_threads)
    value = median_ratio(timings["one"], timings["all"])
    return row(f"{num_threads} threads against 1", value, 1.8 * num_threads / 2, 1.95 * num_threads / 2, "higher", "×")


def filtering(prepared: Prepared, best: SearchSettings, num_rounds: int) -> Row:
    """What every query's own history costs when it is excluded."""
    queries, excluded = prepared.world.queries.take(slice(0, BULK)), prepared.world.exclusions.narrow(0, BULK)
    index = prepared.index_with(best.table_dtype)

    def run(lists: Exclusions) -> Callable[[], TopK]:
        return lambda: search_shard(index, queries, lists, best, query_map=prepared.query_map)

    timings = time_interleaved({"with": run(excluded), "without": run(no_exclusions(BULK))}, num_rounds)
    return row(
        "time with each query's history excluded",
        median_ratio(timings["with"], timings["without"]),
        1.1,
        1.02,
        "lower",
        "×",
    )


def memory(prepared: Prepared) -> Row:
    """What a searcher's process keeps resident, against its tables."""
    world = prepared.world
    tensors = {f"mol.{name}": value for name, value in world.mol.state_dict().items()}
    dim = torch.tensor(world.item_rows_NE.shape[1])
    queries = world.queries.take(slice(0, BULK))
    tensors |= {"components": world.items.components_NXD, "gate": world.items.gate_NP, "dim": dim}
    tensors |= {"query_components": queries.components_BQD, "query_gate": queries.gate_BP}
    tensors |= {"low_rank": prepared.shard.low_rank_NR}
    tensors["settings"] = torch.tensor(list(world.mol.settings.model_dump_json().encode()), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.safetensors"
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
        command = [sys.executable, "-m", "jobs.studies.search.memory", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    seen = json.loads(said.stdout.splitlines()[-1])
    mega = 1 << 20
    per_item = seen["tables"] / seen["items"]
    log.info(
        "  resident %d MB, tables %d MB, %.0f bytes an item", seen["resident"] / mega, seen["tables"] / mega, per_item
    )
    over = (seen["resident"] / mega - 300) / (seen["tables"] / mega)
    proud = (1.1 * seen["tables"] / mega + 200 - 300) / (seen["tables"] / mega)
    return row("(resident set - 300 MB) over shard tables", over, 1.25, proud, "lower", "×")


def _per_query(timing: Timing, num_queries: int) -> Timing:
    return Timing(tuple(t / num_queries for t in timing.wall), tuple(t / num_queries for t in timing.cpu))


def _sides(items: ItemSide) -> Sequence[torch.Tensor]:
    return items.components_NXD, items.gate_NP
