"""The cost of fewer bits: recall of stage 1 and errors of stage 2, by the type of the numbers.

MODEL as in the study `recall`; the backend is this machine's. Part one: the tables of stage 1 in each type that the
backend has, and the share of the true best 100 among the first K'. Part two: scores of stage 2 in each type against the
model in float64, beside the gap between the k-th score and the next, and how many lists the type alone would get wrong.
The float64 scores are rounded to float32, as they are published, so that a few are equal.

B queries, N items, K true best, M candidates.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor

from jobs.studies.models.world import BUDGETS, SMALL_K, K, World, open_world
from jobs.studies.searches import lay_out, preselect, table_of
from pipeline.model.mol import ItemSide, QuerySide
from pipeline.retrieval.index import ShardIndex
from pipeline.retrieval.low_rank_fit import fit_low_rank

NUM_SAMPLE, RANKS = 2_048, (32, 64, 128)
NUM_SCORED = 1_000


def report_tables(world: World) -> None:
    """Print the share of the true best that each table keeps, in each type."""
    tables = {"mean": (world.items.mean_ND, world.queries.mean_BD)}
    for rank in RANKS:
        fit = fit_low_rank(world.sample, world.sample_LN, [rank])
        tables[f"low rank {rank}"] = (table_of(fit.low_rank, world.sample_LN), fit.query_map(world.queries))
    for label, (table_NR, queries_BR) in tables.items():
        for dtype in lay_out(world.mol, world.items).table_dtypes:
            index = lay_out(world.mol, world.items, table_NR, dtype)
            cells = [f"{_share_kept(index, queries_BR, world, num_kept):.4f}" for num_kept in BUDGETS]
            print(f"{label:14s} {dtype:9s} | " + " | ".join(cells), flush=True)


def _share_kept(index: ShardIndex, queries_BR: Tensor, world: World, num_kept: int) -> float:
    kept_BM = preselect(index, "low_rank", queries_BR, min(num_kept, len(index))).at_BM
    is_kept_BN = torch.zeros(world.truth_BN.shape, dtype=torch.bool).scatter(1, kept_BM, True)
    return float(is_kept_BN.gather(1, world.best_BK).double().mean())


def report_scores(world: World) -> None:
    """Print the gaps between scores, and the errors of each type in lists, ranks and scores."""
    index = lay_out(world.mol, world.items)
    rows_BM = world.truth_BN.topk(min(NUM_SCORED, len(index)), dim=1).indices
    exact_BM = _in_double(world, rows_BM)
    scores = {
        "bfloat16": index.score(world.queries, rows_BM, is_quick=True),
        "float32": index.score(world.queries, rows_BM),
        "float64": index.rescore(world.queries, rows_BM),
    }
    for k in (SMALL_K, K):
        best = exact_BM.sort(dim=1, descending=True)
        gaps = (best.values[:, k - 1] - best.values[:, k]).quantile(torch.tensor([0.01, 0.1, 0.5]).double())
        print(f"k = {k}: gap to the next score, 1, 10, 50 %: " + ", ".join(f"{gap:.1e}" for gap in gaps.tolist()))
        for name, scores_BM in scores.items():
            by_type_BK = scores_BM.double().sort(dim=1, descending=True, stable=True).indices[:, :k]
            true_BK = best.indices[:, :k]
            has_others_B = (by_type_BK.sort(dim=1).values != true_BK.sort(dim=1).values).any(dim=1)
            is_moved_BK = by_type_BK != true_BK
            print(
                f"    {name:9s} lists with another item {has_others_B.double().mean():.4f}, "
                f"ranks with another item {is_moved_BK.double().mean():.5f}",
                flush=True,
            )
    for name, scores_BM in scores.items():
        errors = (scores_BM.double() - exact_BM).abs().flatten()
        print(f"{name:9s} error of a score: median {errors.median():.1e}, largest {errors.max():.1e}", flush=True)


def _in_double(world: World, rows_BM: Tensor) -> Tensor:
    """The model's own scores (B, M) of these items, computed in float64 from the float32 sides."""
    mol = copy.deepcopy(world.mol).double()
    scores = []
    for query, rows_M in enumerate(rows_BM):
        one = world.queries.take(slice(query, query + 1))
        items = world.items.take(rows_M)
        side = QuerySide(one.components_BQD.double(), one.gate_BP.double())
        scores.append(mol(side, ItemSide(items.components_NXD.double(), items.gate_NP.double()))[0])
    return torch.stack(scores)


@torch.inference_mode()
def main(models: list[str], data: Path, out: Path) -> None:
    """Measure one model after the other."""
    torch.set_num_threads(1)
    for model in models:
        world = open_world(model, data, out, NUM_SAMPLE)
        backend = type(lay_out(world.mol, world.items)).__name__
        print(f"\n{model}, {backend}: share of the true best {K} in the first {BUDGETS}")
        report_tables(world)
        report_scores(world)
