"""Search of all items of a model that has no corpus: one that is in training, or that a setting is chosen with."""

from collections.abc import Iterator

import torch

from pipeline.model.model import RetrievalModel
from pipeline.model.mol import QuerySide
from pipeline.retrieval.backends import open_index
from pipeline.retrieval.filters import Rules
from pipeline.retrieval.index import ShardIndex
from pipeline.retrieval.search import search_shard
from pipeline.retrieval.shard import embed_rows, make_shard
from pipeline.retrieval.topk import TopK, empty_topk
from pipeline.settings import MolSettings, SearchBackend, SearchSettings

ITEMS_AT_ONCE = 16_384  # bounds the memory; four times as many are not faster
COPIES = 8  # of the numbers of an index, at the peak: measured with 160 and with 576 numbers per item
NUM_SEEDS = 100  # items per query and index that the approximate search scores


def item_indexes(model: RetrievalModel, settings: SearchSettings) -> Iterator[ShardIndex]:
    """Embed the items and lay them out for search, up to ITEMS_AT_ONCE at a time, each when it is asked for.

    Raises NotFiniteError when a vector of an item is not finite, InputError when `search.backend` cannot run here.
    """
    for low in range(0, model.num_items, ITEMS_AT_ONCE):
        rows_N = torch.arange(low, min(low + ITEMS_AT_ONCE, model.num_items), device=model.device)
        yield open_index(model.mol, make_shard(low, embed_rows(model, rows_N)), settings)


def memory_of_indexes(mol: MolSettings) -> int:
    """About the bytes that a search with `item_indexes` takes at its peak."""
    per_item = mol.num_item_components * (mol.component_dim + mol.num_query_components)
    return COPIES * ITEMS_AT_ONCE * 4 * per_item


def search_all_items(model: RetrievalModel, queries: QuerySide, rules: Rules, settings: SearchSettings) -> TopK:
    """(B, k) the best items of the model that the rules allow, found as `search_shard` does; raises as `item_indexes`.

    The queries are on the model's device.
    """
    best = empty_topk(len(rules), settings.k, model.device)
    for index in item_indexes(model, settings) if len(rules) else ():
        best = search_shard(index, queries, rules, settings, best)
    return best


def quick_and_exact(k: int, backend: SearchBackend) -> tuple[SearchSettings, SearchSettings]:
    """The settings of an approximate and of an exact search for k items.

    With the held-out items among the candidates of the approximate search, it tells which queries are worth an exact
    one. All others have no held-out item in their exact lists: in these as many items are ahead of it, or more.
    """
    quick = SearchSettings(k=k, method="topk_avg", num_preselected=max(k, NUM_SEEDS), backend=backend)
    return quick, quick.model_copy(update={"method": "exact"})
