"""Where TopKLowRank breaks, and other ways to fit it: python -m jobs.studies.models.breaks DATA OUT MODEL ...

DATA, OUT and MODEL as in `real_recall`. Recall of the true best 10 and 100 in the first K' of stage 1, at rank 64
unless a row says otherwise. In five parts: other fits on a good sample; fewer anchors; items that training has hardly
seen; other samples (few users, users of the past, only long or only short histories, made-up histories of as many
events as tonight's users have, of items drawn by popularity), with recall for short and long queries apart; the same
model with flatter or sharper gates, and with only some of its components.

B queries, L sample queries, N items, R rank, T best items, Z features.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jobs.studies.models.train import NUM_VALIDATION, Histories, permuted_users, read_histories
from jobs.studies.models.world import (
    BUDGETS,
    ITEMS_AT_ONCE,
    NUM_QUERIES,
    World,
    open_world,
    query_side,
    ranks_of,
    report,
    score_all,
    world_of,
)
from pipeline.data.lists import Int64, Sequences, offsets_of
from pipeline.model.model import RetrievalModel
from pipeline.model.mol import QuerySide
from pipeline.retrieval import low_rank

RANK, NUM_SAMPLE, NUM_CHANGED = 64, 2_048, 1_024
NUM_TOP = 1_000  # best items of a query that weigh more
MEAN_WEIGHTS = (0.0, 0.5, 1.0)
ITEM_SIDE_RANKS = (16, 32, 64)
FEW = ((128, 32), (256, 64), (512, 64), (1_024, 64))  # users, rank
SHORT, LONG = 3, 8  # at most, at least so many events
COLD = 5  # fewer training events than this
NUM_RELU = 2_048
ANCHOR_RANKS, ANCHORS_PER_RANK = (32, 64, 128), (16, 8, 4, 2)
GATE_SCALES = (0.0, 0.5, 2.0, 4.0)


@dataclass(frozen=True)
class Linear:
    """A fit on all items without holding out any of the sample: nothing but what it is told is chosen."""

    sample_LR: Tensor
    queries_BR: Tensor
    table_NR: Tensor

    @property
    def predicted_BN(self) -> Tensor:
        return self.queries_BR @ self.table_NR.T


def fit_linear(
    world: World,
    rank: int = RANK,
    top_weight: float = 0.0,
    mean_weight: float = 0.0,
    ridge: float = 0.01,
    weights_N: Tensor | None = None,
) -> Linear:
    """As `fit_low_rank` does with these weights; `weights_N` says which items matter to the directions."""
    scores_LN, sample = world.sample_LN[:NUM_SAMPLE], world.sample.take(slice(0, NUM_SAMPLE))
    directions = low_rank._directions(scores_LN if weights_N is None else scores_LN * weights_N.sqrt(), rank)
    top = scores_LN.topk(NUM_TOP, dim=1)
    coefficients_LR, of_mean_LR = low_rank._top_coefficients(directions, top.values, top.indices, top_weight)
    wanted_LR, bias = coefficients_LR - mean_weight * of_mean_LR, mean_weight * directions.mean_size
    query_map = low_rank._ridge_map(low_rank.query_features(sample), wanted_LR, ridge, bias)
    return Linear(query_map(sample), query_map(world.queries), scores_LN.T @ directions.basis_LR)


def refit_items(fit: Linear, scores_LN: Tensor, top_weight: float) -> Tensor:
    """(N, R): every item's vector fitted to its scores at the sample's places, most to those where it is at the top.

    The other way round from `_top_coefficients`: the queries stay and the items move, not far from where they were.
    """
    thresholds_L1 = scores_LN.topk(NUM_TOP, dim=1).values[:, -1:]
    gram_RR = fit.sample_LR.T @ fit.sample_LR
    near_RR = gram_RR.diagonal().mean() * torch.eye(len(gram_RR))
    products_LS = (fit.sample_LR[:, :, None] * fit.sample_LR[:, None, :]).flatten(1)
    parts = []
    for low in range(0, scores_LN.shape[1], ITEMS_AT_ONCE):
        wanted_LN = scores_LN[:, low : low + ITEMS_AT_ONCE]
        extra_LN = top_weight * (wanted_LN >= thresholds_L1)
        grams_NRR = gram_RR + near_RR + (extra_LN.T @ products_LS).unflatten(1, gram_RR.shape)
        centred_LN = wanted_LN - scores_LN.mean(dim=1, keepdim=True)
        right_NR = ((1 + extra_LN) * centred_LN).T @ fit.sample_LR + fit.table_NR[low : low + ITEMS_AT_ONCE] @ near_RR
        parts.append(torch.cholesky_solve(right_NR[..., None], torch.linalg.cholesky(grams_NRR))[..., 0])
    return torch.cat(parts)


def report_fits(world: World) -> None:
    scores_LN = world.sample_LN[:NUM_SAMPLE]
    for top_weight in low_rank.TOP_WEIGHTS:
        for mean_weight in MEAN_WEIGHTS:
            found = fit_linear(world, top_weight=top_weight, mean_weight=mean_weight)
            report(f"top {top_weight}, α {mean_weight}", found.predicted_BN, world)
    for mean_weight in MEAN_WEIGHTS:
        found = fit_linear(world, mean_weight=mean_weight)
        spread_N = (found.sample_LR @ found.table_NR.T).std(dim=0)
        for power in (0.5, 1.0):
            report(f"α {mean_weight}, over spread^{power}", found.predicted_BN / spread_N**power, world)
    share_N = (scores_LN >= scores_LN.topk(200, dim=1).values[:, -1:]).float().mean(dim=0)
    for mean_weight in MEAN_WEIGHTS:
        found = fit_linear(world, mean_weight=mean_weight, weights_N=share_N / share_N.mean() + 0.1)
        report(f"directions by items' share, α {mean_weight}", found.predicted_BN, world)
    plain = low_rank.query_features
    low_rank.query_features = with_relu(world, plain)
    for mean_weight in MEAN_WEIGHTS:
        report(f"{NUM_RELU} ReLU, α {mean_weight}", fit_linear(world, 64, 0, mean_weight, 0.1).predicted_BN, world)
    low_rank.query_features = plain
    for rank in ITEM_SIDE_RANKS:
        found = fit_linear(world, rank, low_rank.TOP_WEIGHTS[-1], 0.5, 0.1)
        report(f"r {rank}, top {low_rank.TOP_WEIGHTS[-1]}, α 0.5", found.predicted_BN, world)
        for top_weight in (0.0, 100.0):
            table_NR = refit_items(found, scores_LN, top_weight)
            report(f"r {rank}, items refitted, top {top_weight}", found.queries_BR @ table_NR.T, world)


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
    found = low_rank.fit_low_rank(sample, scores_LN, [min(rank, len(scores_LN) // 4)])
    table_NR = found.low_rank.place(scores_LN[found.low_rank.at_A])
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


def report_anchors(world: World) -> None:
    """Ever fewer queries against which all items are scored, beginning with all of the sample."""
    default = low_rank.ANCHORS_PER_RANK
    for rank in ANCHOR_RANKS:
        for per_rank in (NUM_SAMPLE, *ANCHORS_PER_RANK):
            low_rank.ANCHORS_PER_RANK = per_rank
            found = low_rank.fit_low_rank(world.sample, world.sample_LN, [rank])
            table_NR = found.low_rank.place(world.sample_LN[found.low_rank.at_A])
            label = f"r {rank}, {len(found.low_rank.at_A)} anchors"
            report(label, found.query_map(world.queries) @ table_NR.T, world)
    low_rank.ANCHORS_PER_RANK = default


def report_cold(world: World) -> None:
    """Recall of the true best items that training has hardly seen, beside that of all."""
    is_cold_BK = (world.counts_N < COLD)[world.best_BK]
    print(
        f"items with fewer than {COLD} training events: {(world.counts_N < COLD).float().mean():.3f} of all, "
        f"{is_cold_BK.float().mean():.4f} of the true best"
    )
    if not is_cold_BK.any():
        return
    fits = ((0.0, 0.0), (0.0, 1.0), (1_000.0, 0.5), (1_000.0, 1.0))
    predictions = {f"top {top}, α {mean}": fit_linear(world, RANK, top, mean).predicted_BN for top, mean in fits}
    for label, predicted_BN in {"TopKAvg": world.queries.mean_BD @ world.items.mean_ND.T, **predictions}.items():
        ranks_BK = ranks_of(predicted_BN, world.best_BK)
        cold = [f"{(ranks_BK < budget)[is_cold_BK].float().mean():.3f}" for budget in BUDGETS]
        print(f"{label:20s} cold items at K' {BUDGETS}: " + " ".join(cold), flush=True)


def with_gates(model: RetrievalModel, scale: float) -> RetrievalModel:
    """The same model with what the softmax sees of pairs multiplied, but for the bend of the SiLU: 0 is uniform."""
    changed = copy.deepcopy(model)
    for layer in (changed.mol.query_gate[-1], changed.mol.cross_out):
        for parameter in layer.parameters():
            parameter.data *= scale
    return changed


def with_components(model: RetrievalModel, num_query: int, num_item: int) -> RetrievalModel:
    """The same model with only the first components."""
    before = model.settings.mol
    mol = before.model_copy(update={"num_query_components": num_query, "num_item_components": num_item})
    changed = RetrievalModel(model.settings.model_copy(update={"mol": mol}), model.num_items).eval()
    kept = torch.arange(num_query)[:, None] * before.num_item_components + torch.arange(num_item)
    rows = {
        "query_out": torch.arange(num_query * before.component_dim),
        "item_out": torch.arange(num_item * before.component_dim),
        "query_gate.2": kept.flatten(),
        "item_gate.2": kept.flatten(),
        "cross_out": kept.flatten(),
    }
    state = model.state_dict()
    for name, at in rows.items():
        for key in [key for key in state if key.startswith(f"mol.{name}.")]:
            state[key] = state[key][at]
    state["mol.cross_hidden.weight"] = state["mol.cross_hidden.weight"][:, kept.flatten()]
    changed.load_state_dict(state)
    return changed


def report_models(data: Path, name: str, model: RetrievalModel) -> None:
    sizes = model.settings.mol.num_query_components, model.settings.mol.num_item_components
    changed = {f"gates × {scale}": with_gates(model, scale) for scale in GATE_SCALES}
    for part in (1, 2, 4):
        if part < min(sizes):
            changed[f"{part} × {part} components"] = with_components(model, part, part)
    for label, other in changed.items():
        world = world_of(data, name, other, NUM_CHANGED)
        found = low_rank.fit_low_rank(world.sample, world.sample_LN, [RANK])
        table_NR = found.low_rank.place(world.sample_LN[found.low_rank.at_A])
        report(f"{label}: TopKAvg", world.queries.mean_BD @ world.items.mean_ND.T, world)
        report(f"{label}: low rank, α {found.mean_weight}", found.query_map(world.queries) @ table_NR.T, world)


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    data, out = Path(sys.argv[1]), Path(sys.argv[2])
    for model in sys.argv[3:]:
        name, way, seed = model.split("/")
        world = open_world(data, out, name, way, int(seed), NUM_SAMPLE)
        print(f"\n{model}, r = {RANK}: recall@10, @100 (head middle tail) at K' of {BUDGETS}")
        report_fits(world)
        report_anchors(world)
        report_cold(world)
        report_samples(world, read_histories(data, name))
        report_models(data, name, world.model)


if __name__ == "__main__":
    main()
