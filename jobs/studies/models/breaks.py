"""The limits of TopKLowRank: recall as the sample, the items or the model become less kind.

MODEL is SET/WAY/SEED, as in the study `train`. Recall of the true best 10 and 100 in the first K' of stage 1, at rank
64 unless a row says otherwise. In four parts: fewer anchors; items that training has hardly seen; other samples (few
users, users of the past, only long or only short histories, invented histories as long as tonight's of items drawn by
popularity), with recall for short and long queries apart; the same model with flatter or sharper gates, and with only
some of its components.

B queries, L sample queries, N items, R rank.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jobs.studies.models.train import NUM_VALIDATION, Histories, load_model, parse_name, permuted_users, read_histories
from jobs.studies.models.world import BUDGETS, NUM_QUERIES, World, query_side, real_world, report
from jobs.studies.searches import exact_scores, ranks_of, table_of
from pipeline.data.lists import Int64, Lists, offsets_of
from pipeline.model.model import RetrievalModel
from pipeline.model.mol import QuerySide
from pipeline.retrieval import low_rank_fit
from pipeline.retrieval.low_rank import Fit

RANK, NUM_SAMPLE, NUM_CHANGED = 64, 2_048, 1_024
FEW = ((128, 32), (256, 64), (512, 64), (1_024, 64))  # users, rank
SHORT, LONG = 3, 8  # a short query has at most this number of events, a long one at least
COLD = 5  # a cold item has fewer training events than this
ANCHOR_RANKS, ANCHORS_PER_RANK = (32, 64, 128), (16, 8, 4, 2)
GATE_SCALES = (0.0, 0.5, 2.0, 4.0)
NUM_COMPONENTS = (1, 2, 4)


@dataclass(frozen=True)
class Sample:
    """Users on which a low-rank table is fitted."""

    label: str
    histories: Lists
    users: Int64


def report_anchors(world: World) -> None:
    """Print the recall with ever fewer anchors; first with the whole sample as anchors."""
    default = low_rank_fit.ANCHORS_PER_RANK
    for rank in ANCHOR_RANKS:
        for per_rank in (NUM_SAMPLE, *ANCHORS_PER_RANK):
            low_rank_fit.ANCHORS_PER_RANK = per_rank
            fit = low_rank_fit.fit_low_rank(world.sample, world.sample_LN, [rank])
            label = f"r {rank}, {len(fit.low_rank.at_A)} anchors"
            report(label, predict(fit, world.queries, world.sample_LN), world)
    low_rank_fit.ANCHORS_PER_RANK = default


def predict(fit: Fit, queries: QuerySide, sample_LN: Tensor) -> Tensor:
    """Stage 1's scores (B, N) of all items."""
    return fit.query_map(queries) @ table_of(fit.low_rank, sample_LN).T


def report_cold(world: World) -> None:
    """Print the recall of the true best items that training has hardly seen."""
    is_cold_BK = (world.counts_N < COLD)[world.best_BK]
    share = (world.counts_N < COLD).float().mean()
    share_of_best = is_cold_BK.float().mean()
    print(f"items with fewer than {COLD} training events: {share:.3f} of all, {share_of_best:.4f} of the true best")
    fit = low_rank_fit.fit_low_rank(world.sample, world.sample_LN, [RANK])
    predictions = {
        "TopKAvg": world.queries.mean_BD @ world.items.mean_ND.T,
        f"low rank, α {fit.mean_weight}": predict(fit, world.queries, world.sample_LN),
    }
    for label, predicted_BN in predictions.items():
        ranks = ranks_of(predicted_BN, world.best_BK)[is_cold_BK]
        cells = [f"{(ranks < budget).float().mean():.3f}" for budget in BUDGETS]
        print(f"{label:20s} cold items at K' {BUDGETS}: " + " ".join(cells), flush=True)


def report_samples(world: World, model: RetrievalModel, histories: Histories) -> None:
    """Print the recall of all, short and long queries after a fit on each sample."""
    users = permuted_users(histories)[NUM_VALIDATION:]
    lengths_B = torch.from_numpy(histories.tonight.lengths[users[:NUM_QUERIES]])
    num_short, num_long = (lengths_B <= SHORT).sum(), (lengths_B >= LONG).sum()
    print(f"queries: all {len(lengths_B)}, {num_short} short, {num_long} long", flush=True)
    for num_sample, rank in FEW:
        sample = world.sample.take(slice(0, num_sample))
        _report_sample(f"{num_sample} users, r {rank}", world, sample, world.sample_LN[:num_sample], rank, lengths_B)
    for other in other_samples(histories):
        sample = query_side(model, other.histories, other.users)
        sample_LN = exact_scores(world.mol, sample, world.items)
        _report_sample(f"{len(other.users)} {other.label}, r {RANK}", world, sample, sample_LN, RANK, lengths_B)


