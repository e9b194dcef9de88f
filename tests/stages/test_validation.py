"""Validation by search against two oracles: sorting all scores in float64, and the plain ranking of the model floor."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.batches import ValidationUsers, validation_users
from pipeline.data.lists import Lists
from pipeline.evaluation.metrics import find_hits, ndcg_at_k
from pipeline.model.model import RetrievalModel
from pipeline.model.validation import RankingSums, rank_by_model
from pipeline.native.loader import native_kernels
from pipeline.retrieval import all_items
from pipeline.retrieval.brute_force import brute_force
from pipeline.retrieval.filters import Rules
from pipeline.retrieval.shard import embed_rows, make_shard
from pipeline.stages import validation
from pipeline.stages.encode import encode_sequences
from pipeline.stages.validation import rank_by_search
from tests.model.planted import NUM_ITEMS, SMALL_MODEL, SMALL_MOL

BACKENDS = ["torch", *(["native"] if native_kernels().functions else [])]
WITH_USERS = SMALL_MODEL.model_copy(update={"mol": SMALL_MOL.model_copy(update={"num_user_hashes": 100})})


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several indexes, few seeds in each, and several tiles of users."""
    monkeypatch.setattr(all_items, "ITEMS_AT_ONCE", 17)
    monkeypatch.setattr(all_items, "NUM_SEEDS", 1)
    monkeypatch.setattr(validation, "USERS_AT_ONCE", 25)


def make_users(rng: np.random.Generator, num_users: int = 60) -> ValidationUsers:
    """Histories and one to five held-out items of each user; a few have seen nearly everything."""
    lengths = rng.choice([1, 3, 11, 100], num_users)
    histories = Lists.of(rng.integers(NUM_ITEMS, size=length) for length in lengths)
    held_out = Lists.of(rng.integers(NUM_ITEMS, size=rng.integers(1, 6)) for _ in range(num_users))
    return validation_users(histories, held_out, np.arange(num_users))


def make_model(seed: int, has_ties: bool) -> RetrievalModel:
    """Random weights, large enough for scores that differ; with `has_ties` two neighbours are the same item."""
    torch.manual_seed(seed)
    model = RetrievalModel(WITH_USERS, NUM_ITEMS).requires_grad_(False)
    model.item_embedding.weight *= 30
    if has_ties:
        model.item_embedding.weight[1:NUM_ITEMS:2] = model.item_embedding.weight[0:NUM_ITEMS:2]
    return model


def by_sorting(model: RetrievalModel, users: ValidationUsers, cutoff: int) -> RankingSums:
    model.eval()
    queries = encode_sequences(model, users.histories, users.user_keys)
    shard = make_shard(0, embed_rows(model, torch.arange(NUM_ITEMS)))
    _, rows_BK = brute_force(model.mol, queries, [shard], Rules(users.histories), cutoff)
    is_hit_BK = find_hits(rows_BK, users.held_out)
    ndcg = float(ndcg_at_k(is_hit_BK, users.held_out.lengths, cutoff).sum())
    return RankingSums(float(is_hit_BK.any(axis=1).sum()), ndcg)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 3, 10, NUM_ITEMS + 5]), st.booleans())
def test_the_ranks_are_those_of_sorting_all_unseen_items_on_every_backend(seed, cutoff, has_ties):
    users, model = make_users(np.random.default_rng(seed)), make_model(seed, has_ties)
    expected = by_sorting(model, users, cutoff)
    for backend in BACKENDS:
        model.train()  # as it comes from a round
        found = rank_by_search(backend, model, users, cutoff)
        assert found.num_hits == expected.num_hits
        assert found.ndcg == pytest.approx(expected.ndcg)
        assert found == rank_by_search("torch", model, users, cutoff), "to the bit"
    if not has_ties:
        plain = rank_by_model(model, users, cutoff)
        assert (plain.num_hits, plain.ndcg) == pytest.approx((expected.num_hits, expected.ndcg))


def test_the_approximate_search_alone_would_be_wrong():
    """So the test above sees whether the exact search is made."""
    model, users = make_model(0, has_ties=False), make_users(np.random.default_rng(0))
    queries = encode_sequences(model.eval(), users.histories, users.user_keys)
    quick, exact = all_items.quick_and_exact(3, "torch")
    lists = [
        all_items.search_all_items(model, queries, Rules(users.histories), each).rows_BK for each in (quick, exact)
    ]
    assert not torch.equal(*lists)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_user_whose_query_is_not_a_number_has_no_hit(backend):
    model, users = make_model(1, has_ties=False), make_users(np.random.default_rng(1))
    with_hit = next(n for n, one in enumerate(users.tiles(1)) if rank_by_search(backend, model, one, 10).num_hits)
    expected = rank_by_search(backend, model, users.take(np.delete(np.arange(len(users)), with_hit)), 10)
    assert model.mol.user_table is not None
    model.mol.user_table.weight[users.user_keys[with_hit] + 1] = torch.nan
    found = rank_by_search(backend, model, users, 10)
    assert (found.num_hits, found.ndcg) == (expected.num_hits, pytest.approx(expected.ndcg))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["mol.item_gate.2.weight", "mol.cross_out.bias", "mol.query_gate.2.weight"])
def test_with_weights_that_are_not_numbers_nobody_has_a_hit(backend, what):
    model, users = make_model(1, has_ties=False), make_users(np.random.default_rng(1))
    model.get_parameter(what).fill_(torch.nan)
    assert rank_by_search(backend, model, users, 10) == RankingSums()


def test_no_users_no_hits():
    nobody = make_users(np.random.default_rng(0)).take(np.empty(0, dtype=np.int64))
    assert rank_by_search("auto", make_model(0, has_ties=False), nobody, 10) == RankingSums()
