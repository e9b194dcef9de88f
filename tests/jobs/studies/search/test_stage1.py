"""The yardsticks of stage 1."""

import pytest
import torch
from torch import Tensor

from jobs.studies.search.stage1 import ProductSearch, better_yardstick, fastest_product_search
from jobs.studies.timing import Timing

K = 1_000


def random_tables(num_items: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(num_items, 64), torch.randn(9, 64)


@pytest.mark.parametrize("query_tile", [1, 4, 100])
def test_pytorchs_yardstick_returns_the_true_top_1000(query_tile: int):
    """Up to the rounding of a product to bfloat16: 8 bits, so at most one part in 256."""
    items_ND, queries_BD = random_tables(5_000)
    rows_BK = ProductSearch(items_ND.bfloat16(), query_tile)(queries_BD, K)
    exact_BN = queries_BD.bfloat16().double() @ items_ND.bfloat16().double().T
    kept_BK, true_BK = exact_BN.gather(1, rows_BK), exact_BN.topk(K, dim=1).values
    assert all(len(set(rows)) == K for rows in rows_BK.tolist())
    assert (kept_BK.amin(dim=1) >= true_BK[:, -1] * (1 - 1 / 128)).all()


@pytest.mark.parametrize("query_tile", [2, 3])
def test_pytorchs_yardstick_is_exact_and_in_order_where_bfloat16_is(query_tile: int):
    """Items are multiples of one vector by different numbers of 8 bits, so that no product is rounded."""
    exponents, mantissas = torch.meshgrid(torch.arange(-8, 8), torch.arange(128, 256), indexing="ij")
    sizes_N = (mantissas * 2.0**exponents).flatten()[torch.randperm(2_048, generator=torch.Generator().manual_seed(1))]
    queries_BD = torch.eye(4)[:1] * torch.tensor([[1.0], [-1.0], [0.5]])
    rows_BK = ProductSearch(sizes_N[:, None].bfloat16() * torch.eye(4)[:1].bfloat16(), query_tile)(queries_BD, K)
    descending, ascending = sizes_N.argsort(descending=True)[:K], sizes_N.argsort()[:K]
    assert rows_BK.tolist() == [descending.tolist(), ascending.tolist(), descending.tolist()]


def test_fewer_items_than_are_asked_for_are_all_returned():
    items_ND, queries_BD = random_tables(30)
    rows_BK = fastest_product_search(items_ND, queries_BD, K)(queries_BD, K)
    assert [sorted(rows) for rows in rows_BK.tolist()] == [list(range(30))] * 9


def test_we_are_compared_with_the_faster_yardstick():
    slow, fast = Timing((2.0, 2.0, 9.0), (1.0,) * 3), Timing((1.0, 5.0, 1.0), (1.0,) * 3)
    assert better_yardstick({"faiss": slow, "torch": fast}) == "torch"
    assert better_yardstick({"faiss": fast, "torch": slow}) == "faiss"
