"""Speed and correctness of the GPU backend.

For 32 and 64 pairs of components and each number of items, stage 1, stage 2 and the exact scan are timed beside plain
torch, stated as a share of the FLOP/s that the device itself reaches in a large matrix product, and compared with
float64. Items are clustered unit vectors and the gate is untrained, so the share of items that the scan must score is
not that of a trained model. Without a GPU Triton's interpreter runs, for tiny sizes only.

B queries, N items, M candidates, K kept, Q/X query/item components, D width, P = Q·X pairs, R rank.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from jobs.studies.timing import median_seconds
from pipeline.data.lists import NO_ITEM, Lists
from pipeline.model.mol import ItemSide, MixtureOfLogits, QuerySide
from pipeline.retrieval.backends.triton import index as triton_index
from pipeline.retrieval.backends.triton.index import TritonIndex
from pipeline.retrieval.backends.triton.launch import ItemLists, score_above
from pipeline.retrieval.backends.triton.layout import ItemRows, MolQueries, MolWeights
from pipeline.retrieval.backends.triton.tables import quantised_table
from pipeline.retrieval.filters import ShardMask
from pipeline.retrieval.index import Table
from pipeline.retrieval.shard import Shard, make_shard
from pipeline.settings import MolSettings

IS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if IS_GPU else "cpu"
ENCODING_DIM, HIDDEN_DIM, RANK = 16, 128, 128
NUM_KEPT, NUM_CANDIDATES, NUM_RESCORED = (1_000, 2_000, 100) if IS_GPU else (16, 32, 8)
NUM_CHECKED, NUM_EXCLUDED = 16, 100
NUM_ROUNDS = 5 if IS_GPU else 1
EAGER_PAIRS = 1 << 18  # pairs that the plain MoL scores at once
EAGER_BYTES = 1 << 32  # size of the largest bfloat16 score matrix in plain torch
NUM_CLUSTERS = 2_000
TF32_SLOWDOWN = 6  # a float32 product is three tf32 products at half the rate of bfloat16


def seconds(run: Callable[[], object]) -> float:
    """Median wall time until the device is done, after one run that compiles."""

    def run_to_the_end() -> None:
        run()
        if IS_GPU:
            torch.cuda.synchronize()

    return median_seconds(run_to_the_end, NUM_ROUNDS)


def peak_flops() -> float:
    """FLOP/s of a large bfloat16 product."""
    size = 8_192 if IS_GPU else 256
    left, right = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds(lambda: left @ right)


@dataclass(frozen=True)
class World:
    """Clustered items and queries for an untrained MoL, with some items ineligible and some excluded by each query."""

    mol: MixtureOfLogits
    queries: QuerySide
    shard: Shard
    low_rank_BR: Tensor
    mask: ShardMask
    flop_per_pair: int
    peak: float  # FLOP/s of the device

    def report(self, name: str, took: float, num_queries: int, flop: float, note: str = "") -> None:
        """Print one line: time of a call, queries per second, share of the device's peak."""
        share = flop / took / self.peak
        print(f"  {name:34} {took * 1e3:9.2f} ms {num_queries / took:12,.0f} queries/s {share:7.1%} of peak  {note}")


