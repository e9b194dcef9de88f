"""Every algorithm on every backend, on one world: recall against cost. B queries, N items, K kept, M preselected.

Recall is against exact search of the same queries; cost is the wall time of a bulk of queries on all threads, and says
how it compares with others only inside one run.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from jobs.studies.search.dot_product import flat_index, hnsw_index
from jobs.studies.search.prepared import Prepared
from pipeline.model.mol import QuerySide
from pipeline.retrieval.filters import no_exclusions
from pipeline.retrieval.index import ShardIndex
from pipeline.retrieval.search import search_shard
from pipeline.retrieval.tuning import overlaps
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
EF_SEARCH = (256, 1_024)


@dataclass(frozen=True)
class Measured:
    """One way to search. `top1` is the share of queries whose best item was found."""

    backend: str
    method: str
    recall: dict[int, float]  # by cutoff
    top1: float
    milliseconds: float  # wall time of one query in bulk


def compare_methods(prepared: Prepared, num_threads: int) -> list[Measured]:
    """Measure all of them, saying each in the log."""
    queries = prepared.world.queries.take(slice(0, NATIVE_QUERIES))
    exact = SearchSettings(k=K, method="exact")
    begun = time.monotonic()
    truth_BK = _search(prepared, prepared.native, queries, exact)
    milliseconds = 1e3 * (time.monotonic() - begun) / NATIVE_QUERIES
    found = [Measured("native", "exact", dict.fromkeys(CUTOFFS, 1.0), 1.0, milliseconds)]
    _say(found[-1])
    for backend, index, num_queries in (
        ("native", prepared.native, NATIVE_QUERIES),
        ("torch", prepared.portable, PORTABLE_QUERIES),
    ):
        for name, settings in _ways(len(index), is_slow=backend == "torch"):
            few = FEW_QUERIES if settings.is_exact and backend == "torch" else num_queries
            part = queries.take(slice(0, few))
            seconds, rows_BK = _timed(prepared, index, part, settings)
            found.append(_measured(backend, name, rows_BK, truth_BK[:few], seconds))
            _say(found[-1])
    found += _dot_products(prepared, queries, truth_BK, num_threads)
    return found


def _ways(num_items: int, is_slow: bool) -> Iterator[tuple[str, SearchSettings]]:
    """What is tried; of the slow backend only the end points."""
    if is_slow:
        yield "exact", SearchSettings(k=K, method="exact")
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


def _dot_products(
    prepared: Prepared, queries: QuerySide, truth_BK: torch.Tensor, num_threads: int
) -> Iterator[Measured]:
    """What a dot product finds of it: the mean component, by faiss."""
    mean_ND, mean_BD = prepared.shard.mean_ND, queries.mean_BD
    begun = time.monotonic()
    graphs = [hnsw_index(mean_ND, num_threads, ef) for ef in EF_SEARCH[:1]]
    log.info("  HNSW built in %.0f s", time.monotonic() - begun)
    for index in [flat_index(mean_ND, num_threads), *graphs]:
        for ef in EF_SEARCH if "HNSW" in index.name else (0,):
            if ef:
                index.index.hnsw.efSearch = ef
            times = []
            for _ in range(1 + NUM_ROUNDS):
                begun = time.monotonic()
                rows_BK = index.search(mean_BD, K)
                times.append(time.monotonic() - begun)
            name = index.name.partition("/")[0] + (f"/{ef}" if ef else "")
            yield _say(
                _measured("faiss", name, torch.from_numpy(rows_BK), truth_BK, sorted(times[1:])[NUM_ROUNDS // 2])
            )


def _search(prepared: Prepared, index: ShardIndex, queries: QuerySide, settings: SearchSettings) -> torch.Tensor:
    nothing = no_exclusions(len(queries.gate_BP))
    return search_shard(index, queries, nothing, settings, query_map=prepared.query_map).rows_BK


def _timed(
    prepared: Prepared, index: ShardIndex, queries: QuerySide, settings: SearchSettings
) -> tuple[float, torch.Tensor]:
    """The median time of a search, after one that does not count, and what it found."""
    rows_BK = _search(prepared, index, queries, settings)
    times = []
    for _ in range(1 if settings.is_exact else NUM_ROUNDS):
        begun = time.monotonic()
        _search(prepared, index, queries, settings)
        times.append(time.monotonic() - begun)
    return sorted(times)[len(times) // 2], rows_BK


def _measured(backend: str, name: str, rows_BK: torch.Tensor, truth_BK: torch.Tensor, seconds: float) -> Measured:
    recall = {cutoff: float(overlaps(rows_BK[:, :cutoff], truth_BK[:, :cutoff]).mean()) for cutoff in CUTOFFS}
    top1 = float((rows_BK == truth_BK[:, :1]).any(dim=1).float().mean())
    return Measured(backend, name, recall, top1, 1e3 * seconds / len(truth_BK))


def _say(measured: Measured) -> Measured:
    recall = "  ".join(f"@{cutoff} {value:.4f}" for cutoff, value in measured.recall.items())
    log.info(
        "  %-7s %-20s recall %s  top-1 %.4f  %9.3f ms a query",
        measured.backend, measured.method, recall, measured.top1, measured.milliseconds,
    )  # fmt: skip
    return measured


def as_json(found: Sequence[Measured]) -> list[dict[str, object]]:
    """For the file beside the picture."""
    return [asdict(measured) for measured in found]


def draw(found: Sequence[Measured], title: str, path: Path, cutoff: int = 100) -> None:
    """Recall against cost as an SVG or PNG file; up and to the left is better."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    families = sorted({(m.backend, m.method.rpartition(" ")[0] or m.method) for m in found})
    for backend, family in families:
        mine = [m for m in found if m.backend == backend and (m.method.rpartition(" ")[0] or m.method) == family]
        mine.sort(key=lambda m: m.milliseconds)
        # A miss of one in ten and one in a thousand are both to be seen: the axis is the share that is missed.
        missed = [max(1e-4, 1 - m.recall[cutoff]) for m in mine]
        dashes = {"native": "-", "torch": "--", "faiss": ":"}[backend]
        axes.plot([m.milliseconds for m in mine], missed, dashes, marker="o", label=f"{family} ({backend})")
    axes.set(xscale="log", yscale="log", xlabel="milliseconds a query, all threads", title=title)
    axes.set_ylabel(f"true top {cutoff} missed (1 - recall)")
    axes.invert_yaxis()
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)
