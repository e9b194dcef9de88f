"""The GPU backend against slow, obvious torch: in Triton's interpreter on a CPU, or (-m gpu) compiled on a GPU.

B queries, N items, Q/X query/item components, D width.
"""

import os
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton")

from pipeline.data.lists import NO_ITEM, Lists
from pipeline.model.mol import ItemSide, MixtureOfLogits, QuerySide
from pipeline.retrieval.backends.torch.index import TorchIndex
from pipeline.retrieval.backends.triton import index as triton_index
from pipeline.retrieval.backends.triton import launch as triton_launch
from pipeline.retrieval.backends.triton import select as triton_select
from pipeline.retrieval.backends.triton.index import TritonIndex
from pipeline.retrieval.backends.triton.layout import MolShape, lay_out_items
from pipeline.retrieval.backends.triton.product_kernels import IS_INTERPRETED
from pipeline.retrieval.backends.triton.tables import quantised_table
from pipeline.retrieval.bonuses import Bonuses
from pipeline.retrieval.brute_force import brute_force
from pipeline.retrieval.filters import Eligibility, Rules, ShardMask
from pipeline.retrieval.index import FLOAT32_ERROR, Shortlist
from pipeline.retrieval.search import search_shard
from pipeline.retrieval.shard import make_shard
from pipeline.settings import MolSettings, SearchSettings
from tests.retrieval.worlds import make_world

# Of scores times the temperature; for bfloat16 as measured over untrained gates of many kinds, 0.022 at worst.
ERRORS = {"float32": FLOAT32_ERROR, "bfloat16": 0.03}
SMALL = [(3, 2, 7, 12), (4, 4, 24, 48), (1, 1, 5, 3)]  # Q, X, D, H
LARGE = [(8, 8, 32, 128), (8, 4, 64, 128), (5, 3, 300, 70)]  # slow in the interpreter
SHAPES_AND_ITEMS = [*product(SMALL, [1, 33, 200]), *product(LARGE, [70])]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip("kernels are interpreted where there is no GPU, and compiled where there is one")
    assert (request.param == "cpu") == IS_INTERPRETED, "triton was imported too early"
    torch.set_num_threads(1)
    return request.param


@dataclass(frozen=True)
class Case:
    mol: MixtureOfLogits
    queries: QuerySide
    items: ItemSide
    mask: ShardMask

    def index(self, **options) -> TritonIndex:
        return TritonIndex(self.mol, make_shard(0, self.items), **options)

    def scores(self) -> Tensor:
        """(B, N) float64 scores of float32 components, on the CPU."""
        mol64 = MixtureOfLogits(16, self.mol.settings).double().eval()
        mol64.load_state_dict(self.mol.state_dict())
        sides = [[part.cpu().double() for part in vars(side).values()] for side in (self.queries, self.items)]
        with torch.no_grad():
            return mol64(QuerySide(*sides[0]), ItemSide(*sides[1]))

    def is_allowed(self) -> Tensor:
        return is_allowed(self.mask)


def is_allowed(mask: ShardMask) -> Tensor:
    """(B, N)"""
    device = "cpu" if mask.is_eligible_N is None else mask.is_eligible_N.device
    return mask.hide(torch.zeros(len(mask), mask.num_items, device=device), 0) == 0


def largest_logits(case: Case) -> Tensor:
    """(B, N), in float32."""
    with torch.no_grad():
        return case.mol.pairs(case.queries, case.items).logits_BNP.amax(dim=2)


def make_case(device: str, shape=(3, 2, 7, 12), num_queries=5, num_items=200, seed=0, spread=3.0) -> Case:
    torch.manual_seed(seed)
    names = ("num_query_components", "num_item_components", "component_dim", "gate_hidden_dim")
    settings = MolSettings(**dict(zip(names, shape, strict=True)), query_hidden_dim=16)
    mol = MixtureOfLogits(16, settings).eval()
    with torch.no_grad():
        queries = mol.query_side(torch.randn(num_queries, 16) * spread)
        items = mol.item_side(torch.randn(num_items, 16) * spread)
    mask = make_mask(num_queries, num_items, seed)
    if device == "cuda":
        mol, mask = mol.cuda(), mask.to("cuda")
        queries = QuerySide(queries.components_BQD.cuda(), queries.gate_BP.cuda())
        items = ItemSide(items.components_NXD.cuda(), items.gate_NP.cuda())
    return Case(mol, queries, items, mask)


