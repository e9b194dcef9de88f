import numpy as np
import pytest
import torch

from jobs.studies.search.dot_product import faiss_threads, flat_index, flat_search, hnsw_indices

faiss = pytest.importorskip("faiss", reason="pip install 'nightrails[bench]'")

NUM_ITEMS, WIDTH, K = 300, 8, 10


def tables() -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Items, queries, and each query's true best items."""
    torch.manual_seed(0)
    items_ND, queries_BD = torch.randn(NUM_ITEMS, WIDTH), torch.randn(20, WIDTH)
    return items_ND, queries_BD, (queries_BD @ items_ND.T).topk(K, dim=1).indices.numpy()


def test_the_flat_searches_find_the_largest_inner_products():
    items_ND, queries_BD, truth_BK = tables()
    np.testing.assert_array_equal(flat_index(items_ND, num_threads=1).search(queries_BD, K), truth_BK)
    np.testing.assert_array_equal(flat_search(items_ND, queries_BD, K, num_threads=1), truth_BK)


def test_a_graph_finds_most_of_them_and_more_with_a_wider_search():
    items_ND, queries_BD, truth_BK = tables()
    recalls = []
    for index in hnsw_indices(items_ND, 1, (K, 200), links=4):
        kept_BK = index.search(queries_BD, K)
        recalls.append(np.mean([np.isin(truth_K, kept_K) for truth_K, kept_K in zip(truth_BK, kept_BK, strict=True)]))
    assert recalls[0] <= recalls[1]
    assert recalls[1] > 0.9


def test_the_number_of_threads_is_set_for_the_search_only():
    before = faiss.omp_get_max_threads()
    with faiss_threads(before + 1):
        assert faiss.omp_get_max_threads() == before + 1
    assert faiss.omp_get_max_threads() == before
