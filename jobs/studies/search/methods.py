"""Every algorithm on every backend, on one world: recall against cost, in figures and in a picture.

B queries, N items, K kept, M preselected.

Recall is against exact search of the same queries. Cost is the wall time of a bulk of queries on all threads; it
compares with other costs of the same run only.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from jobs.studies.machine import processor
from jobs.studies.search.dot_product import flat_index, hnsw_indices
from jobs.studies.search.prepared import Prepared, prepare
from jobs.studies.search.worlds import WorldName, load_bench_world
from jobs.studies.timing import median_seconds, time_interleaved
from pipeline.evaluation.metrics import overlap_at_k
from pipeline.model.mol import QuerySide
from pipeline.settings import SearchSettings

log = logging.getLogger("nightrails")

CUTOFFS = (10, 100, 200)
K = max(CUTOFFS)
# Queries of one call: many where a query takes a millisecond, few where it takes a second.
NATIVE_QUERIES, PORTABLE_QUERIES, FEW_QUERIES = 512, 64, 16
NUM_ROUNDS = 3
AVERAGES = (200, 500, 1_000, 2_000, 4_000, 16_000)  # K' of TopKAvg
LOW_RANKS = (200, 300, 500, 1_000, 2_000, 4_000)  # K' of TopKLowRank
COMBINED = ((25, 250), (50, 500), (100, 1_000), (200, 1_000))  # K' and K_avg of CombTopK
PER_EMBD = (200, 400)  # K' of TopKPerEmbd
EFS_SEARCH = (256, 1_024)
EXACT = SearchSettings(k=K, method="exact")


@dataclass(frozen=True)
class Measured:
    """One algorithm with its numbers, on one backend."""

    backend: str
    method: str
    recall: dict[int, float]  # by cutoff
    top1: float  # share of queries whose best item is in the list
    milliseconds: float  # wall time of one query in bulk

    @property
    def family(self) -> str:
        """The method without its numbers."""
        return self.method.rpartition(" ")[0] or self.method


def main(
    world: WorldName, num_items: int | None, ranks: list[int], num_sample: int, threads: int, folder: Path
) -> None:
    """Compare all algorithms, and leave a file of figures and a picture in the folder."""
    torch.set_num_threads(threads)
    prepared = prepare(load_bench_world(world, num_items), ranks, num_sample)
    results = list(compare_methods(prepared, threads))
    size = len(prepared.native)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{world}-{size}.json").write_text(json.dumps([asdict(measured) for measured in results], indent=1))
    title = f"{world}: {size:,} items, {processor()}, {threads} threads"
    draw(results, title, folder / f"{world}-{size}.svg")


def compare_methods(prepared: Prepared, num_threads: int) -> Iterator[Measured]:
    """Measure each algorithm on each backend; each is also a line in the log."""
    queries = prepared.world.queries.take(slice(0, NATIVE_QUERIES))
    truth_BK = prepared.search(prepared.native, queries, EXACT).rows_BK
    backends = (("native", prepared.native, NATIVE_QUERIES), ("torch", prepared.portable, PORTABLE_QUERIES))
    for backend, index, num_queries in backends:
        for name, settings in _methods(len(index), is_slow=backend == "torch"):
            asked = queries.take(slice(0, FEW_QUERIES if settings.is_exact and backend == "torch" else num_queries))
            run = partial(prepared.search, index, asked, settings)
            rows_BK = run().rows_BK  # also the warm-up
            timing = time_interleaved({name: run}, 1 if settings.is_exact else NUM_ROUNDS, num_warm_up=0)[name]
            yield _judge(backend, name, rows_BK, truth_BK[: len(rows_BK)], timing.median_wall)
    yield from _dot_products(prepared, queries, truth_BK, num_threads)


def _methods(num_items: int, is_slow: bool) -> Iterator[tuple[str, SearchSettings]]:
    """Name and settings of each search that is tried, fewer for the slow backend."""
    yield "exact", EXACT
    yield "exact two-stage", SearchSettings(k=K, method="exact_two_stage")
    for number in LOW_RANKS:
        yield f"TopKLowRank {number}", SearchSettings(k=K, method="topk_low_rank", num_preselected=number)
    for number in AVERAGES[:: 2 if is_slow else 1]:
        if number < num_items:
            yield f"TopKAvg {number}", SearchSettings(k=K, method="topk_avg", num_preselected=number)
    for per_embd, number in COMBINED[2:3] if is_slow else COMBINED:
        settings = SearchSettings(k=K, method="comb_topk", num_per_embd=per_embd, num_preselected=number)
        yield f"CombTopK {per_embd}/{number}", settings
    for number in PER_EMBD[:1] if is_slow else PER_EMBD:
        yield f"TopKPerEmbd {number}", SearchSettings(k=K, method="topk_per_embd", num_per_embd=number)


def _dot_products(prepared: Prepared, queries: QuerySide, truth_BK: Tensor, num_threads: int) -> Iterator[Measured]:
    """Measure a plain dot product of mean components, by faiss."""
    mean_ND, mean_BD = prepared.shard.mean_ND, queries.mean_BD
    for index in chain([flat_index(mean_ND, num_threads)], hnsw_indices(mean_ND, num_threads, EFS_SEARCH)):
        rows_BK = torch.from_numpy(index.search(mean_BD, K))
        seconds = median_seconds(partial(index.search, mean_BD, K), NUM_ROUNDS)
        yield _judge("faiss", index.name, rows_BK, truth_BK, seconds)


def _judge(backend: str, method: str, rows_BK: Tensor, truth_BK: Tensor, seconds: float) -> Measured:
    recall = {cutoff: float(overlap_at_k(rows_BK.numpy(), truth_BK.numpy(), cutoff).mean()) for cutoff in CUTOFFS}
    top1 = float((rows_BK == truth_BK[:, :1]).any(dim=1).float().mean())
    measured = Measured(backend, method, recall, top1, 1e3 * seconds / len(truth_BK))
    cells = "  ".join(f"@{cutoff} {value:.4f}" for cutoff, value in recall.items())
    log.info(
        "  %-7s %-20s recall %s  top-1 %.4f  %9.3f ms a query", backend, method, cells, top1, measured.milliseconds
    )
    return measured


def draw(results: Sequence[Measured], title: str, path: Path, cutoff: int = 100) -> None:
    """Draw recall against cost as an SVG or PNG file; up and to the left is better."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for backend, family in sorted({(measured.backend, measured.family) for measured in results}):
        line = [measured for measured in results if (measured.backend, measured.family) == (backend, family)]
        line.sort(key=lambda measured: measured.milliseconds)
        # A miss of one in ten and one in a thousand should both be seen: the axis is the share that is missed.
        missed = [max(1e-4, 1 - measured.recall[cutoff]) for measured in line]
        dashes = {"native": "-", "torch": "--", "faiss": ":"}[backend]
        axes.plot([m.milliseconds for m in line], missed, dashes, marker="o", label=f"{family} ({backend})")
    axes.set(xscale="log", yscale="log", xlabel="milliseconds a query, all threads", title=title)
    axes.set_ylabel(f"true top {cutoff} missed (1 - recall)")
    axes.invert_yaxis()
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)
