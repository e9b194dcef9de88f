"""Speed and correctness of the GPU backend: python -m jobs.studies.kernels.gpu_speed [queries] [items ...]

Needs a CUDA device, torch and triton, and nothing else of the project's dependencies. For 32 and 64 pairs of components
and each number of items (1 and 10 million unless given) it times stage 1, stage 2 and the exact scan beside plain
torch, states each as a share of what the device itself reaches in a large matrix product, and compares results with
float64. Data are clustered unit vectors and an untrained gate, so the share of items that the scan must score is not
that of a trained model. Without a GPU a tiny size runs in the interpreter, for the script's own sake.
"""

import os
import statistics
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.functional import normalize

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from pipeline.model.mol import ItemSide, MixtureOfLogits, QuerySide
from pipeline.retrieval.backends.triton import index as triton_index
from pipeline.retrieval.backends.triton import launch as triton_launch
from pipeline.retrieval.backends.triton.index import TritonIndex
from pipeline.retrieval.backends.triton.tables import quantised_table
from pipeline.retrieval.filters import ShardMask
from pipeline.retrieval.shard import make_shard
from pipeline.retrieval.topk import NO_ITEM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_KEPT, NUM_CANDIDATES, NUM_CHECKED, NUM_EXCLUDED, RANK = 1_000, 2_000, 16, 100, 128
REPEATS = 5 if DEVICE == "cuda" else 1
EAGER_PAIRS = 1 << 18  # of the plain MoL at once
NUM_CLUSTERS = 2_000


