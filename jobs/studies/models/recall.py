"""The share of the true best items that stage 1 of each method keeps.

A MODEL is a bench world (`books`, `books-hard`, `m100k`), or a trained model of a real log as in the study `train`. The
sample on which TopKLowRank is fitted are other users than those who ask. One thread.

B queries, L sample queries, N items, K true best, Q/X components, D width, P = Q·X pairs, S sampled items.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jobs.studies.models.landmarks import fit_landmarks
from jobs.studies.models.world import BUDGETS, SMALL_K, K, World, open_world, recalls, report
from jobs.studies.searches import table_of
from pipeline.model.mol import QuerySide
from pipeline.retrieval.low_rank_fit import fit_low_rank

LIST_LENGTHS = (20, 50, 100, 200, 500, 1_000, 2_000)  # K' of TopKPerEmbd
AVERAGES_PER_LIST = 10  # CombTopK's K_avg, as a multiple of K'
FITS = {512: (32, 64), 1_024: (32, 64, 128), 2_048: (32, 64, 128, 256)}  # sample queries, ranks
LANDMARKS = ((512, 64), (1_024, 128))  # fits whose table is also searched by landmarks, as many as sample queries
FIT_ITEMS = 32_768


@dataclass(frozen=True)
class PairLists:
    """TopKPerEmbd's lists, one per pair of components, of the longest length.

    `rank_BN` is the best rank (from 0) of an item in any list, and the longest length where the item is in none.
    `worst` maps each length to (B,) the last logit of a query's lists, the largest over the lists.
    """

    rank_BN: Tensor
    worst: dict[int, Tensor]
    largest_BN: Tensor  # largest logit of any pair


def make_lists(world: World) -> PairLists:
    """List the best items of each pair of components."""
    num_queries, longest = len(world.truth_BN), min(LIST_LENGTHS[-1], len(world.counts_N))
    rank_BN = torch.full(world.truth_BN.shape, longest, dtype=torch.int32)
    largest_BN = torch.full(world.truth_BN.shape, -torch.inf)
    worst = {length: torch.full((num_queries,), -torch.inf) for length in LIST_LENGTHS if length <= longest}
    ranks_BM = torch.arange(longest, dtype=torch.int32).expand(num_queries, -1)
    for query_BD in world.queries.components_BQD.unbind(1):
        for item_ND in world.items.components_NXD.unbind(1):
            logits_BN = query_BD @ item_ND.T / world.mol.temperature
            torch.maximum(largest_BN, logits_BN, out=largest_BN)
            best = logits_BN.topk(longest, dim=1)
            rank_BN.scatter_reduce_(1, best.indices, ranks_BM, "amin")
            for length, values_B in worst.items():
                torch.maximum(values_B, best.values[:, length - 1], out=values_B)
    return PairLists(rank_BN, worst, largest_BN)


def union_sizes(rank_BN: Tensor) -> Tensor:
    """Mean number of items in the union of a query's lists, for lists of length 1, 2, …"""
    longest = int(rank_BN.max())
    counts = torch.bincount(rank_BN.flatten(), minlength=longest + 1)
    return counts.cumsum(0)[:longest] / len(rank_BN)


def report_union(label: str, rank_BN: Tensor, world: World, lengths: Sequence[int]) -> None:
    """Print the recall of the union of lists of these lengths."""
    sizes = union_sizes(rank_BN)
    cells = [recalls((rank_BN < length).gather(1, world.best_BK), world) for length in lengths]
    print(f"{label:34s} | " + " | ".join(cells), flush=True)
    print(" " * 34, "| " + " | ".join(f"K' {n}: {sizes[n - 1]:.0f} items".ljust(24) for n in lengths))


def lengths_for_budgets(rank_BN: Tensor) -> list[int]:
    """The lengths at which the union of the lists has, on average, about as many items as each budget."""
    sizes = union_sizes(rank_BN)
    return [1 + int((sizes - budget).abs().argmin()) for budget in BUDGETS]


