"""Where TopKLowRank breaks, and other ways to fit it: python -m tests.studies.real_breaks DATA OUT MODEL ...

DATA, OUT and MODEL as in `real_recall`. Everything at one rank; recall of the true best 100 in the first K' of stage 1.
Part one changes the sample: few users, users of the past, only long or only short histories, made-up histories (as many
events as tonight's users have, of items drawn by popularity), with recall for short and long queries apart. Part two
changes the fit on a good sample.

B queries, L sample queries, N items, R rank, Z features.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.data.interactions import Int64, Sequences, offsets_of
from pipeline.model.mol import QuerySide
from pipeline.retrieval import low_rank
from tests.studies.real_models import NUM_VALIDATION, Histories, permuted_users, read_histories
from tests.studies.real_world import (
    BUDGETS,
    NUM_QUERIES,
    World,
    open_world,
    query_side,
    ranks_of,
    report,
    score_all,
)

RANK, NUM_SAMPLE, NUM_CHANGED = 64, 2_048, 1_024
FEW = ((128, 32), (256, 64), (512, 64), (1_024, 64))  # users, rank
SHORT, LONG = 3, 8  # at most, at least so many events
COLD = 5  # fewer training events than this
NUM_RELU = 2_048


@dataclass(frozen=True)
class Linear:
    """The fit in parts, on all items: deviations predicted for the queries and for the sample, the mean apart."""

    deviations_BN: Tensor
    mean_N: Tensor
    predicted_LN: Tensor  # deviations of the sample
    error_N: Tensor  # root mean square of what the prediction leaves of the sample's scores


def fit_linear(
    world: World, scores_LN: Tensor, rank: int, ridge: float = 0.01, weights_N: Tensor | None = None
) -> Linear:
    """As `fit_low_rank` does, without holding out any of the sample; `weights_N` says which items matter to the fit."""
    weighted_LN = scores_LN if weights_N is None else scores_LN * weights_N.sqrt()
    directions = low_rank._directions(weighted_LN, rank)
    sample = world.sample.take(slice(0, len(scores_LN)))
    query_map = low_rank._ridge_map(low_rank.query_features(sample), directions, ridge, 0.0)
    mean_N = scores_LN.mean(dim=0)
    table_NR = (scores_LN - mean_N).T @ directions.basis_LR
    predicted_LN = query_map(sample) @ table_NR.T
    error_N = (scores_LN - mean_N - predicted_LN).square().mean(dim=0).sqrt()
    return Linear(query_map(world.queries) @ table_NR.T, mean_N, predicted_LN, error_N)


def report_fits(world: World) -> None:
    scores_LN = world.sample_LN[:NUM_SAMPLE]
    base = fit_linear(world, scores_LN, RANK)
    centred_N = base.mean_N - base.mean_N.mean()
    for mean_weight in (0.0, 0.25, 0.5, 1.0):
        predicted_BN = base.deviations_BN + mean_weight * centred_N
        report(f"α {mean_weight}", predicted_BN, world)
        for error_weight in (1.0, 2.0, 3.0, 4.0):
            report(f"α {mean_weight} + {error_weight} error", predicted_BN + error_weight * base.error_N, world)
        spread_N = base.predicted_LN.square().mean(dim=0).sqrt()
        for power in (0.25, 0.5, 1.0):
            report(f"α {mean_weight} over spread^{power}", predicted_BN / spread_N**power, world)
    is_top_LN = scores_LN >= scores_LN.topk(200, dim=1).values[:, -1:]
    share_N = is_top_LN.float().mean(dim=0)
    for floor in (0.1, 0.01):
        found = fit_linear(world, scores_LN, RANK, weights_N=share_N / share_N.mean() + floor)
        for mean_weight in (0.0, 0.5, 1.0):
            predicted_BN = found.deviations_BN + mean_weight * found.mean_N
            report(f"items by their share + {floor}, α {mean_weight}", predicted_BN, world)
    plain = low_rank.query_features
    low_rank.query_features = with_relu(world, plain)
    found = fit_linear(world, scores_LN, RANK, ridge=0.1)
    low_rank.query_features = plain
    for mean_weight in (0.0, 0.5, 1.0):
        report(f"{NUM_RELU} ReLU features, α {mean_weight}", found.deviations_BN + mean_weight * found.mean_N, world)


def with_relu(world: World, plain: Callable[[QuerySide], Tensor]) -> Callable[[QuerySide], Tensor]:
    """The plain features and random ReLU ones beside them; 1 stays the last."""
    features_LZ = plain(world.sample)
    mean_Z, scale_Z = features_LZ.mean(dim=0), features_LZ.std(dim=0).clamp_min(1e-6)
    width = (features_LZ.shape[1] - 1) // 2  # without the absolute values
    random_ZF = torch.randn(width, NUM_RELU, generator=torch.Generator().manual_seed(0)) / width**0.5

    def features(queries: QuerySide) -> Tensor:
        values_BZ = plain(queries)
        inputs_BZ = ((values_BZ - mean_Z) / scale_Z)[:, :width]
        return torch.cat([(inputs_BZ @ random_ZF).relu(), values_BZ], dim=1)

    return features


def report_sample(label: str, world: World, sample: QuerySide, scores_LN: Tensor, rank: int, lengths_B: Tensor) -> None:
    """Recall at each K' over all queries, the short and the long ones."""
    found = low_rank.fit_low_rank(sample, scores_LN, [rank])
    table_NR = found.low_rank.place(scores_LN[: len(found.low_rank.sample.gate_BP)])
    ranks_BK = ranks_of(found.query_map(world.queries) @ table_NR.T, world.best_BK)
    groups = (lengths_B > 0, lengths_B <= SHORT, lengths_B >= LONG)
    cells = [" ".join(f"{(ranks_BK[group] < budget).float().mean():.3f}" for group in groups) for budget in BUDGETS]
    print(f"{label:44s} α {found.mean_weight:4} | " + " | ".join(cells), flush=True)


