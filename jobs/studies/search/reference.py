"""The yardstick: top-k under MoL the way the paper's public code does it, written anew.

As in that code, on purpose: raw item rows are projected again for every candidate of every query; brute force projects
the whole corpus in every call and holds all pairs at once; query components are computed in each stage; each query
component has a matrix product and a top-k of its own; duplicates are scored and then masked; CombTopK and TopKPerEmbd
sort all their slots whatever k is. Only the first stage has tables: item components and their mean, in bfloat16.
Unlike that code: duplicates are never returned, short lists are padded, no filters, one eager float32 model.

Legend: B queries, N items, M candidates, K kept, E embedding, Q/X query/item components, D width, P = Q·X, H hidden.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.lists import NO_ITEM
from pipeline.model.mol import MIN_NORM, MixtureOfLogits
from pipeline.retrieval.topk import TopK

REPEATED = -32_767.0  # the score of a candidate that the query has twice
ITEMS_AT_ONCE = 8_192  # items that are projected at once for the first stage's tables


@dataclass(frozen=True)
class ReferenceSearch:
    """The paper's algorithms over raw item rows (N, E), for a model in evaluation mode without a user component."""

    mol: MixtureOfLogits
    item_rows_NE: Tensor
    stage1_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.mol.user_table is not None or self.mol.training:
            raise ValueError("the yardstick is for models in evaluation mode without a user component")

    @torch.inference_mode()
    def brute_force(self, queries_BE: Tensor, k: int) -> TopK:
        """Score all pairs at once: B × N × (3 P + 2 H) × 4 bytes, so give it very few queries."""
        scores_BN = self._scores(queries_BE, self.item_rows_NE[None])
        best = scores_BN.topk(min(k, scores_BN.shape[1]), dim=1)
        return _result(best.values, best.indices, k)

    @torch.inference_mode()
    def topk_avg(self, queries_BE: Tensor, k: int, num_kept: int) -> TopK:
        """Run TopKAvg(K'): score the items with the largest product of summed query and mean item components."""
        rows_BM = self._by_mean(queries_BE, num_kept)
        scores_BM = self._scores(queries_BE, self.item_rows_NE[rows_BM])
        best = scores_BM.topk(min(k, scores_BM.shape[1]), dim=1)
        return _result(best.values, rows_BM.gather(1, best.indices), k)

    @torch.inference_mode()
    def topk_per_embd(self, queries_BE: Tensor, k: int, num_per_embd: int) -> TopK:
        """Run TopKPerEmbd(K'): score the K' best items of each pair of components."""
        return self._best_of_lists(queries_BE, self._by_component(queries_BE, num_per_embd), k)

    @torch.inference_mode()
    def comb_topk(self, queries_BE: Tensor, k: int, num_per_embd: int, num_kept: int) -> TopK:
        """Run CombTopK(K', K_avg): score the lists of both."""
        lists = [self._by_component(queries_BE, num_per_embd), self._by_mean(queries_BE, num_kept)]
        return self._best_of_lists(queries_BE, torch.cat(lists, dim=1), k)

    def prepare(self) -> None:
        """Make the tables of the first stage, which otherwise happens in the first search."""
        self._mean_DN.shape, self._components_DXN.shape  # noqa: B018

    def _by_mean(self, queries_BE: Tensor, num_kept: int) -> Tensor:
        sums_BD = self._query_components(queries_BE).sum(dim=1).to(self.stage1_dtype)
        scores_BN = sums_BD @ self._mean_DN
        return scores_BN.topk(min(num_kept, scores_BN.shape[1]), dim=1, sorted=False).indices

    def _by_component(self, queries_BE: Tensor, num_per_embd: int) -> Tensor:
        """List the best items of each pair of components, one list after the other: (B, P·K')."""
        components_BQD = self._query_components(queries_BE).to(self.stage1_dtype)
        num_items = len(self.item_rows_NE)
        lists = []
        for component in range(components_BQD.shape[1]):
            products = (components_BQD[:, component] @ self._components_DXN).view(-1, num_items)
            rows = products.topk(min(num_per_embd, num_items), dim=1, sorted=False).indices
            lists.append(rows.view(len(queries_BE), -1))
        return torch.cat(lists, dim=1)

    def _best_of_lists(self, queries_BE: Tensor, rows_BM: Tensor, k: int) -> TopK:
        rows_BM = rows_BM.sort(dim=1).values
        scores_BM = self._scores(queries_BE, self.item_rows_NE[rows_BM])
        is_repeated_BM = rows_BM == rows_BM.roll(1, dims=1)
        is_repeated_BM[:, 0] = False
        best = scores_BM.masked_fill(is_repeated_BM, REPEATED).topk(rows_BM.shape[1], dim=1)  # all of them, sorted
        return _result(best.values[:, :k], rows_BM.gather(1, best.indices)[:, :k], k)

    def _scores(self, queries_BE: Tensor, rows_BME: Tensor) -> Tensor:
        """Score every query with its own item rows, or all queries with the same (1, M, E) rows; nothing is cached."""
        components_BQD = self._query_components(queries_BE)
        components_BMXD = self._item_components(rows_BME)
        is_shared = len(rows_BME) == 1 and len(queries_BE) > 1
        if is_shared:
            logits = torch.einsum("bqd,mxd->bmqx", components_BQD, components_BMXD[0])
        else:
            logits = torch.einsum("bqd,bmxd->bmqx", components_BQD, components_BMXD)
        logits_BMP = logits.flatten(2) / self.mol.temperature
        query_gate_B1P = self.mol.query_gate(queries_BE)[:, None]
        item_gate_BMP = self.mol.item_gate(rows_BME)
        cross_BMP = self.mol.cross_out(F.silu(self.mol.cross_hidden(logits_BMP)))
        gates_BMP = torch.softmax(F.silu(query_gate_B1P * item_gate_BMP + cross_BMP), dim=-1)
        return (gates_BMP * logits_BMP).sum(dim=-1)

    def _query_components(self, queries_BE: Tensor) -> Tensor:
        hidden_BE = self.mol.query_hidden(queries_BE)
        return _unit(self.mol.query_out(hidden_BE).unflatten(-1, (-1, self.mol.settings.component_dim)))

    def _item_components(self, rows: Tensor) -> Tensor:
        return _unit(self.mol.item_out(rows).unflatten(-1, (-1, self.mol.settings.component_dim)))

    @cached_property
    def _components_DXN(self) -> Tensor:
        """(D, X·N): item components by component, for one product per query component."""
        tiles = [
            self._item_components(rows).to(self.stage1_dtype) for rows in torch.split(self.item_rows_NE, ITEMS_AT_ONCE)
        ]
        return torch.cat(tiles).permute(2, 1, 0).flatten(1).contiguous()

    @cached_property
    def _mean_DN(self) -> Tensor:
        tiles = [self._item_components(rows).mean(dim=1) for rows in torch.split(self.item_rows_NE, ITEMS_AT_ONCE)]
        return torch.cat(tiles).to(self.stage1_dtype).T.contiguous()


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors, dim=-1, eps=MIN_NORM)


def _result(scores_BM: Tensor, rows_BM: Tensor, k: int) -> TopK:
    """Pad the lists to k; the bound of +inf says that nothing is known of the items that were not scored."""
    is_item_BM = scores_BM > REPEATED
    scores_BM = scores_BM.masked_fill(~is_item_BM, -torch.inf)
    rows_BM = rows_BM.masked_fill(~is_item_BM, NO_ITEM)
    missing = max(0, k - rows_BM.shape[1])
    scores_BK = F.pad(scores_BM, (0, missing), value=-torch.inf)
    return TopK(scores_BK, F.pad(rows_BM, (0, missing), value=NO_ITEM), torch.full((len(rows_BM),), torch.inf))