def make_mask(num_queries: int, num_items: int, seed: int = 0, share: float = 0.2) -> ShardMask:
    """One item in ten is not eligible; the queries exclude from none to about a fifth of the items each."""
    rng = np.random.default_rng(seed)
    sizes = np.linspace(0, share * num_items, num_queries).astype(int)
    lists = [rng.choice(num_items, size, replace=False) for size in sizes]
    excluded = Lists.of(lists).distinct()
    return ShardMask(num_items, excluded, torch.from_numpy(rng.random(num_items) > 0.1))


def best(scores_BN: Tensor, is_allowed_BN: Tensor, k: int) -> list[list[int]]:
    """Each query's k best allowed items, by a Python sort."""
    lists = []
    for scores_N, is_allowed_N in zip(scores_BN.tolist(), is_allowed_BN.tolist(), strict=True):
        allowed = [n for n, is_allowed in enumerate(is_allowed_N) if is_allowed]
        lists.append(sorted(allowed, key=lambda n: (-scores_N[n], n))[:k])
    return lists


def listed(found: Shortlist) -> list[list[int]]:
    return [[n for n in row if n != NO_ITEM] for row in found.at_BM.tolist()]


def assert_best(found: Shortlist, exact_BN: Tensor, is_allowed_BN: Tensor, k: int, error: float) -> None:
    """The k best, but for items closer to the k-th than the error; scores right to the error."""
    is_allowed_BN = is_allowed_BN.cpu()
    for b, items in enumerate(listed(found)):
        allowed = exact_BN[b].masked_fill(~is_allowed_BN[b], -torch.inf)
        num_wanted = min(k, int(is_allowed_BN[b].sum()))
        assert len(items) == len(set(items)) == num_wanted
        assert is_allowed_BN[b][items].all()
        if num_wanted:
            last = allowed.topk(num_wanted).values[-1]
            assert (allowed[items] >= last - 2 * error).all()
            assert set((allowed > last + 2 * error).nonzero()[:, 0].tolist()) <= set(items)
            scores = found.scores_BM[b][found.at_BM[b] != NO_ITEM].cpu()
            torch.testing.assert_close(scores.double(), exact_BN[b][items].double(), rtol=0, atol=error)


def table_products(vectors_ND: Tensor, queries_BD: Tensor, dtype=torch.bfloat16) -> Tensor:
    return queries_BD.cpu().to(dtype).double() @ vectors_ND.cpu().to(dtype).double().T


@pytest.mark.parametrize(("shape", "num_items"), SHAPES_AND_ITEMS)
def test_preselect_finds_the_largest_inner_products(device, shape, num_items):
    case = make_case(device, shape, num_items=num_items)
    index = case.index()
    for table, vectors_ND, queries_BD in (
        ("mean", case.items.components_NXD.mean(dim=1), case.queries.mean_BD),
        (shape[1] - 1, case.items.components_NXD[:, -1], case.queries.components_BQD[:, 0]),
    ):
        exact_BN = table_products(vectors_ND, queries_BD)
        for k in (20, 500):
            found = index.preselect(table, queries_BD, k, case.mask)
            assert_best(found, exact_BN, case.is_allowed(), k, error=2e-6)


