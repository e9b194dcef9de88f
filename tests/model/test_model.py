import torch

from pipeline.model.model import RetrievalModel
from tests.model.planted import NUM_ITEMS, SMALL_MODEL, SMALL_MOL

ROWS_BL = torch.tensor([[3, 7, 1, 9, -1, -1], [5, -1, -1, -1, -1, -1], [2, 4, 6, 8, 10, 12]], dtype=torch.int32)
LENGTHS_B = torch.tensor([4, 1, 6], dtype=torch.int32)


def make_model(num_user_hashes: int = 0) -> RetrievalModel:
    torch.manual_seed(0)
    mol = SMALL_MOL.model_copy(update={"num_user_hashes": num_user_hashes})
    return RetrievalModel(SMALL_MODEL.model_copy(update={"mol": mol}), NUM_ITEMS).eval().requires_grad_(False)


def test_a_position_knows_nothing_of_later_events():
    model = make_model()
    changed_BL = ROWS_BL.clone()
    changed_BL[:, 3:] = torch.tensor([30, 31, 32])
    before, after = model.encode_positions(ROWS_BL), model.encode_positions(changed_BL)
    torch.testing.assert_close(before[:, :3][LENGTHS_B > 1], after[:, :3][LENGTHS_B > 1])
    assert not torch.allclose(before[2, 3], after[2, 3])


def test_neither_padding_nor_neighbours_change_a_query():
    model = make_model()
    queries_BE = model.encode(ROWS_BL, LENGTHS_B)
    for row, length in enumerate(LENGTHS_B.tolist()):
        alone = model.encode(ROWS_BL[row : row + 1, :length], LENGTHS_B[row : row + 1])
        torch.testing.assert_close(alone[0], queries_BE[row])


def test_queries_come_out_normalised():
    queries_BE = make_model().encode(ROWS_BL, LENGTHS_B)
    torch.testing.assert_close(queries_BE.mean(dim=-1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(queries_BE.square().mean(dim=-1), torch.ones(3), atol=1e-3, rtol=0)


def test_the_order_of_events_matters():
    model = make_model()
    there = model.encode(torch.tensor([[3, 7, 1]]), torch.tensor([3]))
    back = model.encode(torch.tensor([[7, 3, 1]]), torch.tensor([3]))
    assert not torch.allclose(there, back, atol=1e-4)


def test_users_without_history_get_one_finite_query():
    model = make_model()
    empty_BL = torch.full((2, 4), -1, dtype=torch.int32)
    queries_BE = model.encode(empty_BL, torch.zeros(2, dtype=torch.int32))
    assert torch.isfinite(queries_BE).all()
    torch.testing.assert_close(queries_BE[0], queries_BE[1])


def test_with_a_user_table_the_same_history_gives_each_user_another_query():
    model = make_model(num_user_hashes=7)
    rows_BL = ROWS_BL[2:].repeat(3, 1)
    side = model.query_side(rows_BL, torch.tensor([6, 6, 6]), torch.tensor([1, 8, 2]))
    torch.testing.assert_close(side.components_BQD[0], side.components_BQD[1])  # 1 and 8 share a row of 7
    assert not torch.allclose(side.components_BQD[0, -1], side.components_BQD[2, -1])
    torch.testing.assert_close(side.components_BQD[0, :-1], side.components_BQD[2, :-1])


def test_scores_have_one_row_per_query_and_one_column_per_item():
    model = make_model()
    query = model.query_side(ROWS_BL, LENGTHS_B, torch.arange(3))
    assert model.mol(query, model.item_side(torch.arange(NUM_ITEMS))).shape == (3, NUM_ITEMS)
