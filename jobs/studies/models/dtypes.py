"""What fewer bits cost on real models: python -m jobs.studies.models.dtypes DATA OUT MODEL ...

DATA, OUT and MODEL as in `real_recall`; the backend is this machine's. Part one: the tables of stage 1 in each type
that the backend has, and the share of the true best 100 among their first K'. Part two: scores of stage 2 in each type
against the model in float64, beside the gap between the k-th score and the next, and how many lists the type alone
would get wrong; the float64 ones as they are published, rounded to float32, so that a few are equal.

B queries, N items, K true best, M candidates.
"""

import copy
import sys
from pathlib import Path

import torch
from torch import Tensor

from jobs.studies.models.world import BUDGETS, NUM_QUERIES, SMALL_K, K, World, open_world
from pipeline.model.mol import ItemSide, QuerySide
from pipeline.retrieval import low_rank
from pipeline.retrieval.backends import open_index
from pipeline.retrieval.filters import mask_shard, no_exclusions
from pipeline.retrieval.index import ShardIndex
from pipeline.retrieval.shard import make_shard
from pipeline.settings import SearchSettings

NUM_SAMPLE, RANKS = 2_048, (32, 64, 128)
NUM_SCORED = 1_000


def report_tables(world: World) -> None:
    vectors = {"mean": (world.items.mean_ND, world.queries.mean_BD)}
    for rank in RANKS:
        fit = low_rank.fit_low_rank(world.sample.take(slice(0, NUM_SAMPLE)), world.sample_LN[:NUM_SAMPLE], [rank])
        table_NR = fit.low_rank.place(world.sample_LN[fit.low_rank.at_A])
        vectors[f"low rank {rank}"] = (table_NR, fit.query_map(world.queries))
    for label, (table_NR, queries_BR) in vectors.items():
        for dtype in index_of(world).table_dtypes:
            index = index_of(world, table_NR, dtype)
            cells = [f"{_kept(index, queries_BR, world, num_kept):.4f}" for num_kept in BUDGETS]
            print(f"{label:14s} {dtype:9s} | " + " | ".join(cells), flush=True)


def index_of(world: World, table_NR: Tensor | None = None, dtype: str = "bfloat16") -> ShardIndex:
    settings = SearchSettings.model_validate({"table_dtype": dtype})
    return open_index(world.mol, make_shard(0, world.items, table_NR), settings)


def _kept(index: ShardIndex, queries_BR: Tensor, world: World, num_kept: int) -> float:
    mask = mask_shard(index.is_eligible_N, 0, no_exclusions(NUM_QUERIES))
    kept = index.preselect("low_rank", queries_BR, num_kept, mask)
    is_kept_BN = torch.zeros(world.truth_BN.shape, dtype=torch.bool).scatter(1, kept.at_BM, True)
    return float(is_kept_BN.gather(1, world.best_BK).double().mean())


def report_scores(world: World) -> None:
    index, at_BM = index_of(world), world.truth_BN.topk(NUM_SCORED, dim=1).indices
    exact_BM = _in_double(world, at_BM)
    scores = {
        "bfloat16": index.score(world.queries, at_BM, is_quick=True),
        "float32": index.score(world.queries, at_BM),
        "float64": index.rescore(world.queries, at_BM),
    }
    for k in (SMALL_K, K):
        best = exact_BM.sort(dim=1, descending=True)
        gaps = (best.values[:, k - 1] - best.values[:, k]).quantile(torch.tensor([0.01, 0.1, 0.5]).double())
        print(f"k = {k}: gap to the next score, 1, 10, 50 %: " + ", ".join(f"{gap:.1e}" for gap in gaps.tolist()))
        for name, found_BM in scores.items():
            by_type_BK = found_BM.double().sort(dim=1, descending=True, stable=True).indices[:, :k]
            true_BK = best.indices[:, :k]
            has_others_B = (by_type_BK.sort(dim=1).values != true_BK.sort(dim=1).values).any(dim=1)
            is_moved_BK = by_type_BK != true_BK
            print(
                f"    {name:9s} lists with another item {has_others_B.double().mean():.4f}, "
                f"ranks with another item {is_moved_BK.double().mean():.5f}",
                flush=True,
            )
    for name, found_BM in scores.items():
        errors = (found_BM.double() - exact_BM).abs().flatten()
        print(f"{name:9s} error of a score: median {errors.median():.1e}, largest {errors.max():.1e}", flush=True)


def _in_double(world: World, at_BM: Tensor) -> Tensor:
    """The model's own scores of these pairs, everything in float64; sides as they are stored."""
    mol = copy.deepcopy(world.mol).double()
    scores = []
    for query, at_M in enumerate(at_BM):
        one = world.queries.take(slice(query, query + 1))
        items = world.items.take(at_M)
        side = QuerySide(one.components_BQD.double(), one.gate_BP.double())
        scores.append(mol(side, ItemSide(items.components_NXD.double(), items.gate_NP.double()))[0])
    return torch.stack(scores)


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    for model in sys.argv[3:]:
        name, way, seed = model.split("/")
        world = open_world(Path(sys.argv[1]), Path(sys.argv[2]), name, way, int(seed), NUM_SAMPLE)
        print(f"\n{model}, {type(index_of(world)).__name__}: share of the true best {K} in the first {BUDGETS}")
        report_tables(world)
        report_scores(world)


if __name__ == "__main__":
    main()