@pytest.mark.parametrize("num_excluded", [0, 300])
@pytest.mark.parametrize("dim", [1, 40, 300])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_large_table_is_searched_by_a_sampled_threshold(device, monkeypatch, bits, dim, num_excluded):
    monkeypatch.setattr(triton_select, "MIN_CAPACITY", 64)
    monkeypatch.setattr(triton_select, "SAMPLE_STEP", 4)
    swept = []
    sweep = triton_select._sweep
    monkeypatch.setattr(triton_select, "_sweep", lambda *args: swept.append(len(args[0])) or sweep(*args))
    case = make_case(device, num_queries=3, num_items=1_500)
    vectors_ND, queries_BD = torch.randn(1_500, dim, device=device), torch.randn(3, dim, device=device)
    index = TritonIndex(case.mol, make_shard(0, case.items, vectors_ND), low_rank_bits=bits)
    mask = replace(case.mask, excluded=Lists.of([np.arange(num_excluded)] * 3))
    found = index.preselect("low_rank", queries_BD, 30, mask)
    if bits == 8:
        table = quantised_table(vectors_ND)
        queries = table.prepare(queries_BD)
        whole_BN = queries.vectors_B1D[:, 0, :dim].cpu().double() @ table.vectors_N1D[:, 0].cpu().double().T
        exact_BN = whole_BN * queries.scale_B.cpu().double()[:, None]
    else:
        exact_BN = table_products(vectors_ND, queries_BD)
    assert_best(found, exact_BN, is_allowed(mask), 30, error=1e-5 * max(1.0, float(exact_BN.abs().max())))
    assert num_excluded or not swept  # the threshold sufficed


@pytest.mark.parametrize("bits", [8, 16])
def test_of_equal_items_the_first_are_kept_though_no_list_can_hold_them_all(device, monkeypatch, bits):
    monkeypatch.setattr(triton_select, "MIN_CAPACITY", 32)
    monkeypatch.setattr(triton_select, "SAMPLE_STEP", 4)
    monkeypatch.setattr(triton_select, "SWEEP_ITEMS", 128)
    case = make_case(device, num_queries=2, num_items=600)
    vectors_ND = torch.ones(600, 8, device=device)
    vectors_ND[450:460] *= 2
    index = TritonIndex(case.mol, make_shard(0, case.items, vectors_ND), low_rank_bits=bits)
    queries_BD = torch.tensor([1.0, 0.0], device=device)[:, None].expand(2, 8)  # all equal to the second one
    found = index.preselect("low_rank", queries_BD.contiguous(), 25, case.mask)
    is_allowed_BN = case.is_allowed()
    assert listed(found) == best(queries_BD.cpu() @ vectors_ND.cpu().T, is_allowed_BN, 25)


def test_a_threshold_that_was_too_high_is_noticed(device, monkeypatch):
    monkeypatch.setattr(triton_select, "MIN_CAPACITY", 32)
    case = make_case(device, num_queries=3, num_items=300)
    exact_BN = table_products(case.items.components_NXD.mean(dim=1), case.queries.mean_BD)
    # So many reach the first; of the second query exactly as many as are wanted do, but it cannot be sure of them.
    nth_best = exact_BN.masked_fill(~is_allowed(case.mask).cpu(), -torch.inf).sort(dim=1, descending=True).values
    floor_B = torch.stack([nth_best[0, 3], nth_best[1, 19], nth_best[2, 25]]).float().to(device)
    swept = []
    sweep = triton_select._sweep
    monkeypatch.setattr(triton_select, "_sweep", lambda *args: swept.append(len(args[0])) or sweep(*args))
    monkeypatch.setattr(triton_select, "_sampled_floor", lambda *_: (floor_B, 300))
    found = case.index().preselect("mean", case.queries.mean_BD, 20, case.mask)
    assert_best(found, exact_BN, is_allowed(case.mask), 20, error=2e-6)
    assert swept == [2]


def test_results_are_kept_in_their_total_order():
    kept = triton_select.Kept(1, 4, torch.device("cpu"))
    scores_BM = torch.tensor([[-1.0, 0.0, -0.0, -3.0, 5.0, 9.0]])
    at_BC = torch.tensor([[7, 6, 2, 1, 3, 0]], dtype=torch.int32)
    kept.add(
        scores_BM, triton_launch.ItemLists(at_BC, torch.tensor([5], dtype=torch.int32))
    )  # the last is beyond the list
    assert kept.result().at_BM.tolist() == [[3, 2, 6, 7]]
    assert kept.result().scores_BM.tolist() == [[5.0, 0.0, 0.0, -1.0]]


