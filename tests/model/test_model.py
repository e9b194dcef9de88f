from typing import get_args

import pytest
import torch
from torch import nn

from pipeline.data.lists import EventColumn
from pipeline.model import model as model_module
from pipeline.model.dropout import keep_mask
from pipeline.model.encoders import ENCODERS
from pipeline.model.encoders.sasrec import SasRec
from pipeline.model.inputs import Events, QueryInput
from pipeline.model.model import RetrievalModel
from pipeline.model.mol import MixtureOfLogits
from pipeline.settings import ModelSettings
from tests.model.planted import NUM_ITEMS, SMALL_MODEL, SMALL_MOL

ROWS_BL = torch.tensor([[3, 7, 1, 9, -1, -1], [5, -1, -1, -1, -1, -1], [2, 4, 6, 8, 10, 12]], dtype=torch.int32)
EVENTS = Events(ROWS_BL)


def make_settings(num_user_hashes: int = 0) -> ModelSettings:
    mol = SMALL_MOL.model_copy(update={"num_user_hashes": num_user_hashes})
    return SMALL_MODEL.model_copy(update={"mol": mol})


def make_model(num_user_hashes: int = 0) -> RetrievalModel:
    torch.manual_seed(0)
    return RetrievalModel(make_settings(num_user_hashes), NUM_ITEMS).eval().requires_grad_(False)


def test_a_position_knows_nothing_of_later_events():
    model = make_model()
    changed_BL = ROWS_BL.clone()
    changed_BL[:, 3:] = torch.tensor([30, 31, 32])
    before, after = model.encode_positions(EVENTS), model.encode_positions(Events(changed_BL))
    torch.testing.assert_close(before[:, :3][EVENTS.lengths_B > 1], after[:, :3][EVENTS.lengths_B > 1])
    assert not torch.allclose(before[2, 3], after[2, 3])


def test_neither_padding_nor_neighbours_change_a_query():
    model = make_model()
    queries_BE = model.encode(EVENTS)
    for row, length in enumerate([4, 1, 6]):
        alone = model.encode(Events(ROWS_BL[row : row + 1, :length]))
        torch.testing.assert_close(alone[0], queries_BE[row])


