"""A trained model of `real_models` with tonight's queries and the truth, and how a stage 1 is judged.

For 300 of tonight's users all items are scored exactly in float32; a stage 1 is judged by where it ranks the true best
items, so that every number of candidates is measured at once. Nothing is filtered. Head, middle and tail are the items
that share out the training events in thirds, the most popular first.

B queries, L sample queries, N items, K true best.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jobs.studies.models.train import NUM_VALIDATION, load_model, permuted_users, read_histories
from pipeline.data.lists import Int64, Sequences
from pipeline.model.model import RetrievalModel
from pipeline.model.mol import ItemSide, MixtureOfLogits, QuerySide
from pipeline.retrieval.backends import open_index
from pipeline.retrieval.shard import embed_rows, make_shard
from pipeline.settings import SearchSettings

NUM_QUERIES = 300
BUDGETS = (200, 500, 1_000, 2_000)
K, SMALL_K = 100, 10
ITEMS_AT_ONCE = 2_048


@dataclass(frozen=True)
class World:
    """One model with its queries; the truth by exact float32 scores."""

    model: RetrievalModel
    items: ItemSide
    queries: QuerySide
    sample: QuerySide
    counts_N: Tensor  # training events
    truth_BN: Tensor
    sample_LN: Tensor

    @property
    def mol(self) -> MixtureOfLogits:
        return self.model.mol

    @cached_property
    def best_BK(self) -> Tensor:
        return self.truth_BN.topk(K, dim=1).indices

    @cached_property
    def part_BK(self) -> Tensor:
        """0, 1, 2: the true best item is a head, middle, tail item."""
        order_N = self.counts_N.argsort(descending=True, stable=True)
        part_N = torch.empty_like(order_N)
        before_N = self.counts_N[order_N].cumsum(0) - self.counts_N[order_N]
        part_N[order_N] = (3 * before_N) // self.counts_N.sum()
        return part_N[self.best_BK]


def open_world(data: Path, out: Path, name: str, way: str, seed: int, num_sample: int) -> World:
    num_items = read_histories(data, name).num_items
    return world_of(data, name, load_model(out, name, way, seed, num_items), num_sample)


def world_of(data: Path, name: str, model: RetrievalModel, num_sample: int) -> World:
    histories = read_histories(data, name)
    users = permuted_users(histories)[NUM_VALIDATION:]
    queries = query_side(model, histories.tonight, users[:NUM_QUERIES])
    sample = query_side(model, histories.tonight, users[NUM_QUERIES : NUM_QUERIES + num_sample])
    items = embed_rows(model, torch.arange(histories.num_items))
    counts_N = torch.from_numpy(np.bincount(histories.train.item_rows, minlength=histories.num_items))
    truth_BN, sample_LN = (score_all(model.mol, side, items) for side in (queries, sample))
    return World(model, items, queries, sample, counts_N, truth_BN, sample_LN)


def query_side(model: RetrievalModel, histories: Sequences, users: Int64) -> QuerySide:
    rows_UL, lengths_U = histories.last(model.settings.max_length)
    return model.query_side(
        torch.from_numpy(rows_UL[users]), torch.from_numpy(lengths_U[users]), torch.from_numpy(users)
    )


def score_all(mol: MixtureOfLogits, queries: QuerySide, items: ItemSide) -> Tensor:
    """(B, N): float32 scores by this machine's backend."""
    index = open_index(mol, make_shard(0, items), SearchSettings())
    tiles = []
    for low in range(0, len(index), ITEMS_AT_ONCE):
        at_N = torch.arange(low, min(low + ITEMS_AT_ONCE, len(index)))
        tiles.append(index.score(queries, at_N.repeat(len(queries.gate_BP), 1)))
    return torch.cat(tiles, dim=1)


def ranks_of(predicted_BN: Tensor, best_BK: Tensor) -> Tensor:
    """(B, K): how many items are predicted above each of the true best."""
    ascending_BN = predicted_BN.sort(dim=1).values
    wanted_BK = predicted_BN.gather(1, best_BK)
    return ascending_BN.shape[1] - torch.searchsorted(ascending_BN, wanted_BK, right=True)


def recalls(is_found_BK: Tensor, world: World) -> str:
    """recall@10, recall@100 and that of the head, middle and tail items among the 100."""
    found_BK = is_found_BK.float()
    overall = [found_BK[:, :SMALL_K].mean(), found_BK.mean()]
    by_part = [found_BK[world.part_BK == part].mean() for part in range(3)]
    return " ".join(_share(mean, 3) for mean in overall) + " (" + " ".join(_share(mean, 2) for mean in by_part) + ")"


def _share(mean: Tensor, num_digits: int) -> str:
    """.97, or 1."""
    text = f"{mean:.{num_digits}f}"
    return text.removeprefix("0") if float(text) < 1 else "1".rjust(num_digits + 1)


def report(label: str, predicted_BN: Tensor, world: World) -> None:
    ranks_BK = ranks_of(predicted_BN, world.best_BK)
    cells = [recalls(ranks_BK < budget, world) for budget in BUDGETS]
    print(f"{label:34s} | " + " | ".join(cells), flush=True)