def test_rows_give_back_every_bit_of_float32():
    patterns = [0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x00000001, 0x3FFFFFFF]  # halves, and their neighbours
    values = torch.tensor([*patterns, *(p - (1 << 31) for p in patterns)], dtype=torch.int32).view(torch.float32)
    items = ItemSide(values[:, None, None].expand(-1, 3, 2), values[:, None] * torch.arange(1, 7))
    rows = lay_out_items(MolShape(2, 3, 2, 4), items)
    taken = rows.take(torch.arange(len(values)))
    assert torch.equal(taken.components_NXD.view(torch.int32), items.components_NXD.contiguous().view(torch.int32))
    assert torch.equal(taken.gate_NP.view(torch.int32), items.gate_NP.view(torch.int32))
    nearest = values.bfloat16().float()
    torch.testing.assert_close((rows.components_NXD[:, 0, 0].float() - values).abs(), (nearest - values).abs())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [*SMALL, *LARGE])
def test_scores_and_rescores_are_those_of_the_model(device, shape, precision):
    for spread in (1.0, 4.0):
        case = make_case(device, shape, num_queries=2, num_items=60, spread=spread)
        index = case.index(precision=precision)
        at_BM = torch.randint(-1, 60, (2, 80), device=device)
        exact_BM = case.scores().gather(1, at_BM.cpu().clamp_min(0)).masked_fill(at_BM.cpu() < 0, -torch.inf)
        scores_BM, quick_BM = (index.score(case.queries, at_BM, is_quick=quick).cpu() for quick in (False, True))
        torch.testing.assert_close(scores_BM.double(), exact_BM, rtol=0, atol=ERRORS["float32"] / index.temperature)
        torch.testing.assert_close(quick_BM.double(), exact_BM, rtol=0, atol=ERRORS[precision] / index.temperature)
        torch.testing.assert_close(index.rescore(case.queries, at_BM).cpu(), exact_BM.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("shape", "num_items"), SHAPES_AND_ITEMS)
def test_scan_finds_the_best_of_all_items(device, monkeypatch, shape, num_items):
    monkeypatch.setattr(triton_index, "SCAN_ITEMS", 128)
    case = make_case(device, shape, num_queries=4, num_items=num_items)
    index, exact_BN, is_allowed_BN = case.index(), case.scores(), case.is_allowed()
    nothing_B = torch.full((4,), -torch.inf, device=device)
    for k in (12, 300):
        found, bound_B = index.scan(case.queries, k, case.mask, nothing_B, max_scored=num_items)
        assert_best(found, exact_BN, is_allowed_BN, k, index.scan_error)
        assert_bounds(bound_B, exact_BN, is_allowed_BN, found, index.scan_error)


def assert_bounds(bound_B: Tensor, exact_BN: Tensor, is_allowed_BN: Tensor, found: Shortlist, error: float) -> None:
    """What is not in a list scores at most the bound, or the last of a full list."""
    for b, items in enumerate(listed(found)):
        others = is_allowed_BN[b].cpu().clone()
        others[items] = False
        last = float(found.scores_BM[b, -1]) + error
        assert (exact_BN[b][others] <= max(float(bound_B[b]), last)).all()


