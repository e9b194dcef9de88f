"""The dot-product yardstick: faiss on the mean component, what a search without Mixture-of-Logits would do.

Needs `pip install 'nightrails[bench]'`. Recall is against exact MoL, so it also says what the dot product leaves on the
table. B queries, N items, K kept, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from jobs.studies.timing import Timing, time_interleaved
from pipeline.data.lists import Float32, Int64

HNSW_LINKS = 32
HNSW_EF_CONSTRUCTION = 80


@dataclass(frozen=True)
class DotProductIndex:
    """One faiss index over the items' mean components; `search` keeps to the given number of threads."""

    name: str
    index: Any  # faiss ships no types
    num_threads: int

    def search(self, queries_BD: Tensor, k: int) -> Int64:
        """(B, K) items with the largest inner product; -1 where the index found fewer."""
        with faiss_threads(self.num_threads):
            rows_BK: Int64 = self.index.search(_array(queries_BD), k)[1]
        return rows_BK


@dataclass(frozen=True)
class DotProductResult:
    """Against exact MoL: the share of its top k among the first k, or among more, by inner product; and the time."""

    name: str
    k: int
    num_preselected: int
    recall: float
    timing: Timing  # of all queries together


def flat_index(mean_ND: Tensor, num_threads: int) -> DotProductIndex:
    """Exact inner products with every item."""
    import faiss

    index = faiss.IndexFlatIP(mean_ND.shape[1])
    index.add(_array(mean_ND))
    return DotProductIndex("faiss flat", index, num_threads)


def hnsw_index(
    mean_ND: Tensor,
    num_threads: int,
    ef_search: int,
    links: int = HNSW_LINKS,
    ef_construction: int = HNSW_EF_CONSTRUCTION,
) -> DotProductIndex:
    """A navigable graph under the inner product. `ef_search` should be at least the number of items asked for."""
    import faiss

    index = faiss.IndexHNSWFlat(mean_ND.shape[1], links, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = ef_construction
    index.hnsw.efSearch = ef_search
    with faiss_threads(num_threads):
        index.add(_array(mean_ND))
    return DotProductIndex(f"faiss HNSW {links}/{ef_search}", index, num_threads)


def measure_dot_product(
    index: DotProductIndex, queries_BD: Tensor, truth_BK: Int64, num_preselected: int, num_rounds: int = 5
) -> DotProductResult:
    """Recall of the exact MoL lists `truth_BK` among the `num_preselected` best by inner product, and the time."""
    found_BM = index.search(queries_BD, num_preselected)
    call = {index.name: lambda: index.search(queries_BD, num_preselected)}
    timing = time_interleaved(call, num_rounds)[index.name]
    return DotProductResult(index.name, truth_BK.shape[1], num_preselected, overlap(found_BM, truth_BK), timing)


def overlap(found_BM: Int64, truth_BK: Int64) -> float:
    """The mean share of each query's true items that were found; -1 is no item, on either side."""
    shares = []
    for found, truth in zip(found_BM, truth_BK, strict=True):
        wanted = truth[truth >= 0]
        shares.append(np.isin(wanted, found[found >= 0]).mean() if len(wanted) else 1.0)
    return float(np.mean(shares))


@contextmanager
def faiss_threads(num_threads: int) -> Iterator[None]:
    """Use that many threads in faiss, then as many as before."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num_threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _array(vectors: Tensor) -> Float32:
    array: Float32 = np.ascontiguousarray(vectors.float().cpu().numpy())
    return array
