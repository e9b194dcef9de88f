"""What stage 1 of each method keeps on real models: python -m jobs.studies.models.recall DATA OUT MODEL ...

DATA and OUT as in `real_models`; a MODEL is diginetica/warm/0 and the like. How a method is judged: `real_world`. The
sample on which TopKLowRank is fitted are other users than those who ask. One thread.

B queries, L sample queries, N items, K true best, Q/X components, D width, P = Q·X pairs, S sampled items.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jobs.studies.models.world import BUDGETS, NUM_QUERIES, SMALL_K, K, World, open_world, recalls, report
from pipeline.model.mol import QuerySide
from pipeline.retrieval import low_rank

LIST_LENGTHS = (20, 50, 100, 200, 500, 1_000, 2_000)  # K' of TopKPerEmbd
MEAN_WEIGHTS = (0.0, 0.25, 0.5, 1.0)
FITS = {512: (32, 64), 1_024: (32, 64, 128), 2_048: (32, 64, 128, 256)}
LANDMARKS = ((512, 128), (1_024, 256))  # sample queries = landmark items, rank
FIT_ITEMS = 32_768


@dataclass(frozen=True)
class Lists:
    """TopKPerEmbd's lists: the best place of each item in any of them, and the worst logit in lists of each length."""

    place_BN: Tensor  # LIST_LENGTHS[-1] where an item is in none
    worst: dict[int, Tensor]  # (B,): the largest, over the pairs, of the last logit in the list
    largest_BN: Tensor  # largest logit of any pair


def make_lists(world: World) -> Lists:
    longest = min(LIST_LENGTHS[-1], len(world.counts_N))
    place_BN = torch.full(world.truth_BN.shape, longest, dtype=torch.int32)
    largest_BN = torch.full(world.truth_BN.shape, -torch.inf)
    worst = {length: torch.full((NUM_QUERIES,), -torch.inf) for length in LIST_LENGTHS if length <= longest}
    places_BM = torch.arange(longest, dtype=torch.int32).expand(NUM_QUERIES, -1)
    for query_BD in world.queries.components_BQD.unbind(1):
        for item_ND in world.items.components_NXD.unbind(1):
            logits_BN = query_BD @ item_ND.T / world.mol.temperature
            largest_BN = torch.maximum(largest_BN, logits_BN)
            best = logits_BN.topk(longest, dim=1)
            place_BN.scatter_reduce_(1, best.indices, places_BM, "amin")
            for length, values_B in worst.items():
                torch.maximum(values_B, best.values[:, length - 1], out=values_B)
    return Lists(place_BN, worst, largest_BN)


def report_union(label: str, place_BN: Tensor, world: World, at: tuple[int, ...] = ()) -> None:
    """Recall where the union of the lists has, on average, about as many items as the budgets; or for given lengths."""
    longest = int(place_BN.max())
    sizes = torch.bincount(place_BN.flatten(), minlength=longest + 1).cumsum(0)[:longest] / NUM_QUERIES
    lengths = at or [1 + int((sizes - budget).abs().argmin()) for budget in BUDGETS]
    is_found = [(place_BN < length).gather(1, world.best_BK) for length in lengths]
    cells = [recalls(found_BK, world) for found_BK in is_found]
    print(f"{label:34s} | " + " | ".join(cells), flush=True)
    print(" " * 34, "| " + " | ".join(f"K' {n}: {sizes[n - 1]:.0f} items".ljust(24) for n in lengths))


def report_heuristics(world: World, lists: Lists) -> None:
    by_mean_BN = world.queries.mean_BD @ world.items.mean_ND.T
    report("TopKAvg", by_mean_BN, world)
    report_union("TopKPerEmbd", lists.place_BN, world)
    place_by_mean_BN = by_mean_BN.argsort(dim=1, descending=True).argsort(dim=1).int()
    combined_BN = torch.minimum(lists.place_BN, place_by_mean_BN // 10)
    report_union("CombTopK, K_avg = 10 K'", combined_BN, world)
    report_union("CombTopK, K_avg = 10 K'", combined_BN, world, (20, 50, 100, 200))


def report_certificates(world: World, lists: Lists) -> None:
    """Queries whose list is proven: as found, and by a scan of all items whose largest logit reaches the k-th score."""
    for k in (SMALL_K, K):
        kth_B = world.truth_BN.topk(k, dim=1).values[:, -1]
        num_above_B = (lists.largest_BN >= kth_B[:, None]).sum(dim=1).double()
        share_B = num_above_B / len(world.counts_N)
        low, middle, high = share_B.quantile(torch.tensor([0.1, 0.5, 0.9]).double()).tolist()
        by_scan = ", ".join(f"N/{part} {(share_B <= 1 / part).double().mean():.3f}" for part in (100, 10, 2))
        print(
            f"k = {k}: share of items whose largest logit reaches the k-th score: mean {share_B.mean():.3f}, "
            f"10/50/90 % {low:.3f} {middle:.3f} {high:.3f}; proven by a scan of at most {by_scan}"
        )
        proven = []
        for length, worst_B in lists.worst.items():
            found_BN = world.truth_BN.masked_fill(lists.place_BN >= length, -torch.inf)
            found_B = found_BN.topk(k, dim=1).values[:, -1]
            size = (lists.place_BN < length).sum() / NUM_QUERIES
            proven.append(f"K' {length} ({size:.0f} items) {(worst_B < found_B).float().mean():.3f}")
        print("    proven by TopKPerEmbd's bound: " + ", ".join(proven), flush=True)


def report_gates(world: World) -> None:
    """How far the gates of the true best are from uniform."""
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


def fit(world: World, num_sample: int, rank: int) -> low_rank.Fit:
    at_S = torch.randperm(len(world.counts_N), generator=torch.Generator().manual_seed(0))[:FIT_ITEMS]
    sample = world.sample.take(slice(0, num_sample))
    return low_rank.fit_low_rank(sample, world.sample_LN[:num_sample, at_S], [rank], len(at_S) / len(world.counts_N))


def report_low_rank(world: World, num_sample: int, rank: int) -> low_rank.Fit:
    found = fit(world, num_sample, rank)
    fitted_LN = world.sample_LN[found.low_rank.at_A]
    predicted_BN = found.query_map(world.queries) @ found.low_rank.place(fitted_LN).T
    label = f"low rank l {num_sample} r {rank}"
    report(f"{label} α {found.mean_weight} top {found.top_weight}", predicted_BN, world)
    return found


def report_landmarks(world: World, num_sample: int, rank: int) -> None:
    found = fit(world, num_sample, rank)
    table_NR = found.low_rank.place(world.sample_LN[found.low_rank.at_A])
    at_S = torch.randperm(len(table_NR), generator=torch.Generator().manual_seed(1))[:num_sample]
    for weight in MEAN_WEIGHTS:
        query_map = low_rank.fit_landmarks(world.mol, found.low_rank, world.sample, world.items.take(at_S), weight)
        report(f"landmark {num_sample}/{rank} α {weight}", query_map(world.queries) @ table_NR.T, world)


@torch.inference_mode()
def measure(data: Path, out: Path, model: str) -> None:
    name, way, seed = model.split("/")
    world = open_world(data, out, name, way, int(seed), max(FITS))
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
    for num_sample, rank in LANDMARKS:
        report_landmarks(world, num_sample, rank)


def main() -> None:
    torch.set_num_threads(1)
    for model in sys.argv[3:]:
        measure(Path(sys.argv[1]), Path(sys.argv[2]), model)


if __name__ == "__main__":
    main()
