"""Stage 1 alone: our scan of one table against two yardsticks, and as a share of the processor's peak.

B queries, N items, K kept, D width.
"""

import ctypes
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from jobs.studies.machine import has_amx
from jobs.studies.search.dot_product import flat_search
from jobs.studies.search.prepared import Prepared
from jobs.studies.searches import lay_out, preselect
from jobs.studies.timing import Row, Timing, median_ratio, median_seconds, row, time_interleaved
from pipeline.model.mol import ItemSide
from pipeline.native.build import compile_library
from pipeline.native.loader import native_kernels

log = logging.getLogger("nightrails")

NUM_QUERIES = 512
YARDSTICK_WIDTH, YARDSTICK_KEPT = 64, 1_000
# Bytes of scores that the PyTorch yardstick holds at once; the fastest of these sizes is used.
TILE_BYTES = (1 << 24, 1 << 26, 1 << 28)
PEAK_ITEMS, PEAK_WIDTH, PEAK_KEPT = 100_000, 256, 200


@dataclass(frozen=True)
class ProductSearch:
    """PyTorch's own way to the largest inner products: a bfloat16 matrix product and `topk`, a few queries at a time.

    PyTorch rounds the products to bfloat16, so items whose scores differ by less may change places.
    """

    items_ND: Tensor  # bfloat16
    query_tile: int

    def __call__(self, queries_BD: Tensor, k: int) -> Tensor:
        """Find the rows (B, K) of the k largest products with each query, best first."""
        num_kept = min(k, len(self.items_ND))
        tiles = torch.split(queries_BD.bfloat16(), self.query_tile)
        return torch.cat([(tile_BD @ self.items_ND.T).topk(num_kept, dim=1).indices for tile_BD in tiles])


def fastest_product_search(items_ND: Tensor, queries_BD: Tensor, k: int) -> ProductSearch:
    """Time one search with each tile size and keep the fastest."""
    query_tiles = [max(1, num_bytes // (2 * len(items_ND))) for num_bytes in TILE_BYTES]
    searches = [ProductSearch(items_ND.bfloat16(), query_tile) for query_tile in query_tiles]
    return min(searches, key=lambda search: median_seconds(lambda: search(queries_BD, k), num_rounds=1))


def better_yardstick(yardsticks: Mapping[str, Timing]) -> str:
    """Name the yardstick with the smaller median time: we are compared with this one."""
    return min(yardsticks, key=lambda name: yardsticks[name].median_wall)


def compare_yardsticks(prepared: Prepared, num_threads: int, num_rounds: int) -> Row:
    """Stage 1, top-1000, against the better of faiss and PyTorch on the same vectors: the low-rank table, 64 wide."""
    queries_BD = _as_wide(prepared.query_map(prepared.world.queries.take(slice(0, NUM_QUERIES))), YARDSTICK_WIDTH)
    rows_ND = _as_wide(prepared.shard.low_rank_NR, YARDSTICK_WIDTH)
    index = lay_out(prepared.world.mol, prepared.world.items, rows_ND)
    products = fastest_product_search(rows_ND, queries_BD, YARDSTICK_KEPT)
    yardsticks: dict[str, Callable[[], object]] = {
        "faiss.knn": lambda: flat_search(rows_ND, queries_BD, YARDSTICK_KEPT, num_threads),
        "PyTorch's bf16 product and topk": lambda: products(queries_BD, YARDSTICK_KEPT),
    }
    ours = {"ours": lambda: preselect(index, "low_rank", queries_BD, YARDSTICK_KEPT)}
    log.info("  PyTorch is fastest with %d queries at a time", products.query_tile)
    timings = time_interleaved(yardsticks | ours, num_rounds)
    for name, timing in timings.items():
        nanoseconds = 1e9 * timing.median_wall / NUM_QUERIES / len(rows_ND)
        log.info("  stage 1, width %d: %.3f ns a pair, %s", YARDSTICK_WIDTH, nanoseconds, name)
    better = better_yardstick({name: timings[name] for name in yardsticks})
    share = 1.0 if has_amx() else 0.5
    value = median_ratio(timings[better], timings["ours"])
    figure = f"stage 1 top-1000 (d = {YARDSTICK_WIDTH}) against {better}"
    return row(figure, value, 2 * share, 5 * share, "higher", "×")


def share_of_peak(prepared: Prepared, num_rounds: int) -> Row:
    """Stage 1 at width 256 in bfloat16 on one thread, as a share of the multiply-adds that registers alone can do."""
    kernels = native_kernels()
    figure = f"share of bf16 peak in stage 1, d = {PEAK_WIDTH}"
    if kernels.functions is None:
        return row(figure, math.nan, 30, 60, "higher", "%")
    generator = torch.Generator().manual_seed(0)
    rows_NR = torch.randn(PEAK_ITEMS, PEAK_WIDTH, generator=generator)
    queries_BR = torch.randn(NUM_QUERIES, PEAK_WIDTH, generator=generator)
    first = prepared.world.items.take(slice(0, 1))
    sides = (side.expand(PEAK_ITEMS, *side.shape[1:]) for side in (first.components_NXD, first.gate_NP))
    index = lay_out(prepared.world.mol, ItemSide(*sides), rows_NR)
    contender = {"ours": lambda: preselect(index, "low_rank", queries_BR, PEAK_KEPT)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    timing = time_interleaved(contender, num_rounds)["ours"]
    torch.set_num_threads(threads)
    peak = bfloat16_peak(kernels.instruction_set)
    reached = 2 * PEAK_WIDTH * PEAK_ITEMS * NUM_QUERIES / timing.median_cpu
    log.info("  bf16 peak of a core %.0f GFLOP/s, stage 1 reaches %.0f", peak / 1e9, reached / 1e9)
    return row(figure, 100 * reached / peak, 30, 60, "higher", "%")


def bfloat16_peak(instruction_set: str) -> float:
    """Floating-point operations per second of one thread on registers alone (peak.cpp)."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "peak.so"
        compile_library(instruction_set, path, [Path(__file__).with_name("peak.cpp")])
        library = ctypes.CDLL(str(path))
    library.nr_bfloat16_peak.restype = ctypes.c_double
    return float(library.nr_bfloat16_peak(ctypes.c_double(0.5)))


def _as_wide(rows_ND: Tensor, width: int) -> Tensor:
    """Repeat the columns, or cut them, until a row has this width."""
    return rows_ND.repeat(1, -(-width // rows_ND.shape[1]))[:, :width].contiguous()
