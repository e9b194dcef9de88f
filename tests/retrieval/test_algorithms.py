"""Laws of the algorithms of Ding & Zhai (2025), section 4: the conformance facts of their maths, on random worlds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.data.lists import NO_ITEM, Lists
from pipeline.retrieval import stage1 as candidates
from pipeline.retrieval.filters import Rules
from pipeline.retrieval.low_rank_fit import fit_low_rank
from pipeline.retrieval.search import search_shard
from pipeline.retrieval.topk import TopK
from pipeline.settings import SearchSettings
from tests.retrieval.worlds import World, all_scores, as_lists, brute_force, make_world, open_index

pytestmark = pytest.mark.usefixtures("backend")

K = 6
APPROXIMATE = ["topk_avg", "topk_per_embd", "comb_topk", "topk_low_rank"]


def ask(method: str, num_kept: int = 25, k: int = K, max_escalated: int = 0) -> SearchSettings:
    return SearchSettings(
        k=k, method=method, num_preselected=num_kept, num_per_embd=max(num_kept, k), max_escalated=max_escalated
    )


def search(world: World, config: SearchSettings, num_shards: int = 1) -> TopK:
    """The low-rank table, where it is asked for, is fitted on queries of another world."""
    found = None
    if config.method != "topk_low_rank":
        for shard in world.shards(num_shards):
            index = open_index(world.mol, shard, config)
            found = search_shard(index, world.queries, world.rules, config, found)
        assert found is not None
        return found
    sample = make_world(num_queries=60, num_items=1, seed=99).queries
    scores = world.mol(sample, world.items).detach()
    rank = min(8, len(world.items.gate_NP))
    fit = fit_low_rank(sample, scores, [rank])
    scores = scores[fit.low_rank.at_A]
    for shard in world.shards(num_shards):
        table = fit.low_rank.item_vectors(scores[:, shard.first_row : shard.first_row + len(shard)])
        index = open_index(world.mol, replace(shard, low_rank_NR=table), config)
        found = search_shard(index, world.queries, world.rules, config, found, fit.query_map)
    assert found is not None
    return found


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 120), st.sampled_from([*APPROXIMATE, "exact_two_stage"]))
@example(0, 8, "topk_avg")  # few enough to be scored in float64 at once
@example(2568, 47, "topk_avg")  # a score in bfloat16 is much further off than those of the query's best
def test_a_method_that_preselects_everything_equals_brute_force(seed, num_items, method):
    world = make_world(num_queries=4, num_items=num_items, seed=seed)
    found = search(world, ask(method, num_kept=max(K, num_items)))
    assert as_lists(found) == brute_force(all_scores(world), K)
    assert found.is_proven_B.all()


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from(APPROXIMATE), st.integers(1, 3), st.integers(K, 40))
def test_whatever_is_returned_is_allowed_unique_and_carries_its_exact_score(seed, method, num_shards, num_kept):
    world = make_world(num_queries=5, num_items=90, seed=seed)
    found = search(world, ask(method, num_kept), num_shards)
    scores_BN = all_scores(world)
    for query, entries in enumerate(as_lists(found)):
        rows = [row for _, row in entries]
        assert len(set(rows)) == len(rows)
        assert entries == sorted(entries, key=lambda entry: (-entry[0], entry[1]))
        assert [score for score, _ in entries] == scores_BN[query, rows].tolist()
        assert torch.isfinite(scores_BN[query, rows]).all()  # neither excluded nor padding


@pytest.mark.parametrize("method", APPROXIMATE)
def test_recall_rises_with_what_is_preselected(method):
    world = make_world(num_queries=40, num_items=300, max_excluded=0)
    exact = [{row for _, row in entries} for entries in as_lists(search(world, ask("exact")))]
    recalls = []
    for num_kept in (K, 20, 80, 300):
        found = as_lists(search(world, ask(method, num_kept)))
        recalls.append(sum(len({row for _, row in f} & e) for f, e in zip(found, exact, strict=True)))
    assert recalls == sorted(recalls)
    assert recalls[-1] == 40 * K


def sets(at_BM: torch.Tensor) -> list[set[int]]:
    return [set(row) - {NO_ITEM} for row in at_BM.tolist()]


def test_candidate_sets_are_nested_and_the_combination_is_the_union():
    world = make_world(num_queries=7, num_items=200)
    (shard,) = world.shards(1)
    index = open_index(world.mol, shard, ask("exact"))
    mask = world.rules.for_shard(0, len(shard))
    num_pairs = world.queries.gate_BP.shape[1]
    smaller: list[set[int]] = [set()] * 7
    for num_kept in (1, 2, 10, 50):
        by_component, _ = candidates.topk_per_embd(index, world.queries, num_kept, mask)
        by_mean, _ = candidates.topk_avg(index, world.queries, 30, mask)
        both, _ = candidates.comb_topk(index, world.queries, num_kept, 30, mask)
        for few, many, mean, union in zip(smaller, sets(by_component), sets(by_mean), sets(both), strict=True):
            assert few <= many
            assert len(many) <= num_pairs * num_kept
            assert union == many | mean
        smaller = sets(by_component)


def test_no_item_is_a_candidate_twice():
    at = torch.tensor([[3, 1, 3, -1, 0, 1], [-1, -1, -1, -1, -1, -1], [5, 4, 3, 2, 1, 0]])
    assert candidates.distinct(at).tolist() == [[3, 1, 0, -1, -1, -1], [-1] * 6, [5, 4, 3, 2, 1, 0]]


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from(["topk_per_embd", "comb_topk"]), st.integers(K, 60), st.integers(1, 3))
def test_a_free_certificate_is_never_wrong(seed, method, num_kept, num_shards):
    world = make_world(num_queries=6, num_items=100, seed=seed)
    found = search(world, ask(method, num_kept), num_shards)
    exact = search(world, ask("exact"))
    proven = found.is_proven_B
    assert torch.equal(found.rows_BK[proven], exact.rows_BK[proven])
    # However far off: the i-th score is at least the true one less the gap.
    is_short = exact.scores_BK.isneginf()
    assert ((found.scores_BK >= exact.scores_BK - found.gaps_B[:, None] - 1e-6) | is_short).all()


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from(APPROXIMATE), st.sampled_from([1, 20, 60, 1_000]), st.integers(1, 3))
def test_an_escalated_search_proves_what_it_says(seed, method, budget, num_shards):
    world = make_world(num_queries=6, num_items=120, seed=seed)
    plain, exact = search(world, ask(method), num_shards), search(world, ask("exact"))
    found = search(world, ask(method, max_escalated=budget), num_shards)
    assert (found.scores_BK >= plain.scores_BK).all()
    assert torch.equal(found.rows_BK[found.is_proven_B], exact.rows_BK[found.is_proven_B])
    is_short = exact.scores_BK.isneginf()
    assert ((found.scores_BK >= exact.scores_BK - found.gaps_B[:, None] - 1e-6) | is_short).all()
    if budget >= 120:
        assert found.is_proven_B.all()


def test_numbering_the_items_otherwise_changes_no_result():
    world = make_world(num_items=140)
    order = torch.randperm(140, generator=torch.Generator().manual_seed(0))
    place = torch.empty(140, dtype=torch.int64)
    place[order] = torch.arange(140)
    lists = [place[world.excluded[q]].numpy() for q in range(len(world.excluded))]
    shuffled = replace(world, items=world.items.take(order), excluded=Lists.of(lists))
    for method in ["exact", "exact_two_stage", *APPROXIMATE]:
        found, again = (as_lists(search(w, ask(method))) for w in (world, shuffled))
        assert [[(score, int(order[row])) for score, row in entries] for entries in again] == found, method


@pytest.mark.parametrize("method", ["exact_two_stage", *APPROXIMATE])
def test_the_other_queries_of_a_batch_do_not_change_a_bit(method):
    world = make_world(num_queries=7)
    together = as_lists(search(world, ask(method)))
    for query in range(7):
        one = slice(query, query + 1)
        alone = replace(world, queries=world.queries.take(one), excluded=world.excluded.narrow(query, query + 1))
        assert as_lists(search(alone, ask(method)))[0] == together[query]


@pytest.mark.parametrize("method", APPROXIMATE)
def test_exclusions_act_before_an_item_takes_a_place(method):
    """What is excluded is replaced by the next best candidate: as good as if the item did not exist."""
    world = make_world(num_queries=3, num_items=150, max_excluded=0)
    first = search(world, ask(method, 20))
    hidden = first.rows_BK[:, :3].numpy()
    excluded = search(replace(world, excluded=Lists.of(list(hidden))), ask(method, 20))
    for query in range(3):
        left = torch.tensor(sorted(set(range(150)) - set(hidden[query].tolist())))
        without = replace(
            world,
            items=world.items.take(left),
            queries=world.queries.take(slice(query, query + 1)),
            excluded=Lists.of([[]]),
        )
        if method == "topk_low_rank":
            continue  # its table would be fitted anew
        expected = [(score, int(left[row])) for score, row in as_lists(search(without, ask(method, 20)))[0]]
        assert as_lists(excluded)[query] == expected
    assert not any(set(rows) & set(mine) for rows, mine in zip(excluded.rows_BK.tolist(), hidden.tolist(), strict=True))


def test_a_query_with_fifty_thousand_exclusions_gets_the_best_of_the_rest():
    world = make_world(num_queries=2, num_items=60_000, max_excluded=0)
    hidden = np.random.default_rng(0).choice(60_000, 50_000, replace=False)
    world = replace(world, excluded=Lists.of([hidden, np.array([], dtype=np.int64)]))
    expected = brute_force(all_scores(world), K)
    for method in ("exact", "comb_topk"):
        assert as_lists(search(world, ask(method, 2_000)))[0] == expected[0]


@given(st.integers(0, 1_000), st.integers(1, 6), st.integers(1, 60))
def test_short_lists_of_topk_per_embd_grow_until_every_query_has_k_candidates(seed, num_kept, num_items):
    """The lists of the pairs of components overlap, so that their union may have fewer than k items."""
    world = make_world(num_queries=5, num_items=num_items, seed=seed)
    config = SearchSettings(k=12, method="topk_per_embd", num_per_embd=num_kept)
    (shard,) = world.shards(1)
    excluded = Lists.of([np.arange(0, num_items, step) for step in (1, 2, 3, num_items + 1, 5)])
    found = search_shard(open_index(world.mol, shard, config), world.queries, Rules(excluded), config)
    num_allowed = num_items - excluded.lengths
    assert (found.rows_BK != NO_ITEM).sum(dim=1).tolist() == np.minimum(num_allowed, 12).tolist()