def test_a_scan_with_a_floor_skips_what_cannot_reach_it_and_says_how_high_that_is(device, monkeypatch):
    monkeypatch.setattr(triton_index, "SCAN_ITEMS", 64)
    case = make_case(device, (2, 2, 8, 8), num_queries=4, num_items=300)
    index, exact_BN, is_allowed_BN = case.index(), case.scores(), case.is_allowed().cpu()
    floor_B = exact_BN.masked_fill(~is_allowed_BN, -torch.inf).topk(5, dim=1).values[:, -1].float().to(device) - 1e-3
    scored = []
    score_above = triton_launch.score_above
    monkeypatch.setattr(
        triton_index, "score_above", lambda *args: scored.append(args[3].counts_B.clone()) or score_above(*args)
    )
    found, bound_B = index.scan(case.queries, 50, case.mask, floor_B, max_scored=300)
    reach_BN = is_allowed_BN & (exact_BN.to(device) >= floor_B[:, None]).cpu()
    assert [sorted(items) for items in listed(found)] == [row.nonzero()[:, 0].tolist() for row in reach_BN]
    assert (torch.stack(scored).sum(dim=0).cpu() < is_allowed_BN.sum(dim=1)).all()
    assert (bound_B < floor_B).all()
    unreached_BN = exact_BN.masked_fill(~is_allowed_BN | reach_BN, -torch.inf)
    logits_BN = largest_logits(case).cpu()
    skipped_BN = logits_BN.double().where(is_allowed_BN & (logits_BN < floor_B.cpu()[:, None] - 0.2), -torch.inf)
    assert (bound_B.cpu() >= skipped_BN.amax(dim=1)).all()
    assert (unreached_BN.amax(dim=1) < floor_B.cpu()).all()


@pytest.mark.parametrize(("max_scored", "at_once"), [(0, 64), (1, 512), (170, 64), (170, 512)])
def test_a_scan_on_a_budget_scores_no_more_and_bounds_the_rest(device, monkeypatch, max_scored, at_once):
    monkeypatch.setattr(triton_index, "SCAN_ITEMS", at_once)
    case = make_case(device, num_queries=4, num_items=300)
    index, exact_BN, is_allowed_BN = case.index(), case.scores(), case.is_allowed()
    nothing_B = torch.full((4,), -torch.inf, device=device)
    found, bound_B = index.scan(case.queries, 300, case.mask, nothing_B, max_scored)
    first_BN = (is_allowed_BN & (is_allowed_BN.cumsum(dim=1) <= max_scored)).cpu()
    assert [sorted(items) for items in listed(found)] == [row.nonzero()[:, 0].tolist() for row in first_BN]
    assert_bounds(bound_B, exact_BN, is_allowed_BN, found, index.scan_error)
    rest_BN = largest_logits(case).where(is_allowed_BN & ~first_BN.to(device), -torch.inf)
    assert (bound_B <= rest_BN.amax(dim=1) + 0.3).all()  # not just any bound


def test_where_everything_is_hidden_nothing_is_found(device):
    case = make_case(device, num_queries=2, num_items=40)
    index = case.index()
    nothing_B = torch.full((2,), -torch.inf, device=device)
    for mask in (
        ShardMask(40, Lists.of([np.arange(40)] * 2)),
        ShardMask(40, Lists.empty(2), torch.zeros(40, dtype=torch.bool, device=device)),
    ):
        assert listed(index.preselect("mean", case.queries.mean_BD, 5, mask)) == [[], []]
        found, bound_B = index.scan(case.queries, 5, mask, nothing_B, 40)
        assert listed(found) == [[], []]
        assert bound_B.isneginf().all()


def test_an_empty_batch_finds_nothing(device):
    case = make_case(device)
    empty = case.queries.take(slice(0, 0))
    index, mask = case.index(), case.mask.narrow(0, 0)
    assert len(index.preselect("mean", empty.mean_BD, 5, mask).at_BM) == 0
    assert len(index.scan(empty, 5, mask, torch.empty(0, device=device), 200)[0].at_BM) == 0