def seconds(run):
    """Median wall time, after one run that compiles."""
    times = []
    for _ in range(REPEATS + 1):
        synchronize()
        started = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def ceilings():
    """FLOP/s of a large bfloat16 product and bytes/s of a copy, read and write counted."""
    size = 8_192 if DEVICE == "cuda" else 256
    left, right = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(size * size * 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size**3 / seconds(lambda: left @ right), 2 * source.nbytes / seconds(lambda: target.copy_(source))


class World:
    def __init__(self, num_pairs, num_queries, num_items):
        torch.manual_seed(0)
        x, d = (4, 64) if num_pairs == 32 else (8, 32)
        settings = SimpleNamespace(
            num_query_components=8, num_item_components=x, component_dim=d, query_hidden_dim=16, gate_hidden_dim=128,
            query_activation="swiglu", temperature=0.05, num_user_hashes=0, query_dropout=0.0, user_dropout=0.0,
            item_dropout=0.0, cross_dropout=0.0, gate_dropout=0.0,
        )  # fmt: skip
        self.mol = MixtureOfLogits(16, settings).eval().requires_grad_(False).to(DEVICE)
        self.flop_per_pair = 2 * num_pairs * d + 4 * num_pairs * 128
        centres = torch.randn(NUM_CLUSTERS, d, device=DEVICE)
        self.queries = QuerySide(clustered(centres, num_queries, 8), torch.randn(num_queries, num_pairs, device=DEVICE))
        self.items = ItemSide(clustered(centres, num_items, x), torch.randn(num_items, num_pairs, device=DEVICE))
        self.low_rank_NR = torch.randn(num_items, RANK, device=DEVICE)
        self.low_rank_BR = torch.randn(num_queries, RANK, device=DEVICE)
        rng = np.random.default_rng(0)
        excluded = np.sort(rng.integers(0, num_items, (num_queries, min(NUM_EXCLUDED, num_items // 4))), axis=1)
        lists = [np.unique(row).astype(np.int32) for row in excluded]
        offsets = np.cumsum([0] + [len(row) for row in lists])
        is_eligible = torch.rand(num_items, device=DEVICE) > 0.05
        self.mask = ShardMask(is_eligible, offsets, np.concatenate(lists))

    def index(self, **options):
        return TritonIndex(self.mol, make_shard(0, self.items, self.low_rank_NR), **options)


def clustered(centres, num, components):
    at = torch.randint(0, len(centres), (num, components), device=DEVICE)
    return normalize(centres[at] + 0.7 * torch.randn(num, components, centres.shape[1], device=DEVICE), dim=-1)


def report(name, took, num_queries, flop, ceiling, note=""):
    share = flop / took / ceiling
    print(
        f"  {name:34} {took * 1e3:9.2f} ms {num_queries / took:12,.0f} queries/s {share:7.1%} of peak  {note}",
        flush=True,
    )


def study_stage1(world, index, name, table, queries_BD, vectors_ND, peak):
    """`vectors_ND` and `queries_BD` as the table holds them, for the oracle and plain torch."""
    num_queries, k = len(world.mask), min(NUM_KEPT, len(index))
    given_BD = world.low_rank_BR if table == "low_rank" else world.queries.mean_BD
    flop = 2 * num_queries * vectors_ND.numel()
    took = seconds(lambda: index.preselect(table, given_BD, k, world.mask))
    found = index.preselect(table, given_BD, k, world.mask)
    exact = world.mask.narrow(0, NUM_CHECKED).hide(queries_BD[:NUM_CHECKED].double() @ vectors_ND.double().T, 0)
    at = found.at_BM[:NUM_CHECKED]
    kept = exact.gather(1, at.clamp_min(0)).masked_fill(at == NO_ITEM, torch.inf).amin(dim=1)
    worst = float((exact.topk(k, dim=1).values[:, -1] - kept).max())
    report(f"stage 1 {name}: fused", took, num_queries, flop, peak, f"worst kept misses the last by {worst:.1e}")
    if vectors_ND.dtype != torch.bfloat16:
        return
    step = max(1, (1 << 31) // len(vectors_ND))
    masks = [world.mask.narrow(low, min(low + step, num_queries)) for low in range(0, num_queries, step)]

    def eager():
        for at, mask in enumerate(masks):
            mask.hide(queries_BD[at * step : (at + 1) * step] @ vectors_ND.T, 0).topk(k, dim=1)

    report(f"stage 1 {name}: torch", seconds(eager), num_queries, flop, peak)


def study_tables(world, index, index8, peak):
    mean_ND, mean_BD = world.items.components_NXD.mean(dim=1).bfloat16(), world.queries.mean_BD.bfloat16()
    study_stage1(world, index, "mean", "mean", mean_BD, mean_ND, peak)
    rank = f"rank {RANK}"
    study_stage1(world, index, rank, "low_rank", world.low_rank_BR.bfloat16(), world.low_rank_NR.bfloat16(), peak)
    table = quantised_table(world.low_rank_NR)
    whole_BR = table.prepare(world.low_rank_BR).vectors_B1D[:, 0, :RANK]
    study_stage1(world, index8, f"{rank} int8", "low_rank", whole_BR, table.vectors_N1D[:, 0], peak)


def study_stage2(world, precision, index, peak):
    num_queries = len(world.mask)
    at_BM = torch.randint(0, len(index), (num_queries, NUM_CANDIDATES), device=DEVICE)
    flop = at_BM.numel() * world.flop_per_pair
    took = seconds(lambda: index.score(world.queries, at_BM, is_quick=True))
    few = world.queries.take(slice(0, NUM_CHECKED))
    error = (index.score(few, at_BM[:NUM_CHECKED], is_quick=True) - index.rescore(few, at_BM[:NUM_CHECKED])).abs().max()
    ceiling = peak / 6 if precision == "float32" else peak  # three products of tf32, at half the rate
    note = f"error {float(error):.1e}"
    report(f"stage 2 {precision}: fused", took, num_queries, flop, ceiling, note)
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    mol = MixtureOfLogits(16, world.mol.settings).eval().requires_grad_(False).to(DEVICE, dtype)
    step = max(1, EAGER_PAIRS // NUM_CANDIDATES)

    def eager():
        for low in range(0, num_queries, step):
            part = slice(low, low + step)
            gathered = world.items.take(at_BM[part])
            items = ItemSide(gathered.components_NXD.to(dtype), gathered.gate_NP.to(dtype))
            side = world.queries.take(part)
            mol(QuerySide(side.components_BQD.to(dtype)[:, None], side.gate_BP.to(dtype)[:, None]), items)

    report(f"stage 2 {precision}: torch", seconds(eager), num_queries, flop, ceiling)
    report(f"float64 rescoring of {NUM_KEPT // 10}",
           seconds(lambda: index.rescore(world.queries, at_BM[:, : NUM_KEPT // 10])), num_queries,
           flop * NUM_KEPT // 10 // NUM_CANDIDATES, peak)  # fmt: skip


def study_scan(world, index, peak):
    num_queries, scored = len(world.mask), []
    floor_B = torch.full((num_queries,), -torch.inf, device=DEVICE)
    score_above = triton_index.score_above
    triton_index.score_above = lambda *args: scored.append(args[3].counts_B.sum()) or score_above(*args)
    found, _ = index.scan(world.queries, 128, world.mask, floor_B, len(index))
    share = float(torch.stack(scored).sum()) / (num_queries * len(index))
    triton_index.score_above = score_above
    took = seconds(lambda: index.scan(world.queries, 128, world.mask, floor_B, len(index)))
    flop = num_queries * len(index) * world.flop_per_pair
    worst = -torch.inf
    for b in range(min(2, num_queries)):
        query, mask = world.queries.take(slice(b, b + 1)), world.mask.narrow(b, b + 1)
        steps = torch.arange(len(index), device=DEVICE).split(65_536)
        exact = mask.hide(torch.cat([index.rescore(query, at[None]) for at in steps], dim=1), 0)[0]
        kept = found.at_BM[b][found.at_BM[b] != NO_ITEM]
        worst = max(worst, float(exact.topk(len(kept)).values[-1] - exact[kept].min()))
    note = f"{share:.0%} of pairs scored; worst kept misses the last by {worst:.1e}"
    report("scan float32: fused", took, num_queries, flop, peak / 6, note)
    few, step = world.queries.take(slice(0, 64)), max(1, EAGER_PAIRS // 64)
    some = min(len(index), 20 * step)
    eager = seconds(lambda: [world.mol(few, world.items.take(slice(a, a + step))) for a in range(0, some, step)])
    report("scan float32: torch, without top-k", eager * len(index) / some, len(few.gate_BP),
           len(few.gate_BP) * len(index) * world.flop_per_pair, peak / 6)  # fmt: skip


@torch.inference_mode()
def main():
    num_queries = int(sys.argv[1]) if len(sys.argv) > 1 else 1_024
    sizes = [int(size) for size in sys.argv[2:]] or [1_000_000, 10_000_000]
    peak, bandwidth = ceilings()
    print(
        f"{DEVICE}: bfloat16 {peak / 1e12:.1f} TFLOP/s, copy {bandwidth / 1e12:.2f} TB/s, {triton_launch.NUM_PROGRAMS=}"
    )
    for num_pairs in (32, 64):
        for num_items in sizes:
            print(f"P = {num_pairs}, {num_items:,} items, {num_queries:,} queries")
            world = World(num_pairs, num_queries, num_items)
            index = world.index()
            study_tables(world, index, world.index(low_rank_bits=8), peak)
            study_stage2(world, "float32", index, peak)
            study_stage2(world, "bfloat16", world.index(precision="bfloat16"), peak)
            study_scan(world, index, peak)


if __name__ == "__main__":
    main()
