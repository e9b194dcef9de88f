"""faiss: how fast a search by plain inner products is, and, on the mean component, how much of MoL's lists it finds.

Needs `pip install 'nightrails[bench]'`. B queries, N items, K kept, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from pipeline.data.lists import Float32, Int64

HNSW_LINKS = 32
HNSW_EF_CONSTRUCTION = 80


class FaissIndex(Protocol):
    """The part of a faiss index that is used here (faiss ships no types)."""

    def search(self, queries_BD: Float32, k: int) -> tuple[Float32, Int64]:
        """Scores and rows, both (B, K); row -1 where the index has none."""


@dataclass(frozen=True)
class DotProductIndex:
    """One faiss index over item vectors; `search` keeps to the given number of threads."""

    name: str
    index: FaissIndex
    num_threads: int

    def search(self, queries_BD: Tensor, k: int) -> Int64:
        """Find the items (B, K) with the largest inner products; -1 where the index found fewer."""
        with faiss_threads(self.num_threads):
            return self.index.search(_array(queries_BD), k)[1]


def flat_search(items_ND: Tensor, queries_BD: Tensor, k: int, num_threads: int) -> Int64:
    """Find the items (B, K) with the largest inner products by comparing all, without an index."""
    import faiss

    with faiss_threads(num_threads):
        rows_BK: Int64 = faiss.knn(_array(queries_BD), _array(items_ND), k, metric=faiss.METRIC_INNER_PRODUCT)[1]
    return rows_BK


def flat_index(mean_ND: Tensor, num_threads: int) -> DotProductIndex:
    """An index that compares each query with every item."""
    import faiss

    index = faiss.IndexFlatIP(mean_ND.shape[1])
    index.add(_array(mean_ND))
    return DotProductIndex("IndexFlatIP", index, num_threads)


def hnsw_indices(
    mean_ND: Tensor, num_threads: int, efs_search: tuple[int, ...], links: int = HNSW_LINKS
) -> Iterator[DotProductIndex]:
    """One navigable graph under the inner product, searched ever more widely; use each index before the next is drawn.

    An `ef_search` should be at least the number of items asked for.
    """
    import faiss

    index = faiss.IndexHNSWFlat(mean_ND.shape[1], links, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = HNSW_EF_CONSTRUCTION
    with faiss_threads(num_threads):
        index.add(_array(mean_ND))
    for ef_search in efs_search:
        index.hnsw.efSearch = ef_search
        yield DotProductIndex(f"HNSW {links}/{ef_search}", index, num_threads)


@contextmanager
def faiss_threads(num_threads: int) -> Iterator[None]:
    """Let faiss use this number of threads, then as many as before."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num_threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _array(vectors: Tensor) -> Float32:
    array: Float32 = np.ascontiguousarray(vectors.float().numpy())
    return array