def test_queries_come_out_normalised():
    queries_BE = make_model().encode(EVENTS)
    torch.testing.assert_close(queries_BE.mean(dim=-1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(queries_BE.square().mean(dim=-1), torch.ones(3), atol=1e-3, rtol=0)


def test_the_order_of_events_matters():
    model = make_model()
    there, back = (model.encode(Events(torch.tensor([rows]))) for rows in ([3, 7, 1], [7, 3, 1]))
    assert not torch.allclose(there, back, atol=1e-4)


def test_users_without_history_get_one_finite_query():
    model = make_model()
    queries_BE = model.encode(Events(torch.full((2, 4), -1)))
    assert torch.isfinite(queries_BE).all()
    torch.testing.assert_close(queries_BE[0], queries_BE[1])


def test_with_a_user_table_the_same_history_gives_each_user_another_query():
    model = make_model(num_user_hashes=7)
    side = model.query_side(QueryInput(Events(ROWS_BL[2:].repeat(3, 1)), torch.tensor([1, 8, 2])))
    torch.testing.assert_close(side.components_BQD[0], side.components_BQD[1])  # 1 and 8 share a row of 7
    assert not torch.allclose(side.components_BQD[0, -1], side.components_BQD[2, -1])
    torch.testing.assert_close(side.components_BQD[0, :-1], side.components_BQD[2, :-1])


def test_scores_have_one_row_per_query_and_one_column_per_item():
    model = make_model()
    query = model.query_side(QueryInput(EVENTS, torch.arange(3)))
    assert model.mol(query, model.item_side(torch.arange(NUM_ITEMS))).shape == (3, NUM_ITEMS)


def test_the_names_of_the_weights_are_those_that_checkpoints_hold():
    parts = {
        "item_embedding": ["weight"],
        "encoder": ["positions.weight"],
        "encoder.blocks.0": [
            *("attention_norm.weight", "attention_norm.bias", "attention_in.weight", "attention_in.bias"),
            *("attention_out.weight", "attention_out.bias", "ffn_norm.weight", "ffn_norm.bias"),
            *("ffn_in.weight", "ffn_in.bias", "ffn_out.weight", "ffn_out.bias"),
        ],
        "mol": [
            *("query_hidden.linear.weight", "query_hidden.linear.bias", "query_out.weight", "query_out.bias"),
            *("user_table.weight", "item_out.weight", "item_out.bias"),
            *("query_gate.0.weight", "query_gate.0.bias", "query_gate.2.weight"),
            *("item_gate.0.weight", "item_gate.0.bias", "item_gate.2.weight"),
            *("cross_hidden.weight", "cross_hidden.bias", "cross_out.weight", "cross_out.bias"),
        ],
    }
    names = [f"{part}.{name}" for part, names in parts.items() for name in names]
    assert list(make_model(num_user_hashes=7).state_dict()) == names


def test_a_seed_draws_the_item_table_then_the_encoder_then_mol_and_last_the_item_table_again():
    """In this order, and so many numbers, or the same seed trains another model."""
    settings, actual = make_settings(num_user_hashes=7), make_model(num_user_hashes=7).state_dict()
    torch.manual_seed(0)
    table = nn.Embedding(NUM_ITEMS + 1, settings.dim).weight.detach()
    parts = {"encoder": SasRec(settings), "mol": MixtureOfLogits(settings.dim, settings.mol)}
    nn.init.trunc_normal_(table, std=0.02, a=-0.04, b=0.04)[NUM_ITEMS] = 0
    expected = {
        f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()
    }
    for name, value in (expected | {"item_embedding.weight": table}).items():
        assert torch.equal(actual[name], value), name


def test_biases_start_at_zero_and_mol_matrices_with_the_spread_of_xavier():
    model = make_model()
    biases = {name: value for name, value in model.named_parameters() if name.endswith("bias")}
    first_gate = biases.pop("mol.cross_out.bias")
    assert first_gate[0] > 0  # MoL starts as the dot-product head
    assert not first_gate[1:].any()
    assert not any(value.any() for value in biases.values())
    wide = MixtureOfLogits(200, SMALL_MOL.model_copy(update={"query_hidden_dim": 300})).query_hidden.linear.weight
    assert wide.std().item() == pytest.approx((2 / (200 + 600)) ** 0.5, rel=0.02)


def slow_sasrec(model: RetrievalModel, item_rows: list[int]) -> torch.Tensor:
    """(L, E) queries of one history, one position and one head after the other, from the paper's formulas."""
    encoder, heads = model.encoder, model.settings.num_heads
    dim = model.settings.dim // heads
    hidden = [
        model.item_embedding.weight[row] * model.settings.dim**0.5 + encoder.positions.weight[place]
        for place, row in enumerate(item_rows)
    ]
    for block in encoder.blocks:
        inputs = [block.attention_in(block.attention_norm(each)).view(3, heads, dim) for each in hidden]
        for place in range(len(hidden)):
            attended = []
            for head in range(heads):
                queries, keys, values = (torch.stack([each[part, head] for each in inputs]) for part in range(3))
                shares = torch.softmax(keys[: place + 1] @ queries[place] / dim**0.5, dim=0)
                attended.append(shares @ values[: place + 1])
            middle = hidden[place] + block.attention_out(torch.cat(attended))
            hidden[place] = middle + block.ffn_out(block.ffn_in(block.ffn_norm(middle)).relu())
    return torch.stack([(each - each.mean()) / (each.var(unbiased=False) + 1e-6).sqrt() for each in hidden])


def test_the_encoder_is_that_of_the_paper():
    model = make_model().double()
    for parameter in model.encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    queries_BLE = model.encode_positions(EVENTS)
    for row, length in enumerate([4, 1, 6]):
        expected_LE = slow_sasrec(model, ROWS_BL[row, :length].tolist())
        torch.testing.assert_close(queries_BLE[row, :length], expected_LE)


def test_in_training_the_encoder_drops_its_input_and_the_attention_and_both_layers_of_the_feed_forward_network():
    """The random numbers that are left over are those after a mask for each, in this order."""
    settings = make_settings().model_copy(update={"ffn_dim": 24})
    model = RetrievalModel(settings, NUM_ITEMS).train()
    torch.manual_seed(5)
    model.encode_positions(EVENTS)
    left_over = torch.get_rng_state()
    torch.manual_seed(5)
    for width in (settings.dim, settings.dim, settings.ffn_dim, settings.dim):
        keep_mask(torch.empty(*ROWS_BL.shape, width), settings.dropout)
    assert torch.equal(torch.get_rng_state(), left_over)


def test_the_item_tower_looks_rows_up_without_drawing_a_random_number():
    tower = make_model().train().item_embedding
    before = torch.get_rng_state()
    embedded_BLE = tower(ROWS_BL)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(embedded_BLE, tower.weight[torch.where(ROWS_BL < 0, NUM_ITEMS, ROWS_BL)])


def test_every_encoder_that_the_settings_allow_can_be_made():
    assert set(get_args(ModelSettings.model_fields["encoder"].annotation)) == set(ENCODERS)


class Ageing(nn.Module):
    """An encoder that needs times: the query is the item of the event, scaled by the event's time."""

    reads: frozenset[EventColumn] = frozenset({"times"})

    def forward(self, items_BLE: torch.Tensor, events: Events) -> torch.Tensor:
        return items_BLE * events.columns["times"].unsqueeze(-1)


def test_an_encoder_says_what_it_reads_and_gets_it(monkeypatch):
    monkeypatch.setattr(model_module, "make_encoder", lambda settings: Ageing())
    model = make_model()
    times_BL = torch.arange(18.0).view(3, 6)
    queries_BE = model.encode(Events(ROWS_BL, {"times": times_BL}))
    expected_BE = model.item_embedding.weight[[9, 5, 12]] * torch.tensor([[3.0], [6.0], [17.0]])
    torch.testing.assert_close(queries_BE, expected_BE)
    with pytest.raises(AssertionError, match="times"):
        model.encode(EVENTS)
