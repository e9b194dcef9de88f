"""The calls into the search that studies share. B queries, N items, K kept, M preselected, D width."""

import torch
from torch import Tensor

from pipeline.data.lists import Lists
from pipeline.model.mol import ItemSide, MixtureOfLogits, QuerySide
from pipeline.retrieval.backends import open_index
from pipeline.retrieval.filters import Rules, ShardMask
from pipeline.retrieval.index import ShardIndex, Shortlist, Table
from pipeline.retrieval.low_rank import DistilledMap, LowRank
from pipeline.retrieval.search import search_shard
from pipeline.retrieval.shard import make_shard
from pipeline.retrieval.topk import TopK
from pipeline.settings import SearchSettings, TableDtype

ITEMS_AT_ONCE = 2_048


def lay_out(
    mol: MixtureOfLogits, items: ItemSide, table_NR: Tensor | None = None, table_dtype: TableDtype = "bfloat16"
) -> ShardIndex:
    """Lay out all items as one shard on this machine's best backend, with a low-rank table if one is given."""
    return open_index(mol, make_shard(0, items, table_NR), SearchSettings(table_dtype=table_dtype))


def search(
    index: ShardIndex,
    queries: QuerySide,
    settings: SearchSettings,
    query_map: DistilledMap | None = None,
    excluded: Lists | None = None,
) -> TopK:
    """Search one shard; without `excluded` every item may be found."""
    rules = Rules(Lists.empty(len(queries.gate_BP)) if excluded is None else excluded)
    return search_shard(index, queries, rules, settings, query_map=query_map)


def preselect(index: ShardIndex, table: Table, queries_BD: Tensor, num_kept: int) -> Shortlist:
    """Run stage 1 alone, with every item allowed."""
    mask = ShardMask(len(index), Lists.empty(len(queries_BD)))
    return index.preselect(table, queries_BD, num_kept, mask)


def exact_scores(mol: MixtureOfLogits, queries: QuerySide, items: ItemSide) -> Tensor:
    """Score all pairs (B, N) in float32 on this machine's best backend."""
    index = lay_out(mol, items)
    scores_BN = torch.empty(len(queries.gate_BP), len(index))
    for low in range(0, len(index), ITEMS_AT_ONCE):
        rows_N = torch.arange(low, min(low + ITEMS_AT_ONCE, len(index)))
        scores_BN[:, low : low + len(rows_N)] = index.score(queries, rows_N.repeat(len(scores_BN), 1))
    return scores_BN


def ranks_of(predicted_BN: Tensor, best_BK: Tensor) -> Tensor:
    """Count, for each of the true best items, the items that are predicted above it (B, K)."""
    ascending_BN = predicted_BN.sort(dim=1).values
    wanted_BK = predicted_BN.gather(1, best_BK)
    return ascending_BN.shape[1] - torch.searchsorted(ascending_BN, wanted_BK, right=True)


def table_of(low_rank: LowRank, sample_LN: Tensor) -> Tensor:
    """Make the low-rank table (N, R) from scores of all sample queries, the anchors among them."""
    return low_rank.item_vectors(sample_LN[low_rank.at_A])
