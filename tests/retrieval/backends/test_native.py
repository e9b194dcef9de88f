"""The native kernels against plain arithmetic, for every instruction set that this CPU can run."""

import ctypes
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.data.lists import NO_ITEM, Lists
from pipeline.model.mol import ItemSide, MixtureOfLogits, QuerySide
from pipeline.native.loader import CPU_FLAGS, cpu_flags, find_library, load_library
from pipeline.retrieval.backends import open_index, planes
from pipeline.retrieval.backends.native.index import NativeIndex
from pipeline.retrieval.backends.native.layout import ItemPlanes, Layout
from pipeline.retrieval.backends.torch.index import TorchIndex
from pipeline.retrieval.filters import ShardMask
from pipeline.retrieval.index import NotFiniteError, Shortlist
from pipeline.retrieval.shard import Shard, make_shard
from pipeline.settings import MolSettings, SearchSettings
from tests.retrieval.backends.native_libraries import emulated_library

EMULATED = "amx with emulated tiles"  # what is built on the tiles, on any CPU that has the vectors
BUILT = [name for name, needed in CPU_FLAGS.items() if needed <= cpu_flags() and find_library(name).functions]
CAN_EMULATE = shutil.which("c++") and CPU_FLAGS["avx512"] <= cpu_flags()
USABLE = BUILT + ([EMULATED] if CAN_EMULATE else [])
pytestmark = pytest.mark.skipif(not USABLE, reason="no native library for this CPU")
DTYPES = ["float32", "bfloat16", "int8"]