def test_the_rest_of_the_batch_does_not_change_a_bit(device, monkeypatch):
    monkeypatch.setattr(triton_select, "MIN_CAPACITY", 64)
    monkeypatch.setattr(triton_index, "SCAN_ITEMS", 128)
    case = make_case(device, (4, 4, 24, 48), num_queries=3, num_items=300)
    index = case.index()
    at_BM = torch.randint(0, 300, (3, 70), device=device)
    floor_B = torch.full((3,), -torch.inf, device=device)
    together = index.preselect("mean", case.queries.mean_BD, 10, case.mask)
    scanned, _ = index.scan(case.queries, 10, case.mask, floor_B, 300)
    for b in range(3):
        one, mask = case.queries.take(slice(b, b + 1)), case.mask.narrow(b, b + 1)
        alone = index.preselect("mean", one.mean_BD, 10, mask)
        assert torch.equal(alone.at_BM[0], together.at_BM[b])
        assert torch.equal(alone.scores_BM[0], together.scores_BM[b])
        scanned_alone, _ = index.scan(one, 10, mask, floor_B[:1], 300)
        assert torch.equal(scanned_alone.scores_BM[0], scanned.scores_BM[b])
        assert torch.equal(index.score(one, at_BM[b : b + 1, 20:])[0], index.score(case.queries, at_BM)[b, 20:])


@pytest.mark.parametrize("method", ["exact", "exact_two_stage", "topk_avg", "topk_per_embd", "comb_topk"])
def test_a_search_finds_what_the_plain_one_does(device, method):
    world = make_world(num_queries=4, num_items=150)
    (shard,) = world.shards(1)
    config = SearchSettings(k=10, method=method, num_preselected=150, num_per_embd=150)
    plain = search_shard(TorchIndex(world.mol, shard), world.queries, world.rules, config)
    queries = QuerySide(world.queries.components_BQD.to(device), world.queries.gate_BP.to(device))
    index = TritonIndex(world.mol.to(device), shard.to(device))
    found = search_shard(index, queries, world.rules, config)
    assert found.rows_BK.tolist() == plain.rows_BK.tolist()
    torch.testing.assert_close(found.scores_BK.cpu(), plain.scores_BK, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["exact", "topk_avg"])
def test_each_group_is_shown_the_best_of_what_it_may_be_shown(device, method):
    world = make_world(num_queries=6, num_items=150)
    masks = torch.rand(3, 150, generator=torch.Generator().manual_seed(0)) < torch.tensor([[1.0], [0.5], [0.05]])
    rules = Rules(world.excluded, Eligibility(masks, np.array([2, 0, 1, 1, 0, 2])))
    _, expected = brute_force(world.mol, world.queries, world.shards(1), rules, k=10)
    config = SearchSettings(k=10, method=method, num_preselected=150)
    queries = QuerySide(world.queries.components_BQD.to(device), world.queries.gate_BP.to(device))
    index = TritonIndex(world.mol.to(device), world.shards(1)[0].to(device))
    assert search_shard(index, queries, rules, config).rows_BK.tolist() == expected.tolist()


@pytest.mark.parametrize("method", ["exact", "topk_avg"])
def test_bonuses_are_added_to_the_scores_of_their_items(device, method):
    world = make_world(num_queries=4, num_items=150)
    amounts = np.random.default_rng(0).normal(0, 5, 60).astype(np.float32)
    bonuses = Bonuses(Lists.of([np.arange(0, 150, 5), [], np.arange(1, 150, 5), []]), amounts, 150)
    masks = torch.rand(2, 150, generator=torch.Generator().manual_seed(0)) < torch.tensor([[1.0], [0.5]])
    rules = Rules(world.excluded, Eligibility(masks, np.array([0, 0, 1, 1])), bonuses)
    scores, rows = brute_force(world.mol, world.queries, world.shards(1), rules, k=10)
    config, found = SearchSettings(k=10, method=method, num_preselected=150), None
    queries, mol = world.queries.to(device), world.mol.to(device)
    for shard in world.shards(3):
        found = search_shard(TritonIndex(mol, shard.to(device)), queries, rules, config, found)
    assert found.rows_BK.tolist() == rows.tolist()
    torch.testing.assert_close(found.scores_BK.cpu(), torch.from_numpy(scores), rtol=1e-6, atol=1e-6)