def make_world(num_pairs: int, num_queries: int, num_items: int, peak: float) -> World:
    """Draw a world with 8 × 4 components of width 64 (32 pairs), or 8 × 8 of width 32 (64 pairs)."""
    torch.manual_seed(0)
    x, d = (4, 64) if num_pairs == 32 else (8, 32)
    settings = MolSettings(
        num_query_components=8, num_item_components=x, component_dim=d, query_hidden_dim=16, gate_hidden_dim=HIDDEN_DIM
    )
    mol = MixtureOfLogits(ENCODING_DIM, settings).eval().requires_grad_(False).to(DEVICE)
    centres = torch.randn(NUM_CLUSTERS, d, device=DEVICE)
    queries = QuerySide(_clustered(centres, num_queries, 8), torch.randn(num_queries, num_pairs, device=DEVICE))
    items = ItemSide(_clustered(centres, num_items, x), torch.randn(num_items, num_pairs, device=DEVICE))
    low_rank_NR, low_rank_BR = (torch.randn(number, RANK, device=DEVICE) for number in (num_items, num_queries))
    num_excluded = min(NUM_EXCLUDED, num_items // 4)
    excluded = np.random.default_rng(0).integers(0, num_items, (num_queries, num_excluded))
    lists = [np.unique(row).astype(np.int32) for row in excluded]
    offsets = np.cumsum([0, *(len(rows) for rows in lists)])
    is_eligible_N = torch.rand(num_items, device=DEVICE) > 0.05
    mask = ShardMask(num_items, Lists(offsets, np.concatenate(lists)), is_eligible_N)
    flop_per_pair = 2 * num_pairs * d + 4 * num_pairs * HIDDEN_DIM
    return World(mol, queries, make_shard(0, items, low_rank_NR), low_rank_BR, mask, flop_per_pair, peak)


def _clustered(centres: Tensor, number: int, num_components: int) -> Tensor:
    chosen = torch.randint(0, len(centres), (number, num_components), device=DEVICE)
    noise = torch.randn(number, num_components, centres.shape[1], device=DEVICE)
    return normalize(centres[chosen] + 0.7 * noise, dim=-1)


def study_tables(world: World) -> None:
    """Time stage 1 over the mean, the low-rank table, and the low-rank table in 8 bits."""
    index, index8 = TritonIndex(world.mol, world.shard), TritonIndex(world.mol, world.shard, low_rank_bits=8)
    mean_BD, mean_ND = world.queries.mean_BD.bfloat16(), world.shard.mean_ND.bfloat16()
    _study_table(world, index, "mean", "mean", mean_BD, mean_ND)
    _study_eager(world, "mean", mean_BD, mean_ND)
    rows_BR, rows_NR = world.low_rank_BR.bfloat16(), world.shard.low_rank_NR.bfloat16()
    _study_table(world, index, f"rank {RANK}", "low_rank", rows_BR, rows_NR)
    _study_eager(world, f"rank {RANK}", rows_BR, rows_NR)
    table = quantised_table(world.shard.low_rank_NR)
    whole_BR = table.prepare(world.low_rank_BR).vectors_B1D[:, 0, :RANK]
    _study_table(world, index8, f"rank {RANK} int8", "low_rank", whole_BR, table.vectors_N1D[:, 0])


def _study_table(
    world: World, index: TritonIndex, name: str, table: Table, queries_BD: Tensor, vectors_ND: Tensor
) -> None:
    """Time one table; `queries_BD` and `vectors_ND` are the vectors as it holds them, for the float64 check."""
    k = min(NUM_KEPT, len(index))
    given_BD = world.low_rank_BR if table == "low_rank" else world.queries.mean_BD
    took = seconds(lambda: index.preselect(table, given_BD, k, world.mask))
    rows_BK = index.preselect(table, given_BD, k, world.mask).at_BM[:NUM_CHECKED]
    exact_BN = queries_BD[:NUM_CHECKED].double() @ vectors_ND.double().T
    exact_BN = world.mask.narrow(0, len(rows_BK)).hide(exact_BN, 0)
    worst_kept_B = exact_BN.gather(1, rows_BK.clamp_min(0)).masked_fill(rows_BK == NO_ITEM, torch.inf).amin(dim=1)
    worst = float((exact_BN.topk(k, dim=1).values[:, -1] - worst_kept_B).max())
    flop = 2 * len(world.mask) * vectors_ND.numel()
    note = f"worst kept misses the last by {worst:.1e}"
    world.report(f"stage 1 {name}: fused", took, len(world.mask), flop, note)


def _study_eager(world: World, name: str, queries_BD: Tensor, vectors_ND: Tensor) -> None:
    """Time the same stage 1 in plain torch, a tile of queries at a time."""
    num_queries, k = len(world.mask), min(NUM_KEPT, len(vectors_ND))
    step = max(1, EAGER_BYTES // (2 * len(vectors_ND)))
    tiles = [(low, min(low + step, num_queries)) for low in range(0, num_queries, step)]
    masks = [world.mask.narrow(low, high) for low, high in tiles]

    def eager() -> None:
        for (low, high), mask in zip(tiles, masks, strict=True):
            mask.hide(queries_BD[low:high] @ vectors_ND.T, 0).topk(k, dim=1)

    world.report(f"stage 1 {name}: torch", seconds(eager), num_queries, 2 * num_queries * vectors_ND.numel())


def study_stage2(world: World, dtype: torch.dtype) -> None:
    """Time the scores of random candidates in one type, fused and in plain torch."""
    index = TritonIndex(world.mol, world.shard, precision="float32" if dtype == torch.float32 else "bfloat16")
    num_queries, name = len(world.mask), str(dtype)[6:]
    rows_BM = torch.randint(0, len(index), (num_queries, NUM_CANDIDATES), device=DEVICE)
    flop = rows_BM.numel() * world.flop_per_pair * (TF32_SLOWDOWN if dtype == torch.float32 else 1)
    took = seconds(lambda: index.score(world.queries, rows_BM, is_quick=True))
    checked, rows_CM = world.queries.take(slice(0, NUM_CHECKED)), rows_BM[:NUM_CHECKED]
    error = (index.score(checked, rows_CM, is_quick=True) - index.rescore(checked, rows_CM)).abs().max()
    world.report(f"stage 2 {name}: fused", took, num_queries, flop, f"error {float(error):.1e}")
    mol = MixtureOfLogits(ENCODING_DIM, world.mol.settings).eval().requires_grad_(False).to(DEVICE, dtype)
    step = max(1, EAGER_PAIRS // NUM_CANDIDATES)

    def eager() -> None:
        for low in range(0, num_queries, step):
            items = world.shard.items.take(rows_BM[low : low + step])
            side = world.queries.take(slice(low, low + step))
            queries = QuerySide(side.components_BQD.to(dtype)[:, None], side.gate_BP.to(dtype)[:, None])
            mol(queries, ItemSide(items.components_NXD.to(dtype), items.gate_NP.to(dtype)))

    world.report(f"stage 2 {name}: torch", seconds(eager), num_queries, flop)
    took = seconds(lambda: index.rescore(world.queries, rows_BM[:, :NUM_RESCORED]))
    flop = num_queries * NUM_RESCORED * world.flop_per_pair
    world.report(f"float64 rescoring of {NUM_RESCORED}", took, num_queries, flop)


def study_scan(world: World) -> None:
    """Time the exact scan, fused and in plain torch, and say which share of the pairs it had to score."""
    index, num_queries = TritonIndex(world.mol, world.shard), len(world.mask)
    floor_B = torch.full((num_queries,), -torch.inf, device=DEVICE)

    def scan() -> Tensor:
        return index.scan(world.queries, NUM_EXCLUDED, world.mask, floor_B, len(index))[0].at_BM

    num_scored: list[int] = []

    def counted(
        rows: ItemRows, weights: MolWeights, queries: MolQueries, lists: ItemLists, floor_B: Tensor
    ) -> tuple[Tensor, ItemLists]:
        num_scored.append(int(lists.counts_B.sum()))
        return score_above(rows, weights, queries, lists, floor_B)

    with patch.object(triton_index, "score_above", counted):
        rows_BK = scan()
    share = sum(num_scored) / (num_queries * len(index))
    flop = TF32_SLOWDOWN * num_queries * len(index) * world.flop_per_pair
    note = f"{share:.0%} of pairs scored; worst kept misses the last by {_worst_miss(world, index, rows_BK):.1e}"
    world.report("scan float32: fused", seconds(scan), num_queries, flop, note)
    few = world.queries.take(slice(0, 64))
    step = max(1, EAGER_PAIRS // len(few.gate_BP))
    timed = min(len(index), 20 * step)  # the rest would take as long again and again
    tiles = [world.shard.items.take(slice(low, min(low + step, timed))) for low in range(0, timed, step)]
    took = seconds(lambda: [world.mol(few, tile) for tile in tiles]) * len(index) / timed
    flop = TF32_SLOWDOWN * len(few.gate_BP) * len(index) * world.flop_per_pair
    world.report("scan float32: torch, without top-k", took, len(few.gate_BP), flop)


def _worst_miss(world: World, index: TritonIndex, rows_BK: Tensor) -> float:
    """By how much, at most, the last kept item of the first two queries falls short of the true last one."""
    worst = -float("inf")
    for query in range(min(2, len(rows_BK))):
        side, mask = world.queries.take(slice(query, query + 1)), world.mask.narrow(query, query + 1)
        tiles = torch.split(torch.arange(len(index), device=DEVICE), 65_536)
        exact_N = mask.hide(torch.cat([index.rescore(side, tile[None]) for tile in tiles], dim=1), 0)[0]
        kept = rows_BK[query][rows_BK[query] != NO_ITEM]
        worst = max(worst, float(exact_N.topk(len(kept)).values[-1] - exact_N[kept].min()))
    return worst


@torch.inference_mode()
def main(num_queries: int, num_items: list[int]) -> None:
    """Study both numbers of pairs at each number of items."""
    peak = peak_flops()
    print(f"{DEVICE}: bfloat16 {peak / 1e12:.1f} TFLOP/s")
    for num_pairs in (32, 64):
        for number in num_items:
            print(f"P = {num_pairs}, {number:,} items, {num_queries:,} queries", flush=True)
            world = make_world(num_pairs, num_queries, number, peak)
            study_tables(world)
            study_stage2(world, torch.float32)
            study_stage2(world, torch.bfloat16)
            study_scan(world)