def report_samples(world: World, histories: Histories) -> None:
    users = permuted_users(histories)[NUM_VALIDATION:]
    lengths_B = torch.from_numpy(histories.tonight.lengths[users[:NUM_QUERIES]])
    print(
        f"queries: all {NUM_QUERIES}, {(lengths_B <= SHORT).sum()} short, {(lengths_B >= LONG).sum()} long", flush=True
    )
    for num_sample, rank in FEW:
        sample = world.sample.take(slice(0, num_sample))
        report_sample(f"{num_sample} users, r {rank}", world, sample, world.sample_LN[:num_sample], rank, lengths_B)
    for label, (sequences, chosen) in other_samples(histories).items():
        sample = query_side(world.model, sequences, chosen)
        scores_LN = score_all(world.mol, sample, world.items)
        report_sample(f"{len(chosen)} {label}, r {RANK}", world, sample, scores_LN, RANK, lengths_B)


def other_samples(histories: Histories) -> dict[str, tuple[Sequences, Int64]]:
    rng = np.random.default_rng(0)
    lengths = histories.train.lengths

    wanted = {
        "of the past": lengths > 0,
        "of the first tenth of the past": np.arange(len(lengths)) < len(lengths) // 10,
        f"of the past with ≥ {LONG} events": lengths >= LONG,
        f"of the past with ≤ {SHORT} events": lengths <= SHORT,
    }
    users = {label: np.flatnonzero(is_wanted) for label, is_wanted in wanted.items()}
    found = {
        label: (histories.train, rng.choice(some, NUM_CHANGED, replace=False))
        for label, some in users.items()
        if len(some) >= NUM_CHANGED
    }
    tonight = rng.choice(histories.tonight.lengths, NUM_CHANGED)
    made_up = rng.choice(histories.train.item_rows, tonight.sum())
    return found | {"made up": (Sequences(offsets_of(tonight), made_up), np.arange(NUM_CHANGED))}


def report_cold(world: World) -> None:
    """Recall of the true best items that training has hardly seen, beside that of all."""
    is_cold_BK = (world.counts_N < COLD)[world.best_BK]
    base = fit_linear(world, world.sample_LN[:NUM_SAMPLE], RANK)
    print(
        f"items with fewer than {COLD} training events: {(world.counts_N < COLD).float().mean():.3f} of all, "
        f"{is_cold_BK.float().mean():.4f} of the true best"
    )
    predictions = {f"α {weight}": base.deviations_BN + weight * base.mean_N for weight in (0.0, 0.5, 1.0)}
    for label, predicted_BN in {"TopKAvg": world.queries.mean_BD @ world.items.mean_ND.T, **predictions}.items():
        ranks_BK = ranks_of(predicted_BN, world.best_BK)
        cold = [f"{(ranks_BK < budget)[is_cold_BK].float().mean():.3f}" for budget in BUDGETS]
        print(f"{label:20s} cold items at K' {BUDGETS}: " + " ".join(cold), flush=True)


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    data, out = Path(sys.argv[1]), Path(sys.argv[2])
    for model in sys.argv[3:]:
        name, way, seed = model.split("/")
        world = open_world(data, out, name, way, int(seed), NUM_SAMPLE)
        print(f"\n{model}, r = {RANK}: recall@10, @100 (head middle tail) at K' of {BUDGETS}")
        report_fits(world)
        report_cold(world)
        report_samples(world, read_histories(data, name))


if __name__ == "__main__":
    main()
