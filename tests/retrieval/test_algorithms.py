"""Laws of the algorithms of Ding & Zhai (2025), section 4: the conformance facts of their maths, on random worlds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.data.lists import NO_ITEM, Lists
from pipeline.retrieval import stage1 as candidates
from pipeline.retrieval.low_rank import fit_landmarks, low_rank_table
from pipeline.retrieval.low_rank_fit import fit_low_rank
from pipeline.retrieval.search import search_shard
from pipeline.retrieval.shard import make_shard
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
        table = fit.low_rank.place(scores[:, shard.first_row : shard.first_row + len(shard)])
        index = open_index(world.mol, replace(shard, low_rank_NR=table), config)
        found = search_shard(index, world.queries, world.rules, config, found, fit.query_map)
    assert found is not None
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 120), st.sampled_from([*APPROXIMATE, "exact_two_stage"]))
@example(0, 8, "topk_avg")  # few enough to be scored in float64 at once
@example(2568, 47, "topk_avg")  # a score in bfloat16 is much further off than those of the query's best
def test_a_method_that_preselects_everything_equals_brute_force(seed, num_items, method):
    world = make_world(num_queries=4, num_items=num_items, seed=seed)
    found = search(world, ask(method, num_kept=max(K, num_items)))
    assert as_lists(found) == brute_force(all_scores(world), K)
    assert found.is_proven_B.all()


@settings(max_examples=40, deadline=None)
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


@settings(max_examples=60, deadline=None)
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


@settings(max_examples=60, deadline=None)
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


# --- the low-rank table


def test_the_low_rank_table_of_a_shard_comes_from_its_exact_scores():
    world = make_world(num_items=70)
    sample = make_world(num_queries=40, seed=5).queries
    scores = world.mol(sample, world.items).detach()
    found = fit_low_rank(sample, scores, [6]).low_rank
    parts = [low_rank_table(open_index(world.mol, shard, ask("exact")), found) for shard in world.shards(3)]
    expected = found.place(scores[found.at_A])
    assert (torch.cat(parts) - expected).norm() < 0.01 * expected.norm()  # stage 2 may score in bfloat16


def test_scores_of_low_rank_are_recovered_up_to_what_the_sample_spans():
    """With nearly as many directions as queries their scores come back, up to a constant per query."""
    sample, world = make_world(num_queries=24, seed=1).queries, make_world(num_items=300)
    scores = world.mol(sample, world.items).detach()
    fit = fit_low_rank(sample, scores, [20])
    assert len(fit.low_rank.at_A) == 21  # the other three chose between the fits
    vectors = fit.low_rank.place(scores[:21])
    wanted = scores[:21] - scores[:21].mean(dim=1, keepdim=True)
    solved = torch.linalg.lstsq(vectors.double(), wanted.T.double())
    error = (vectors.double() @ solved.solution - wanted.T).norm() / wanted.norm()
    assert error < 0.15


def products_of(world: World) -> torch.Tensor:
    """(B, N): inner products of one pair of components, of rank 8."""
    return 20 * world.queries.components_BQD[:, 0] @ world.items.components_NXD[:, 0].T


def test_scores_against_the_anchors_give_the_vectors_that_those_against_all_queries_give(monkeypatch):
    """Exactly where scores are of low rank, and nearly so under MoL, whose scores are not."""
    world = make_world(num_queries=400, num_items=900)
    for scores, most in ((products_of(world), 1e-2), (world.mol(world.queries, world.items).detach(), 0.35)):
        tables = {}
        for per_rank in (8, 1_000):
            monkeypatch.setattr("pipeline.retrieval.low_rank_fit.ANCHORS_PER_RANK", per_rank)
            fit = fit_low_rank(world.queries, scores[:, :600], [12])
            assert fit.low_rank.at_A.unique().numel() == len(fit.low_rank.at_A)
            assert torch.equal(fit.low_rank.anchors.gate_BP, world.queries.gate_BP[fit.low_rank.at_A])
            tables[len(fit.low_rank.at_A)] = fit.low_rank.place(scores[fit.low_rank.at_A])[600:]
        few, many = sorted(tables)
        assert few <= 12 * 8 < many == 350
        assert (tables[few] - tables[many]).norm() < most * tables[many].norm()


def test_a_rank_above_the_sample_is_refused():
    sample, world = make_world(num_queries=10).queries, make_world(num_items=300)
    with pytest.raises(ValueError, match="rank 64 is too much for 9 queries"):
        fit_low_rank(sample, world.mol(sample, world.items).detach(), [8, 64])


def test_a_larger_rank_is_chosen_where_it_saves_more_candidates_than_it_costs():
    """On the same scores: cheap candidates make the small rank the best, dear ones the large."""
    world = make_world(num_queries=400, num_items=600)
    scores = world.mol(world.queries, world.items).detach()
    fits = {price: fit_low_rank(world.queries, scores, [4, 16, 48], pair_cost=price) for price in (0, 1_000_000)}
    needed = [trial.num_needed for trial in fits[0].trials]
    assert needed[0] > needed[1] >= needed[2] >= 100
    assert fits[0].chosen.rank == 4
    assert fits[1_000_000].chosen.rank == (16 if needed[1] == needed[2] else 48)
    for price, fit in fits.items():
        assert [trial.rank for trial in fit.trials] == [4, 16, 48]
        assert all(t.multiply_adds == 600 * t.rank + price * t.num_needed for t in fit.trials)


@pytest.mark.parametrize("rank", [2, 7, 31])
def test_a_rank_among_others_is_fitted_as_it_is_alone(rank):
    world = make_world(num_queries=150, num_items=300)
    scores = world.mol(world.queries, world.items).detach()
    alone = fit_low_rank(world.queries, scores, [rank], pair_cost=0)
    among = fit_low_rank(world.queries, scores, [rank, 32], pair_cost=0)
    assert among.chosen == alone.chosen
    torch.testing.assert_close(among.low_rank.basis_AR, alone.low_rank.basis_AR)
    torch.testing.assert_close(among.query_map.weights_ZR, alone.query_map.weights_ZR, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("is_same_for_all", [False, True])
def test_scores_of_a_lower_rank_than_asked_for_are_found_again(is_same_for_all):
    """One pair of components is a plain inner product, here of eight numbers; the other directions say nothing."""
    world = make_world(num_queries=400, num_items=300)
    products = products_of(world)
    scores = products[:1].expand(400, -1) if is_same_for_all else products
    fit = fit_low_rank(world.queries, scores, [64])
    table = fit.low_rank.place(scores[fit.low_rank.at_A])
    predicted = fit.query_map(world.queries) @ table.T
    best, found = scores.topk(10, dim=1).indices, predicted.topk(20, dim=1).indices
    assert (best[:, :, None] == found[:, None, :]).any(dim=2).float().mean() > 0.98
    assert table.abs().max() < 100 * table.std()


def test_both_ways_to_place_a_query_find_far_more_than_the_mean_component():
    everybody = make_world(num_queries=330, num_items=400, max_excluded=0)
    sample, few = everybody.queries.take(slice(30, None)), everybody.excluded.narrow(0, 30)
    world = replace(everybody, queries=everybody.queries.take(slice(0, 30)), excluded=few)
    scores = world.mol(sample, world.items).detach()
    fit = fit_low_rank(sample, scores, [12])
    quarter = world.items.take(torch.arange(0, 400, 4))
    landmarks = fit_landmarks(world.mol, fit.low_rank, sample, quarter, fit.mean_weight)
    table = fit.low_rank.place(scores[fit.low_rank.at_A])
    index = open_index(world.mol, make_shard(0, world.items, table), ask("topk_low_rank", 40))
    exact = [{row for _, row in entries} for entries in as_lists(search(world, ask("exact")))]

    def recall(method: str, query_map=None) -> float:
        found = as_lists(search_shard(index, world.queries, world.rules, ask(method, 40), query_map=query_map))
        return sum(len({row for _, row in f} & e) for f, e in zip(found, exact, strict=True)) / (30 * K)

    assert recall("topk_low_rank", landmarks) > recall("topk_avg") + 0.25
    assert recall("topk_low_rank", fit.query_map) > recall("topk_avg") + 0.2
