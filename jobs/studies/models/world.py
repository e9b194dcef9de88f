"""A trained model with tonight's queries and the truth, by which a stage 1 is judged.

For 300 of tonight's users all items are scored exactly in float32; a stage 1 is judged by the ranks that it gives the
true best items, so that every number of candidates is measured at once. Nothing is filtered. Head, middle and tail are
the items that share the training events in thirds, the most popular first (in a bench world: the queries' own events).

B queries, L sample queries, N items, K true best.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jobs.studies.models.train import NUM_VALIDATION, load_model, parse_name, permuted_users, read_histories
from jobs.studies.search.worlds import RECIPES, BenchWorld, default_cache, trained_world
from jobs.studies.searches import exact_scores, ranks_of
from pipeline.data.lists import Int32, Int64, Lists
from pipeline.model.inputs import Events, QueryInput
from pipeline.model.model import RetrievalModel
from pipeline.model.mol import ItemSide, MixtureOfLogits, QuerySide
from pipeline.retrieval.shard import embed_rows

NUM_QUERIES = 300
BUDGETS = (200, 500, 1_000, 2_000)  # candidates K'
K, SMALL_K = 100, 10


@dataclass(frozen=True)
class World:
    """One model with its queries; the truth by exact float32 scores."""

    mol: MixtureOfLogits
    items: ItemSide
    queries: QuerySide
    sample: QuerySide
    counts_N: Tensor  # training events of each item
    truth_BN: Tensor
    sample_LN: Tensor

    @cached_property
    def best_BK(self) -> Tensor:
        return self.truth_BN.topk(K, dim=1).indices

    @cached_property
    def part_BK(self) -> Tensor:
        """The part of each true best item: 0 head, 1 middle, 2 tail."""
        order_N = self.counts_N.argsort(descending=True, stable=True)
        part_N = torch.empty_like(order_N)
        before_N = self.counts_N[order_N].cumsum(0) - self.counts_N[order_N]
        part_N[order_N] = (3 * before_N) // self.counts_N.sum()
        return part_N[self.best_BK]


def open_world(model: str, data: Path, out: Path, num_sample: int) -> World:
    """Open a bench world by its name (`books`, `m100k`, …), or a trained model of a real log by SET/WAY/SEED."""
    if model in RECIPES:
        return bench_world(trained_world(model, RECIPES[model], default_cache()), num_sample)
    name = parse_name(model)
    num_items = read_histories(data, name.log).num_items
    return real_world(data, name.log, load_model(out, name, num_items), num_sample)


def bench_world(world: BenchWorld, num_sample: int) -> World:
    """Judge a bench world's model on the first of its queries."""
    queries, sample = world.queries.take(slice(0, NUM_QUERIES)), world.sample.take(slice(0, num_sample))
    return _with_truth(world.mol, world.items, queries, sample, world.exclusions.values)


def real_world(data: Path, log: str, model: RetrievalModel, num_sample: int) -> World:
    """Judge a model of a real log on tonight's users; the sample are others of them."""
    histories = read_histories(data, log)
    users = permuted_users(histories)[NUM_VALIDATION:]
    queries = query_side(model, histories.tonight, users[:NUM_QUERIES])
    sample = query_side(model, histories.tonight, users[NUM_QUERIES : NUM_QUERIES + num_sample])
    items = embed_rows(model, torch.arange(histories.num_items))
    return _with_truth(model.mol, items, queries, sample, histories.train.values)


def _with_truth(mol: MixtureOfLogits, items: ItemSide, queries: QuerySide, sample: QuerySide, events: Int32) -> World:
    counts_N = torch.from_numpy(np.bincount(events, minlength=len(items.gate_NP)))
    truth_BN, sample_LN = (exact_scores(mol, side, items) for side in (queries, sample))
    return World(mol, items, queries, sample, counts_N, truth_BN, sample_LN)


def query_side(model: RetrievalModel, histories: Lists, users: Int64) -> QuerySide:
    """Encode these users' histories."""
    rows_UL, _ = histories.last(model.settings.max_length)
    return model.query_side(QueryInput(Events(torch.from_numpy(rows_UL[users])), torch.from_numpy(users)))


def recalls(is_found_BK: Tensor, world: World) -> str:
    """One cell of a table: recall@10, recall@100, and the recall of the head, middle and tail items among the 100."""
    hits_BK = is_found_BK.float()
    overall = [hits_BK[:, :SMALL_K].mean(), hits_BK.mean()]
    by_part = [hits_BK[world.part_BK == part].mean() for part in range(3)]
    return " ".join(_share(mean, 3) for mean in overall) + " (" + " ".join(_share(mean, 2) for mean in by_part) + ")"


def _share(mean: Tensor, num_digits: int) -> str:
    """Write a share without its leading zero: .97, or 1."""
    text = f"{mean:.{num_digits}f}"
    return text.removeprefix("0") if float(text) < 1 else "1".rjust(num_digits + 1)


def report(label: str, predicted_BN: Tensor, world: World) -> None:
    """Print the recall at each of the budgets for a stage 1 that keeps the largest of these predictions."""
    ranks_BK = ranks_of(predicted_BN, world.best_BK)
    cells = [recalls(ranks_BK < budget, world) for budget in BUDGETS]
    print(f"{label:34s} | " + " | ".join(cells), flush=True)