def report_heuristics(world: World, lists: PairLists) -> None:
    """Print the recall of the paper's methods: each at about as many candidates as the budgets, CombTopK at its own."""
    mean_BN = world.queries.mean_BD @ world.items.mean_ND.T
    report("TopKAvg", mean_BN, world)
    report_union("TopKPerEmbd", lists.rank_BN, world, lengths_for_budgets(lists.rank_BN))
    rank_by_mean_BN = mean_BN.argsort(dim=1, descending=True).argsort(dim=1).int()
    combined_BN = torch.minimum(lists.rank_BN, rank_by_mean_BN // AVERAGES_PER_LIST)
    longest = len(union_sizes(combined_BN))
    for lengths in (lengths_for_budgets(combined_BN), [n for n in LIST_LENGTHS[:4] if n <= longest]):
        report_union(f"CombTopK, K_avg = {AVERAGES_PER_LIST} K'", combined_BN, world, lengths)


def report_certificates(world: World, lists: PairLists) -> None:
    """Print the share of queries whose list is proven: by a scan of the items whose largest logit reaches the k-th
    score, and by TopKPerEmbd's own bound."""
    for k in (SMALL_K, K):
        kth_B = world.truth_BN.topk(k, dim=1).values[:, -1]
        share_B = (lists.largest_BN >= kth_B[:, None]).double().mean(dim=1)
        low, middle, high = share_B.quantile(torch.tensor([0.1, 0.5, 0.9]).double()).tolist()
        by_scan = ", ".join(f"N/{part} {(share_B <= 1 / part).double().mean():.3f}" for part in (100, 10, 2))
        print(
            f"k = {k}: share of items whose largest logit reaches the k-th score: mean {share_B.mean():.3f}, "
            f"10/50/90 % {low:.3f} {middle:.3f} {high:.3f}; proven by a scan of at most {by_scan}"
        )
        sizes, proven = union_sizes(lists.rank_BN), []
        for length, worst_B in lists.worst.items():
            kept_BN = world.truth_BN.masked_fill(lists.rank_BN >= length, -torch.inf)
            kth_kept_B = kept_BN.topk(k, dim=1).values[:, -1]
            share = (worst_B < kth_kept_B).float().mean()
            proven.append(f"K' {length} ({sizes[min(length, len(sizes)) - 1]:.0f} items) {share:.3f}")
        print("    proven by TopKPerEmbd's bound: " + ", ".join(proven), flush=True)


def report_gates(world: World) -> None:
    """Print how far the gates of the true best items are from uniform (TV: total variation)."""
    single = QuerySide(world.queries.components_BQD.unsqueeze(1), world.queries.gate_BP.unsqueeze(1))
    gates_BKP = world.mol.pairs(single, world.items.take(world.best_BK)).gates_BNP.squeeze(1)
    uniform = 1 / gates_BKP.shape[-1]
    distance_BK = 0.5 * (gates_BKP - uniform).abs().sum(dim=-1)
    low, high = distance_BK.quantile(torch.tensor([0.1, 0.9])).tolist()
    mean_P = gates_BKP.flatten(0, 1).mean(dim=0)
    print(
        f"gates on the true best: TV from uniform mean {distance_BK.mean():.3f}, 10 % {low:.3f}, 90 % {high:.3f}; "
        f"largest gate {gates_BKP.amax(dim=-1).mean():.3f}; "
        f"TV of the mean gate from uniform {0.5 * (mean_P - uniform).abs().sum():.3f}"
    )


def report_low_rank(world: World, num_sample: int, rank: int) -> None:
    """Fit as the nightly job does, on a share of the items, and print the recall; for some also by landmarks."""
    num_items = len(world.counts_N)
    rows_S = torch.randperm(num_items, generator=torch.Generator().manual_seed(0))[:FIT_ITEMS]
    sample, scores_LN = world.sample.take(slice(0, num_sample)), world.sample_LN[:num_sample]
    fit = fit_low_rank(sample, scores_LN[:, rows_S], [rank], len(rows_S) / num_items)
    table_NR = table_of(fit.low_rank, scores_LN)
    label = f"low rank l {num_sample} r {rank} α {fit.mean_weight} top {fit.top_weight}"
    report(label, fit.query_map(world.queries) @ table_NR.T, world)
    if (num_sample, rank) in LANDMARKS:
        landmarks = torch.randperm(num_items, generator=torch.Generator().manual_seed(1))[:num_sample]
        items = world.items.take(landmarks)
        query_map = fit_landmarks(world.mol, fit.low_rank, world.sample, items, fit.mean_weight)
        report(f"{len(landmarks)} landmark items", query_map(world.queries) @ table_NR.T, world)


@torch.inference_mode()
def measure(model: str, data: Path, out: Path) -> None:
    """Print all figures of one model."""
    world = open_world(model, data, out, max(FITS))
    shares = [f"{(world.part_BK == part).float().mean():.2f}" for part in range(3)]
    print(f"\n{model}: {len(world.counts_N)} items, true best {K}: head/middle/tail {' '.join(shares)}")
    print(f"stage 1: recall@{SMALL_K}, @{K} (head middle tail) at K' of | " + " | ".join(map(str, BUDGETS)))
    lists = make_lists(world)
    report_heuristics(world, lists)
    report_gates(world)
    report_certificates(world, lists)
    for num_sample, ranks in FITS.items():
        for rank in ranks:
            report_low_rank(world, num_sample, rank)


def main(models: list[str], data: Path, out: Path) -> None:
    """Measure one model after the other."""
    torch.set_num_threads(1)
    for model in models:
        measure(model, data, out)
