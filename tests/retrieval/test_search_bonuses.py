"""A search with bonuses against brute force, for every method, on every backend but Triton (`backends/`)."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.lists import NO_ITEM, Lists
from pipeline.native.loader import CPU_FLAGS, cpu_flags, find_library
from pipeline.retrieval import search as search_module
from pipeline.retrieval.backends.native.index import NativeIndex
from pipeline.retrieval.backends.torch.index import TorchIndex
from pipeline.retrieval.bonuses import Bonuses
from pipeline.retrieval.brute_force import brute_force as oracle
from pipeline.retrieval.filters import Eligibility, Rules
from pipeline.retrieval.index import ShardIndex
from pipeline.retrieval.low_rank_fit import fit_low_rank
from pipeline.retrieval.search import _Search, search_shard
from pipeline.retrieval.shard import Shard
from pipeline.retrieval.topk import TopK
from pipeline.settings import SearchSettings
from tests.retrieval.worlds import World, all_scores, as_lists, brute_force, make_world

NATIVE = [name for name, needed in CPU_FLAGS.items() if needed <= cpu_flags() and find_library(name).functions]
EXACT = ["exact", "exact_two_stage"]
APPROXIMATE = ["topk_avg", "topk_per_embd", "comb_topk", "topk_low_rank"]
LARGEST = float(np.finfo(np.float32).max)
AMOUNTS = [0.0, 1e-45, 1e-4, 0.01, 1.0, 30.0, 1e6, LARGEST]  # a MoL score is between -20 and 20
seeds = st.integers(0, 10_000)


@pytest.fixture(scope="module", params=["torch", *NATIVE])
def open_shard(request) -> Callable[[World, Shard, SearchSettings], ShardIndex]:
    """Each backend that this machine has, and each instruction set."""
    name: str = request.param
    if name == "torch":
        return lambda world, shard, _: TorchIndex(world.mol, shard)
    library = find_library(name).functions
    assert library is not None
    return lambda world, shard, config: NativeIndex(library, world.mol, shard, config)


def ask(method: str, k: int = 6, num_kept: int = 25, max_escalated: int = 0) -> SearchSettings:
    kept = max(num_kept, k)
    return SearchSettings(k=k, method=method, num_preselected=kept, num_per_embd=kept, max_escalated=max_escalated)


def some_bonuses(world: World, seed: int) -> Bonuses:
    """Bonuses of every size for no, some or all items, excluded ones among them; a third of the amounts are alike."""
    rng, num_items = np.random.default_rng(seed), len(world.items.gate_NP)
    counts = [rng.integers(0, num_items + 1) * rng.choice([0, 1]) for _ in range(len(world.excluded))]
    rows = Lists.of(np.sort(rng.choice(num_items, count, replace=False)) for count in counts)
    amounts = rng.choice([-1, 1], len(rows.values)) * rng.choice(AMOUNTS, len(rows.values))
    amounts *= np.where(rng.random(len(amounts)) < 0.6, rng.random(len(amounts)), 1.0)
    return Bonuses(rows, amounts.astype(np.float32), num_items)


def some_rules(world: World, seed: int) -> Rules:
    """Exclusions, bonuses, for half of the seeds two groups with masks of their own, and for a third items that need a
    bonus."""
    bonuses, rng = some_bonuses(world, seed), np.random.default_rng(seed)
    needs_bonus_N = None if seed % 3 else torch.from_numpy(rng.random(bonuses.num_items) < 0.4)
    if seed % 2:
        return Rules(world.excluded, None, bonuses, needs_bonus_N)
    masks = torch.from_numpy(rng.random((2, bonuses.num_items)) < np.array([[0.9], [0.3]]))
    return Rules(world.excluded, Eligibility(masks, rng.integers(0, 2, len(bonuses))), bonuses, needs_bonus_N)


def sums(world: World, rules: Rules) -> torch.Tensor:
    """(B, N) MoL scores with their bonuses, cell by cell; what the rules hide is -inf."""
    sums_BN = all_scores(world)
    if rules.needs_bonus_N is not None:
        for query in range(len(sums_BN)):
            has_bonus_N = torch.isin(torch.arange(sums_BN.shape[1]), torch.from_numpy(rules.bonuses.rows[query]))
            sums_BN[query, rules.needs_bonus_N & ~has_bonus_N] = -torch.inf
    for query, row, amount in zip(
        rules.bonuses.rows.owners, rules.bonuses.rows.values, rules.bonuses.amounts, strict=True
    ):
        sums_BN[query, row] = float(np.float32(sums_BN[query, row].item()) + amount)
    if rules.eligibility is not None:
        sums_BN[~rules.eligibility.is_eligible_GN[torch.from_numpy(rules.eligibility.group_of_B)]] = -torch.inf
    return sums_BN


def search(open_shard, world: World, rules: Rules, config: SearchSettings, num_shards: int = 2, order: int = 1) -> TopK:
    """The low-rank table, where it is asked for, is fitted on queries of another world."""
    found, query_map, shards = None, None, world.shards(num_shards)
    if config.method == "topk_low_rank":
        sample = make_world(num_queries=60, num_items=1, seed=99).queries
        scores = world.mol(sample, world.items).detach()
        fit = fit_low_rank(sample, scores, [min(8, scores.shape[1])])
        table_NR, query_map = fit.low_rank.item_vectors(scores[fit.low_rank.at_A]), fit.query_map
        shards = [replace(s, low_rank_NR=table_NR[s.first_row : s.first_row + len(s)]) for s in shards]
    for shard in shards[::order]:
        index = open_shard(world, shard, config)
        found = search_shard(index, world.queries, rules, config, found, query_map)
    assert found is not None
    return found


@pytest.mark.parametrize("method", EXACT)
@settings(max_examples=40)
@given(seeds, st.integers(1, 120), st.integers(1, 40), st.integers(1, 4), st.sampled_from([1, -1]))
def test_exact_search_equals_brute_force_to_the_last_bit(open_shard, method, seed, num_items, k, num_shards, order):
    world = make_world(num_queries=5, num_items=num_items, seed=seed)
    rules = some_rules(world, seed)
    found = search(open_shard, world, rules, ask(method, k), num_shards, order)
    assert as_lists(found) == brute_force(sums(world, rules), k)
    assert found.is_proven_B.all()
    scores, rows = oracle(world.mol, world.queries, world.shards(num_shards), rules, k)
    assert (rows.tolist(), scores.tolist()) == (found.rows_BK.tolist(), found.scores_BK.tolist())


@pytest.mark.parametrize("method", APPROXIMATE)
@settings(max_examples=15)
@given(seeds, st.integers(1, 100), st.integers(1, 3))
def test_a_method_that_preselects_everything_equals_brute_force(open_shard, method, seed, num_items, num_shards):
    world = make_world(num_queries=4, num_items=num_items, seed=seed)
    rules = some_rules(world, seed)
    found = search(open_shard, world, rules, ask(method, num_kept=num_items), num_shards)
    assert as_lists(found) == brute_force(sums(world, rules), 6)
    assert found.is_proven_B.all()


@pytest.mark.parametrize("method", APPROXIMATE)
@settings(max_examples=30)
@given(seeds, st.integers(6, 30), st.integers(1, 3), st.sampled_from([0, 10, 40]))
def test_an_approximate_search_misses_no_bonus_and_proves_what_it_says(
    open_shard, method, seed, num_kept, num_shards, max_escalated
):
    world = make_world(num_queries=5, num_items=90, seed=seed)
    rules = some_rules(world, seed)
    found = search(open_shard, world, rules, ask(method, 6, num_kept, max_escalated), num_shards)
    sums_BN = sums(world, rules)
    exact = brute_force(sums_BN, 6)
    for query, entries in enumerate(as_lists(found)):
        rows = [row for _, row in entries]
        assert len(set(rows)) == len(rows)
        assert entries == sorted(entries, key=lambda entry: (-entry[0], entry[1]))
        assert [score for score, _ in entries] == sums_BN[query, rows].tolist()
        assert torch.isfinite(sums_BN[query, rows]).all()  # the rules allow it
        # Every item of the true list that has a bonus is in the list.
        assert {row for _, row in exact[query]} & set(rules.bonuses.rows[query].tolist()) <= set(rows)
        assert entries == exact[query] or not found.is_proven_B[query]
        gap = float(found.gaps_B[query])
        for (true, _), (score, _) in zip(exact[query], entries, strict=True):
            assert score + gap >= true - 1e-6


@pytest.mark.parametrize("method", [*EXACT, *APPROXIMATE])
def test_queries_and_shards_without_a_bonus_take_the_same_way_as_before(open_shard, method, monkeypatch):
    world = make_world(num_queries=6, num_items=160)
    config = ask(method, num_kept=12, max_escalated=5 if method in APPROXIMATE else 0)
    plain = search(open_shard, world, world.rules, config)
    some = Bonuses(Lists.of([[], [3, 40, 150], [], [], [90], []]), np.array([9, -9, 9, 9], np.float32), 160)
    mixed = search(open_shard, world, Rules(world.excluded, bonuses=some), config)
    for query in (0, 2, 3, 5):
        for name in ("scores_BK", "rows_BK", "bounds_B"):
            assert torch.equal(getattr(mixed, name)[query], getattr(plain, name)[query]), name
    assert not torch.equal(mixed.rows_BK[1], plain.rows_BK[1])
    monkeypatch.setattr(_Search, "with_bonuses", None)  # not even called
    none = Bonuses(Lists.empty(6), np.empty(0, np.float32), 160)
    again = search(open_shard, world, Rules(world.excluded, bonuses=none), config)
    assert all(torch.equal(one, other) for one, other in zip(vars(again).values(), vars(plain).values(), strict=True))
    first_half = Bonuses(Lists.of([[79]] * 6), np.full(6, 9, np.float32), 160)
    _, second = world.shards(2)
    if method != "topk_low_rank":
        index = open_shard(world, second, config)
        found = search_shard(index, world.queries, Rules(world.excluded, bonuses=first_half), config)
        assert torch.equal(found.rows_BK, search_shard(index, world.queries, world.rules, config).rows_BK)


@pytest.mark.parametrize("method", EXACT)
def test_how_many_bonuses_are_scored_at_once_and_who_else_asks_changes_nothing(open_shard, method, monkeypatch):
    world = make_world(num_queries=8, num_items=150)
    rules = some_rules(world, 3)
    together = search(open_shard, world, rules, ask(method))
    monkeypatch.setattr(search_module, "BONUSES_AT_ONCE", 100)
    parts = search(open_shard, world, rules, ask(method))
    assert torch.equal(parts.rows_BK, together.rows_BK)
    assert torch.equal(parts.scores_BK, together.scores_BK)
    for query in range(8):
        alone = replace(world, queries=world.queries.take(slice(query, query + 1)))
        found = search(open_shard, alone, rules.take(np.array([query])), ask(method))
        assert torch.equal(found.scores_BK[0], together.scores_BK[query])
        assert torch.equal(found.rows_BK[0], together.rows_BK[query])


def test_a_bonus_does_not_show_what_the_rules_hide(open_shard):
    world = make_world(num_queries=2, num_items=40, max_excluded=0)
    is_eligible = (torch.arange(40) != 7)[None]
    bonuses = Bonuses(Lists.of([[5, 6, 7]] * 2), np.full(6, 100, np.float32), 40)
    rules = Rules(Lists.of([[5], []]), Eligibility(is_eligible, np.zeros(2, dtype=np.int64)), bonuses)
    for method in [*EXACT, *APPROXIMATE]:
        found = search(open_shard, world, rules, ask(method, k=3, num_kept=3))
        assert found.rows_BK[0].tolist()[0] == 6
        assert set(found.rows_BK[1].tolist()[:2]) == {5, 6}
        assert not {5, 7} & set(found.rows_BK[0].tolist())
        assert 7 not in found.rows_BK[1].tolist()


def test_equal_sums_are_ordered_by_row(open_shard):
    """So large a bonus that the MoL score is rounded away: 150 equal sums, of which a list takes the first rows."""
    world = make_world(num_queries=3, num_items=150, max_excluded=0)
    bonuses = Bonuses(Lists.of([np.arange(150)] * 3), np.full(450, LARGEST, np.float32), 150)
    for num_shards, order in ((1, 1), (4, 1), (4, -1)):
        rules = Rules(world.excluded, bonuses=bonuses)
        found = search(open_shard, world, rules, ask("exact", k=30), num_shards, order)
        assert found.rows_BK.tolist() == [list(range(30))] * 3
        assert (found.scores_BK == LARGEST).all()


def test_a_penalty_moves_an_item_down_and_everything_hidden_leaves_a_short_list(open_shard):
    world = make_world(num_queries=1, num_items=30, max_excluded=0)
    best = int(search(open_shard, world, world.rules, ask("exact")).rows_BK[0, 0])
    penalty = Bonuses(Lists.of([[best]]), np.array([-1_000], np.float32), 30)
    found = search(open_shard, world, Rules(world.excluded, bonuses=penalty), ask("exact", k=30))
    assert found.rows_BK[0, -1] == best
    others = np.delete(np.arange(30), best)
    found = search(open_shard, world, Rules(Lists.of([others]), bonuses=penalty), ask("exact", k=30))
    assert found.rows_BK[0].tolist() == [best] + [NO_ITEM] * 29


def test_bonuses_of_another_index_are_refused(open_shard):
    world = make_world(num_queries=2, num_items=50)
    rules = Rules(world.excluded, bonuses=Bonuses(Lists.of([[3], []]), np.ones(1, np.float32), 49))
    with pytest.raises(ValueError, match="bonuses are for 49 items, but the shard ends at item 50"):
        search(open_shard, world, rules, ask("exact"))