def as_stored(rows: Tensor, queries: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """What a table and the queries that meet it are rounded to."""
    if dtype == "float32":
        return rows, queries
    if dtype == "bfloat16":
        return planes.round_to_high(rows), planes.round_to_high(queries)
    # As the index has it: one is a division of doubles, the other torch's, which multiplies by the reciprocal.
    scale, scales = (
        127 / max(float(rows.abs().max()), 1e-30),
        127 / queries.abs().amax(1, keepdim=True).clamp_min(1e-30),
    )
    return (rows * scale).round().clamp(-127, 127) / scale, (queries * scales).round().clamp(-127, 127) / scales


def bare_shard(rows: Tensor) -> Shard:
    """Items of which only the low-rank table matters."""
    items = ItemSide(torch.ones(len(rows), 1, 1), torch.zeros(len(rows), 1))
    return make_shard(0, items, rows)


@cache
def library_for(name: str) -> ctypes.CDLL:
    if name != EMULATED:
        library = find_library(name).functions
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "emulated.so"
            path.write_bytes(emulated_library())
            library = load_library(path)
    assert library is not None
    return library


def index_for(name: str, mol: MixtureOfLogits, shard: Shard, dtype: str = "bfloat16") -> NativeIndex:
    return NativeIndex(library_for(name), mol, shard, SearchSettings(table_dtype=dtype))


def tiny_mol() -> MixtureOfLogits:
    settings = MolSettings(
        num_query_components=1, num_item_components=1, component_dim=1, query_hidden_dim=2, gate_hidden_dim=1
    )
    return MixtureOfLogits(2, settings).eval()


def random_mask(rng: np.random.Generator, num_queries: int, num_items: int, share: float) -> ShardMask:
    is_eligible = torch.from_numpy(rng.random(num_items) >= share / 2)
    lists = [np.flatnonzero(rng.random(num_items) < share * rng.random()) for _ in range(num_queries)]
    return ShardMask(num_items, Lists.of(lists), is_eligible)


def allowed(mask: ShardMask, query: int) -> Tensor:
    return mask.hide(torch.zeros(len(mask), mask.num_items), 0)[query] == 0


def check_stage1(found: Shortlist, scores_BN: Tensor, mask: ShardMask, num_kept: int, tolerance: float) -> None:
    """The right number of allowed items, each once, with their scores, none of which an item left out exceeds."""
    for query, scores_N in enumerate(scores_BN.double()):
        is_allowed = allowed(mask, query)
        at = found.at_BM[query][found.at_BM[query] != NO_ITEM]
        assert len(at) == len(at.unique()) == min(num_kept, int(is_allowed.sum()))
        assert is_allowed[at].all()
        assert torch.isneginf(found.scores_BM[query][found.at_BM[query] == NO_ITEM]).all()
        kept = found.scores_BM[query][found.at_BM[query] != NO_ITEM]
        torch.testing.assert_close(kept.double(), scores_N[at], atol=tolerance, rtol=1e-5)
        left = is_allowed.clone()
        left[at] = False
        if len(at) and left.any():
            assert scores_N[left].max() <= scores_N[at].min() + tolerance


@pytest.mark.parametrize("name", USABLE)
@settings(max_examples=60)
@given(
    st.integers(0, 10_000), st.integers(1, 400), st.integers(1, 70), st.integers(1, 20), st.integers(1, 120),
    st.sampled_from(DTYPES), st.sampled_from([0.0, 0.3, 1.5]),
)  # fmt: skip
def test_stage_1_keeps_what_a_sort_would(name, seed, num_items, dim, num_queries, num_kept, dtype, excluded):
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(rng.standard_normal((num_items, dim), dtype=np.float32))
    queries = torch.from_numpy(rng.standard_normal((num_queries, dim), dtype=np.float32))
    mask = random_mask(rng, num_queries, num_items, excluded)
    found = index_for(name, tiny_mol(), bare_shard(rows), dtype).preselect("low_rank", queries, num_kept, mask)
    stored_rows, stored_queries = as_stored(rows, queries, dtype)
    scores_BN = stored_queries.double() @ stored_rows.double().T
    check_stage1(found, scores_BN, mask, min(num_kept, num_items), tolerance=2e-5)


@pytest.mark.parametrize("name", USABLE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["random", "rising", "falling", "equal"])
def test_long_streams_with_ties_keep_the_first_of_equals(name, dtype, order):
    """Whole numbers are exact in every type: the result must be that of a total order, score then item."""
    rng = np.random.default_rng(0)
    values = rng.integers(-40, 40, 20_000)
    values = {"random": values, "rising": np.sort(values), "falling": np.sort(values)[::-1], "equal": values * 0}[order]
    rows = torch.zeros(20_000, 3)
    rows[:, 1] = torch.from_numpy(values.astype(np.float32).copy())
    rows[0, 2] = 127  # makes the scale of 8 bits 1
    queries = torch.tensor([[0.0, 127.0, 0.0], [0.0, -127.0, 0.0]])
    mask = random_mask(rng, 2, 20_000, 0.2)
    found = index_for(name, tiny_mol(), bare_shard(rows), dtype).preselect("low_rank", queries, 700, mask)
    for query, sign in enumerate((1, -1)):
        is_allowed = allowed(mask, query).numpy()
        ordered = sorted(np.flatnonzero(is_allowed).tolist(), key=lambda item: (-sign * float(rows[item, 1]), item))
        assert sorted(found.at_BM[query].tolist()) == sorted(ordered[:700])


@pytest.mark.parametrize("name", USABLE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("excluded", [0.0, 1.5])
def test_a_sample_of_items_that_misleads_about_the_others_costs_no_item(name, dtype, excluded):
    """The first threshold comes from one group of 48 items in 32; here all good ones are there, and only for some."""
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.standard_normal((20_000, 8), dtype=np.float32))
    rows[:, 0] = torch.where(torch.arange(20_000) // 48 % 32 == 0, 5.0, 0.0)
    queries = torch.from_numpy(rng.standard_normal((21, 8), dtype=np.float32))
    queries[:, 0] = torch.arange(21) % 3 - 1.0
    mask = random_mask(rng, 21, 20_000, excluded)
    found = index_for(name, tiny_mol(), bare_shard(rows), dtype).preselect("low_rank", queries, 1_000, mask)
    stored_rows, stored_queries = as_stored(rows, queries, dtype)
    check_stage1(found, stored_queries.double() @ stored_rows.double().T, mask, 1_000, tolerance=2e-5)


def mol_world(
    seed: int, sizes: tuple[int, int, int, int], num_items: int, num_queries: int = 7, sharpness: float = 3.0
) -> tuple[MixtureOfLogits, QuerySide, Shard]:
    torch.manual_seed(seed)
    queries, items, width, hidden = sizes
    mol = MixtureOfLogits(
        16,
        MolSettings(
            num_query_components=queries,
            num_item_components=items,
            component_dim=width,
            query_hidden_dim=16,
            gate_hidden_dim=hidden,
        ),
    ).eval()
    with torch.no_grad():
        side = mol.query_side(torch.randn(num_queries, 16) * sharpness)
        return mol, side, make_shard(0, mol.item_side(torch.randn(num_items, 16) * sharpness))


SIZES = [(1, 1, 1, 1), (3, 2, 8, 12), (8, 8, 32, 128), (8, 4, 64, 128), (4, 4, 24, 48), (5, 3, 7, 9), (2, 9, 33, 17)]


@pytest.mark.parametrize("name", USABLE)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_scores_of_pairs_are_those_of_the_model(name, sizes):
    mol, queries, shard = mol_world(1, sizes, num_items=131)
    oracle, index = TorchIndex(mol, shard), index_for(name, mol, shard)
    at = torch.randint(-1, 131, (7, 100), generator=torch.Generator().manual_seed(0))
    exact = oracle.rescore(queries, at)
    assert torch.equal(index.rescore(queries, at), exact)  # to the last bit of the rounded float64 score
    is_item = at != NO_ITEM
    careful = (index.score(queries, at) - exact)[is_item].abs().max()
    assert careful < index.scan_error / 2
    quick = (index.score(queries, at, is_quick=True) - exact)[is_item].abs().max()
    assert quick < 0.02 / mol.temperature
    assert torch.isneginf(index.score(queries, at)[~is_item]).all()


def test_gates_far_beyond_what_exp_can_take_do_not_overflow():
    mol, queries, shard = mol_world(0, (3, 2, 8, 12), num_items=60, sharpness=30.0)
    at = torch.arange(60).expand(7, -1).contiguous()
    exact = TorchIndex(mol, shard).rescore(queries, at)
    for name in USABLE:
        index = index_for(name, mol, shard)
        assert torch.equal(index.rescore(queries, at), exact)
        assert (index.score(queries, at) - exact).abs().max() < index.scan_error


@pytest.mark.parametrize("name", USABLE)
@settings(max_examples=40)
@given(
    st.integers(0, 10_000), st.sampled_from(SIZES), st.integers(1, 260), st.integers(1, 60),
    st.sampled_from([0.0, 0.4, 1.5]), st.sampled_from(["none", "middle", "high"]), st.sampled_from([0, 30, 1_000]),
)  # fmt: skip
def test_a_scan_finds_all_that_reach_the_floor(name, seed, sizes, num_items, num_kept, excluded, floor, budget):
    mol, queries, shard = mol_world(seed, sizes, num_items)
    rng = np.random.default_rng(seed)
    mask = random_mask(rng, 7, num_items, excluded)
    at = torch.arange(num_items).expand(7, -1).contiguous()
    exact = TorchIndex(mol, shard).rescore(queries, at)
    floors = {"none": torch.full((7,), -torch.inf), "middle": exact.median(dim=1).values, "high": exact.amax(dim=1)}
    index = index_for(name, mol, shard)
    found, bounds = index.scan(queries, num_kept, mask, floors[floor], budget)
    for query in range(7):
        is_allowed = allowed(mask, query)
        kept = found.at_BM[query][found.at_BM[query] != NO_ITEM]
        assert len(kept) == len(kept.unique())
        assert is_allowed[kept].all()
        error = index.scan_error
        assert (exact[query, kept] >= floors[floor][query] - error).all()
        missed = is_allowed.clone()
        missed[kept] = False
        is_full = len(kept) == min(num_kept, num_items)
        worst = exact[query, kept].min() if is_full and len(kept) else torch.tensor(-torch.inf)
        could_reach = torch.maximum(worst, floors[floor][query]) + 2 * error
        assert (exact[query, missed] <= torch.maximum(could_reach, bounds[query])).all()
        if budget >= num_items:
            assert bounds[query] == -torch.inf


@pytest.mark.parametrize("name", USABLE)
def test_results_do_not_depend_on_batch_order_or_threads(name):
    mol, queries, shard = mol_world(3, (4, 4, 24, 48), num_items=3_000, num_queries=70)
    index = index_for(name, mol, shard)
    mask = random_mask(np.random.default_rng(0), 70, 3_000, 0.1)
    mask = replace(mask, is_eligible_N=None)

    def everything(at: slice) -> list[Tensor]:
        side, part = queries.take(at), mask.narrow(at.start, at.stop)
        first = index.preselect("mean", side.mean_BD, 40, part)
        order = first.at_BM.sort(dim=1).values
        floor = torch.full((len(part),), -torch.inf)
        scan = index.scan(side, 30, part, floor, 3_000)[0]
        return [
            order,
            index.score(side, order, is_quick=True),
            index.score(side, order),
            index.rescore(side, order),
            scan.at_BM.sort(dim=1).values,
        ]

    whole = everything(slice(0, 70))
    torch.set_num_threads(2)
    for parts in ([slice(0, 70)], [slice(0, 1), slice(1, 70)], [slice(low, low + 10) for low in range(0, 70, 10)]):
        cut = zip(*(everything(part) for part in parts), strict=True)
        assert all(torch.equal(torch.cat(c), w) for c, w in zip(cut, whole, strict=True))


@pytest.mark.parametrize("where", ["item", "network"])
def test_a_value_that_is_not_a_number_is_refused(where):
    """In the pair network it would not be seen later: the kernels make finite scores of it."""
    mol, _, shard = mol_world(0, (3, 2, 8, 12), num_items=50)
    with torch.no_grad():
        (shard.items.gate_NP[7] if where == "item" else mol.cross_out.bias)[1] = torch.nan
    with pytest.raises(NotFiniteError, match="not a number"):
        open_index(mol, shard, SearchSettings())


def test_rows_are_held_once_and_give_back_every_bit():
    mol, _, shard = mol_world(0, (8, 8, 32, 128), num_items=200)
    index = index_for(USABLE[0], mol, shard)
    rows = ItemPlanes(shard, Layout(mol, rows=8))
    assert torch.equal(torch.stack([rows.component(j) for j in range(8)], dim=1), shard.items.components_NXD)
    per_item = index.bytes_of["components and gate"] / 200
    assert per_item == 4 * (8 * 32 + 64)
