import numpy as np
import pytest
import torch

from jobs.studies.search.dot_product import overlap

NUM_ITEMS, WIDTH, K = 300, 8, 10


def tables() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(NUM_ITEMS, WIDTH), torch.randn(20, WIDTH)


def test_overlap_counts_what_was_found_and_ignores_padding():
    truth = np.array([[1, 2, 3, 4], [5, 6, -1, -1]])
    found = np.array([[4, 3, 9, -1], [6, 5, 7, -1]])
    assert overlap(found, truth) == (0.5 + 1.0) / 2


class TestFaiss:
    faiss = pytest.importorskip("faiss", reason="pip install 'nightrails[bench]'")

    def test_the_flat_index_finds_the_largest_inner_products(self):
        from jobs.studies.search.dot_product import flat_index, measure_dot_product

        mean_ND, queries_BD = tables()
        truth_BK = (queries_BD @ mean_ND.T).topk(K, dim=1).indices.numpy()
        index = flat_index(mean_ND, num_threads=1)
        np.testing.assert_array_equal(index.search(queries_BD, K), truth_BK)
        assert measure_dot_product(index, queries_BD, truth_BK, K, num_rounds=1).recall == 1.0
        other = truth_BK[::-1].copy()  # the truth of other queries
        assert measure_dot_product(index, queries_BD, other, K, num_rounds=1).recall < 0.8

    def test_hnsw_finds_most_of_them_and_more_with_a_wider_search(self):
        from jobs.studies.search.dot_product import hnsw_index, overlap

        mean_ND, queries_BD = tables()
        truth_BK = (queries_BD @ mean_ND.T).topk(K, dim=1).indices.numpy()
        narrow, wide = (hnsw_index(mean_ND, 1, ef, links=4) for ef in (K, 200))
        assert overlap(wide.search(queries_BD, K), truth_BK) > 0.9
        assert overlap(narrow.search(queries_BD, K), truth_BK) <= overlap(wide.search(queries_BD, K), truth_BK)

    def test_the_number_of_threads_is_set_for_the_search_only(self):
        import faiss

        from jobs.studies.search.dot_product import faiss_threads

        before = faiss.omp_get_max_threads()
        with faiss_threads(before + 1):
            assert faiss.omp_get_max_threads() == before + 1
        assert faiss.omp_get_max_threads() == before