def _report_sample(
    label: str, world: World, sample: QuerySide, sample_LN: Tensor, rank: int, lengths_B: Tensor
) -> None:
    fit = low_rank_fit.fit_low_rank(sample, sample_LN, [min(rank, len(sample_LN) // 4)])
    ranks_BK = ranks_of(predict(fit, world.queries, sample_LN), world.best_BK)
    groups = (lengths_B > 0, lengths_B <= SHORT, lengths_B >= LONG)
    cells = [" ".join(f"{(ranks_BK[group] < budget).float().mean():.3f}" for group in groups) for budget in BUDGETS]
    print(f"{label:44s} α {fit.mean_weight:4} | " + " | ".join(cells), flush=True)


def other_samples(histories: Histories) -> Iterator[Sample]:
    """Draw samples that are not of tonight's users; a kind of users of whom there are too few is left out."""
    rng = np.random.default_rng(0)
    lengths = histories.train.lengths
    kinds = {
        "of the past": lengths > 0,
        "of the first tenth of the past": np.arange(len(lengths)) < len(lengths) // 10,
        f"of the past with ≥ {LONG} events": lengths >= LONG,
        f"of the past with ≤ {SHORT} events": lengths <= SHORT,
    }
    for label, is_wanted in kinds.items():
        users = np.flatnonzero(is_wanted)
        if len(users) >= NUM_CHANGED:
            yield Sample(label, histories.train, rng.choice(users, NUM_CHANGED, replace=False))
    tonight = rng.choice(histories.tonight.lengths, NUM_CHANGED)
    invented = Lists(offsets_of(tonight), rng.choice(histories.train.values, tonight.sum()))
    yield Sample("invented", invented, np.arange(NUM_CHANGED))


def with_gates(model: RetrievalModel, scale: float) -> RetrievalModel:
    """Copy the model and multiply the inputs of its gates (but for the bend of the SiLU); 0 makes gates uniform."""
    changed = copy.deepcopy(model)
    for layer in (changed.mol.query_gate[-1], changed.mol.cross_out):
        for parameter in layer.parameters():
            parameter.data *= scale
    return changed


def with_components(model: RetrievalModel, num_query: int, num_item: int) -> RetrievalModel:
    """Copy the model with only the first components."""
    before = model.settings.mol
    mol = before.model_copy(update={"num_query_components": num_query, "num_item_components": num_item})
    changed = RetrievalModel(model.settings.model_copy(update={"mol": mol}), model.num_items).eval()
    pairs = (torch.arange(num_query)[:, None] * before.num_item_components + torch.arange(num_item)).flatten()
    kept_rows = {
        "query_out": torch.arange(num_query * before.component_dim),
        "item_out": torch.arange(num_item * before.component_dim),
        "query_gate.2": pairs,
        "item_gate.2": pairs,
        "cross_out": pairs,
    }
    state = model.state_dict()
    for layer, rows in kept_rows.items():
        for key in [key for key in state if key.startswith(f"mol.{layer}.")]:
            state[key] = state[key][rows]
    state["mol.cross_hidden.weight"] = state["mol.cross_hidden.weight"][:, pairs]
    changed.load_state_dict(state)
    return changed


def report_models(data: Path, log: str, model: RetrievalModel) -> None:
    """Print the recall of TopKAvg and TopKLowRank on changed copies of the model."""
    sizes = model.settings.mol.num_query_components, model.settings.mol.num_item_components
    changed = {f"gates × {scale}": with_gates(model, scale) for scale in GATE_SCALES}
    for part in NUM_COMPONENTS:
        if part < min(sizes):
            changed[f"{part} × {part} components"] = with_components(model, part, part)
    for label, other in changed.items():
        world = real_world(data, log, other, NUM_CHANGED)
        fit = low_rank_fit.fit_low_rank(world.sample, world.sample_LN, [RANK])
        report(f"{label}: TopKAvg", world.queries.mean_BD @ world.items.mean_ND.T, world)
        report(f"{label}: low rank, α {fit.mean_weight}", predict(fit, world.queries, world.sample_LN), world)


@torch.inference_mode()
def main(models: list[str], data: Path, out: Path) -> None:
    """Measure one model after the other."""
    torch.set_num_threads(1)
    for text in models:
        name = parse_name(text)
        histories = read_histories(data, name.log)
        model = load_model(out, name, histories.num_items)
        world = real_world(data, name.log, model, NUM_SAMPLE)
        print(f"\n{name}, r = {RANK}: recall@10, @100 (head middle tail) at K' of {BUDGETS}")
        report_anchors(world)
        report_cold(world)
        report_samples(world, model, histories)
        report_models(data, name.log, model)
