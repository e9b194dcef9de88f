"""Small random worlds for the search tests, and the slow, obvious search that pins the fast one."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.lists import NO_ITEM, Lists
from pipeline.model.mol import ItemSide, MixtureOfLogits, QuerySide
from pipeline.retrieval import backends
from pipeline.retrieval.filters import Rules
from pipeline.retrieval.index import ShardIndex
from pipeline.retrieval.shard import Shard, make_shard, shard_bounds
from pipeline.retrieval.topk import TopK
from pipeline.settings import MolSettings, SearchSettings

BACKEND = "auto"  # the fixture `backend` sets it


def open_index(mol: MixtureOfLogits, shard: Shard, settings: SearchSettings) -> ShardIndex:
    """The shard in the backend under test, where the settings leave it open."""
    if BACKEND == "auto" or settings.backend != "auto":
        return backends.open_index(mol, shard, settings)
    if BACKEND != "triton":
        return backends.open_index(mol, shard, settings.model_copy(update={"backend": BACKEND}))
    backends.open_index(mol, shard, settings)  # refuses what no backend takes; then past the refusal of CPUs
    from pipeline.retrieval.backends.triton.index import TritonIndex

    return TritonIndex(mol, shard)


@dataclass(frozen=True)
class World:
    mol: MixtureOfLogits
    queries: QuerySide
    items: ItemSide
    excluded: Lists

    @property
    def rules(self) -> Rules:
        return Rules(self.excluded)

    def shards(self, num_shards: int) -> list[Shard]:
        bounds = shard_bounds(len(self.items.gate_NP), num_shards)
        return [make_shard(low, self.items.take(slice(low, high))) for low, high in bounds]


def make_world(num_queries: int = 9, num_items: int = 150, max_excluded: int = 40, seed: int = 0) -> World:
    """An untrained MoL with gates of every sharpness; each query excludes some items."""
    torch.manual_seed(seed)
    settings = MolSettings(
        num_query_components=3, num_item_components=2, component_dim=8, query_hidden_dim=16, gate_hidden_dim=12
    )
    mol = MixtureOfLogits(16, settings).eval()
    with torch.no_grad():
        queries = mol.query_side(torch.randn(num_queries, 16) * 3)
        items = mol.item_side(torch.randn(num_items, 16) * 3)
    rng = np.random.default_rng(seed)
    lists = [
        rng.choice(num_items, rng.integers(0, min(max_excluded, num_items) + 1), replace=False)
        for _ in range(num_queries)
    ]
    return World(mol, queries, items, Lists.of(lists))


def all_scores(world: World) -> Tensor:
    """(B, N) float64, rounded to float32 as results are; what a query excludes is -inf."""
    double = [side.double() for side in (world.queries.components_BQD, world.queries.gate_BP)]
    items = ItemSide(world.items.components_NXD.double(), world.items.gate_NP.double())
    mol64 = MixtureOfLogits(16, world.mol.settings).double().eval()
    mol64.load_state_dict(world.mol.state_dict())
    with torch.no_grad():
        scores_BN = mol64(QuerySide(*double), items).float()
    for query in range(len(scores_BN)):
        hidden = world.excluded[query]
        scores_BN[query, torch.from_numpy(hidden).long()] = -torch.inf
    return scores_BN


def brute_force(scores_BN: Tensor, k: int) -> list[list[tuple[float, int]]]:
    """Each query's k best (score, row), by a Python sort."""
    lists = []
    for scores_N in scores_BN.tolist():
        shown = [(-score, row) for row, score in enumerate(scores_N) if score > -np.inf]
        lists.append([(-negated, row) for negated, row in sorted(shown)[:k]])
    return lists


def as_lists(found: TopK) -> list[list[tuple[float, int]]]:
    """The result without its padding."""
    pairs = zip(found.scores_BK.tolist(), found.rows_BK.tolist(), strict=True)
    return [[(s, r) for s, r in zip(*pair, strict=True) if r != NO_ITEM] for pair in pairs]
