"""How hard a bench world is for the paper's heuristics: python -m jobs.studies.search.worlds m100k books

Recall of the first stages against exact MoL (float32, all pairs), without any time in it. B queries, N items, K kept,
Q/X query/item components.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipeline.model.mol import ItemSide, MixtureOfLogits, QuerySide

ITEMS_AT_ONCE = 1_024
CUTOFFS = (10, 100)
AVERAGES = (200, 1_000, 4_000)  # K' of TopKAvg
COMBINED = ((50, 500), (100, 1_000))  # K' and K_avg of CombTopK


@torch.inference_mode()
def exact_scores(mol: MixtureOfLogits, queries: QuerySide, items: ItemSide) -> Tensor:
    """(B, N) float32 scores of all pairs, a tile of items at a time. Takes B × N × 4 bytes."""
    num_items = len(items.gate_NP)
    scores_BN = torch.empty(len(queries.gate_BP), num_items)
    for low in range(0, num_items, ITEMS_AT_ONCE):
        tile = slice(low, min(low + ITEMS_AT_ONCE, num_items))
        scores_BN[:, tile] = mol(queries, items.take(tile))
    return scores_BN


@torch.inference_mode()
def difficulty(
    queries: QuerySide, items: ItemSide, scores_BN: Tensor, averages: Sequence[int] = AVERAGES
) -> dict[str, dict[str, float]]:
    """For each first stage: recall at each cutoff, and the mean number of distinct candidates."""
    mean_BN = queries.mean_BD @ items.mean_ND.T
    of_pairs_BN = _places(queries, items, max(number for number, _ in COMBINED))
    found = {}
    for num_kept in averages:
        found[f"TopKAvg {num_kept}"] = _recalls(scores_BN, _among(mean_BN, num_kept))
    for num_per_embd, num_kept in COMBINED:
        is_candidate_BN = _among(mean_BN, num_kept) | (of_pairs_BN < num_per_embd)
        found[f"CombTopK {num_per_embd}/{num_kept}"] = _recalls(scores_BN, is_candidate_BN)
    return found


@torch.inference_mode()
def average_needed(queries: QuerySide, items: ItemSide, scores_BN: Tensor, k: int = 100, recall: float = 0.99) -> int:
    """The K' at which TopKAvg holds this share of the true k best, over all queries."""
    mean_BN = queries.mean_BD @ items.mean_ND.T
    places_BN = mean_BN.argsort(dim=1, descending=True).argsort(dim=1)
    places = places_BN.gather(1, scores_BN.topk(k, dim=1).indices).flatten().sort().values
    return int(places[int(len(places) * recall)]) + 1


def _places(queries: QuerySide, items: ItemSide, num_kept: int) -> Tensor:
    """(B, N): the best place, from 0, that an item has in the list of any pair of components; `num_kept` is none."""
    best_BN = torch.full((len(queries.gate_BP), len(items.gate_NP)), num_kept, dtype=torch.int16)
    places_BK = torch.arange(num_kept, dtype=torch.int16).expand(len(best_BN), -1)
    for j in range(items.components_NXD.shape[1]):
        table_DN = items.components_NXD[:, j].T.contiguous()
        for i in range(queries.components_BQD.shape[1]):
            top = (queries.components_BQD[:, i] @ table_DN).topk(min(num_kept, best_BN.shape[1]), dim=1).indices
            best_BN.scatter_reduce_(1, top, places_BK[:, : top.shape[1]], "amin")
    return best_BN


def _among(scores_BN: Tensor, num_kept: int) -> Tensor:
    at_BM = scores_BN.topk(min(num_kept, scores_BN.shape[1]), dim=1).indices
    return torch.zeros(scores_BN.shape, dtype=torch.bool).scatter_(1, at_BM, True)


def _recalls(scores_BN: Tensor, is_candidate_BN: Tensor) -> dict[str, float]:
    found = {"candidates": float(is_candidate_BN.sum(dim=1).float().mean())}
    for cutoff in CUTOFFS:
        found[f"recall@{cutoff}"] = float(
            is_candidate_BN.gather(1, scores_BN.topk(cutoff, dim=1).indices).float().mean()
        )
    return found


def as_text(found: Mapping[str, Mapping[str, float]]) -> str:
    """One line per first stage."""
    lines = [f"{'stage 1':<20}{'recall@10':>10}{'recall@100':>11}{'candidates':>11}"]
    for name, row in found.items():
        lines.append(f"{name:<20}{row['recall@10']:>10.3f}{row['recall@100']:>11.3f}{row['candidates']:>11.0f}")
    return "\n".join(lines)
