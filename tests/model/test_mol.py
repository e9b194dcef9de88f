"""MoL against the golden vector and the laws that its definition implies, by number."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from pipeline.errors import InputError
from pipeline.model import mol as mol_module
from pipeline.model.losses import mutual_information_loss
from pipeline.model.mol import ItemSide, MixtureOfLogits, QuerySide
from pipeline.settings import MolSettings

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())


def wave(tensor_id: int, *shape: int) -> torch.Tensor:
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return (0.3 * torch.sin(1.0 + 0.37 * steps + 1.3 * tensor_id)).reshape(shape)


def golden_mol() -> MixtureOfLogits:
    settings = MolSettings(
        num_query_components=3, num_item_components=2, component_dim=4, query_hidden_dim=5, gate_hidden_dim=7,
        num_user_hashes=5,
    )  # fmt: skip
    mol = MixtureOfLogits(6, settings).double().eval()
    weights = {
        "query_hidden.linear.weight": wave(1, 6, 10).T,
        "query_hidden.linear.bias": wave(2, 10),
        "query_out.weight": wave(3, 8, 5),
        "query_out.bias": wave(4, 8),
        "user_table.weight": wave(5, 6, 4),
        "item_out.weight": wave(6, 8, 6),
        "item_out.bias": wave(7, 8),
        "query_gate.0.weight": wave(8, 7, 6),
        "query_gate.0.bias": wave(9, 7),
        "query_gate.2.weight": wave(10, 6, 7),
        "item_gate.0.weight": wave(11, 7, 6),
        "item_gate.0.bias": wave(12, 7),
        "item_gate.2.weight": wave(13, 6, 7),
        "cross_hidden.weight": wave(14, 7, 6),
        "cross_hidden.bias": wave(15, 7),
        "cross_out.weight": wave(16, 6, 7),
        "cross_out.bias": wave(17, 6),
    }
    mol.load_state_dict(weights)
    return mol


def golden_sides(mol: MixtureOfLogits) -> tuple[QuerySide, ItemSide]:
    user_rows_B = mol.user_rows(torch.tensor(GOLDEN["user_ids"]))
    return mol.query_side(5 * wave(20, 2, 6), user_rows_B), mol.item_side(5 * wave(21, 3, 6))


def close(actual: torch.Tensor, expected: list) -> None:
    expected_tensor = torch.tensor(expected, dtype=torch.float64).reshape(actual.shape)
    torch.testing.assert_close(actual, expected_tensor, rtol=0, atol=1e-9)


@torch.no_grad()
def test_golden_vector():
    mol = golden_mol()
    query, items = golden_sides(mol)
    pairs = mol.pairs(query, items)
    close(query.components_BQD, GOLDEN["f"])
    close(items.components_NXD, GOLDEN["g"])
    close(pairs.logits_BNP * mol.temperature, GOLDEN["dots"])
    close(pairs.gates_BNP, GOLDEN["pi"])
    close(pairs.scores_BN, GOLDEN["phi"])
    close(mol(query, items), GOLDEN["phi"])
    close(mutual_information_loss(pairs.gates_BNP.flatten(0, 1)), [GOLDEN["mi_loss_on_pi_eps1e-6"]])


@torch.no_grad()
def test_fact_2_the_gates_matter():
    mol = golden_mol()
    query, items = golden_sides(mol)
    mean_logits_BN = query.mean_BD @ items.mean_ND.T / mol.temperature
    expected = [[-1.7344882448, -3.5944901012, -4.0114407105], [-1.5112547848, -4.1860634809, -4.7030588935]]
    close(mean_logits_BN, expected)
    close(mol.pairs(query, items).logits_BNP.mean(dim=-1), expected)  # fact 6
    assert mean_logits_BN[1, 1] > mean_logits_BN[1, 2]
    assert mol(query, items)[1, 1] < mol(query, items)[1, 2]


def random_mol(activation: str = "swiglu", **changes) -> MixtureOfLogits:
    torch.manual_seed(0)
    settings = MolSettings(
        num_query_components=4, num_item_components=3, component_dim=8, query_hidden_dim=16, gate_hidden_dim=16,
        query_activation=activation, **changes,
    )  # fmt: skip
    mol = MixtureOfLogits(10, settings).double().eval()
    for parameter in mol.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mol.requires_grad_(False)


def random_sides(mol: MixtureOfLogits, num_queries: int = 5, num_items: int = 7) -> tuple[QuerySide, ItemSide]:
    generator = torch.Generator().manual_seed(1)
    queries_BE = torch.randn(num_queries, 10, generator=generator, dtype=torch.float64)
    items_NE = torch.randn(num_items, 10, generator=generator, dtype=torch.float64)
    return mol.query_side(queries_BE, torch.arange(num_queries)), mol.item_side(items_NE)


@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
def test_facts_4_and_7_a_score_is_a_convex_combination_of_logits(activation):
    mol = random_mol(activation)
    pairs = mol.pairs(*random_sides(mol))
    gates_BNP, logits_BNP, scores_BN = pairs.gates_BNP, pairs.logits_BNP, pairs.scores_BN
    torch.testing.assert_close(gates_BNP.sum(dim=-1), torch.ones_like(scores_BN))
    assert (gates_BNP >= 0).all()
    assert ((logits_BNP.amin(dim=-1) <= scores_BN) & (scores_BN <= logits_BNP.amax(dim=-1))).all()
    assert logits_BNP.abs().max() <= 1 / mol.temperature + 1e-9
    total_variation_BN = (gates_BNP - 1 / 12).abs().sum(dim=-1) / 2
    spread_BN = logits_BNP.amax(dim=-1) - logits_BNP.amin(dim=-1)
    assert ((scores_BN - logits_BNP.mean(dim=-1)).abs() <= total_variation_BN * spread_BN + 1e-9).all()


def test_fact_5_without_gate_networks_the_score_is_the_mean_logit():
    mol = random_mol()
    for network in (mol.query_gate, mol.item_gate, mol.cross_hidden, mol.cross_out):
        for parameter in network.parameters():
            torch.nn.init.zeros_(parameter)
    pairs = mol.pairs(*random_sides(mol))
    torch.testing.assert_close(pairs.gates_BNP, torch.full_like(pairs.gates_BNP, 1 / 12))
    torch.testing.assert_close(pairs.scores_BN, pairs.logits_BNP.mean(dim=-1))


def test_fact_9_shared_items_and_lists_of_candidates_give_the_same_scores():
    mol = random_mol()
    query, items = random_sides(mol)
    shared_BN = mol(query, items)
    rows_BM = torch.tensor([[6, 0, 3], [1, 1, 2], [4, 5, 6], [0, 1, 2], [3, 2, 1]])
    lists = items.take(rows_BM)
    torch.testing.assert_close(mol(query.alone(), lists).squeeze(1), shared_BN.gather(1, rows_BM))


def test_leading_dimensions_are_batches_of_independent_searches():
    mol = random_mol()
    first, second = random_sides(mol, 4, 6), random_sides(mol, 4, 6)
    second = (second[0].take(torch.tensor([3, 2, 1, 0])), second[1].take(torch.tensor([5, 1, 2, 3, 4, 0])))
    query = QuerySide(
        *(torch.stack(pair) for pair in zip(*(vars(s[0]).values() for s in (first, second)), strict=True))
    )
    items = ItemSide(*(torch.stack(pair) for pair in zip(*(vars(s[1]).values() for s in (first, second)), strict=True)))
    torch.testing.assert_close(mol(query, items), torch.stack([mol(*first), mol(*second)]))


def test_fact_15_user_rows_start_at_one_and_take_any_key():
    mol = random_mol(num_user_hashes=5)
    keys = torch.tensor([0, 4, 5, 13, -1, 2**62])
    assert mol.user_rows(keys).tolist() == [1, 5, 1, 4, 5, 2**62 % 5 + 1]


def test_a_model_with_a_user_table_asks_for_users():
    mol = random_mol(num_user_hashes=5)
    with pytest.raises(InputError, match="num_user_hashes"):
        mol.query_side(torch.zeros(2, 10, dtype=torch.float64))


@pytest.mark.parametrize(
    ("dim", "settings", "expected"),
    [
        (50, {"num_item_components": 4, "component_dim": 64, "num_user_hashes": 6040}, 711_328),
        (256, {"num_item_components": 4, "component_dim": 128, "num_user_hashes": 16384}, 3_034_016),
        (64, {"num_item_components": 8, "component_dim": 32, "query_activation": "geglu"}, 264_128),
    ],
    ids=["MovieLens-1M", "MovieLens-20M", "Amazon Books"],
)
def test_fact_16_parameters_of_the_published_configurations(dim, settings, expected):
    mol = MixtureOfLogits(dim, MolSettings(num_query_components=8, query_hidden_dim=512, **settings))
    assert sum(parameter.numel() for parameter in mol.parameters()) == expected


def test_fact_22_inhibition_saturates():
    """The softmax sees silu: never below -0.2785. It is read off as log(gate / first gate), where the first sees 0."""
    mol = random_mol()
    mol.cross_out.weight[0] = 0
    mol.cross_out.bias[0] = 0
    mol.query_gate[2].weight[0] = 0
    gates_BNP = mol.pairs(*random_sides(mol)).gates_BNP
    inputs_BNP = (gates_BNP / gates_BNP[..., :1]).log()
    assert inputs_BNP.min() >= -0.2784645428
    assert inputs_BNP.min() < -0.27  # the floor is reached


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 0.99])
def test_before_training_the_first_pair_has_its_share_of_the_gate(share):
    """Where nothing else goes into the gates."""
    for query, item in ((1, 1), (1, 2), (2, 2), (8, 4)):
        settings = MolSettings(num_query_components=query, num_item_components=item, first_pair_share=share)
        mol = MixtureOfLogits(64, settings).double().eval()
        expected = max(share, 1 / (query * item))
        mol.requires_grad_(False)
        mol.cross_out.weight.zero_()
        mol.query_gate[-1].weight.zero_()
        queries_BE, items_NE = (torch.randn(20, 64, dtype=torch.float64) for _ in range(2))
        gates_BNP = mol.pairs(mol.query_side(queries_BE), mol.item_side(items_NE)).gates_BNP
        assert torch.allclose(gates_BNP[..., 0], torch.tensor(expected, dtype=torch.float64))


def test_fact_23_two_component_pairs_can_make_any_score():
    """With components ±e and the first gate at (1 + temperature·A) / 2, the score is A."""
    mol = MixtureOfLogits(3, MolSettings(num_query_components=2, num_item_components=1, component_dim=4)).double()
    e_D = torch.nn.functional.normalize(torch.arange(1.0, 5.0, dtype=torch.float64), dim=0)
    for target in (-19.0, -3.5, 0.0, 12.25):
        first = (1 + mol.temperature * target) / 2
        difference = math.log(first / (1 - first))  # of the two softmax inputs
        high = torch.tensor(abs(difference), dtype=torch.float64)
        wanted = _inverse_silu(high)
        bias_P = torch.stack([wanted, torch.zeros_like(wanted)])
        bias_P = bias_P if difference > 0 else bias_P.flip(0)
        with torch.no_grad():
            for parameter in (mol.cross_out.weight, mol.cross_out.bias):
                parameter.zero_()
            mol.cross_out.bias.copy_(bias_P)
        query = QuerySide(torch.stack([e_D, -e_D]).unsqueeze(0), torch.zeros(1, 2, dtype=torch.float64))
        items = ItemSide(e_D.view(1, 1, 4), torch.zeros(1, 2, dtype=torch.float64))
        assert mol.eval()(query, items).item() == pytest.approx(target, abs=1e-9)


def _inverse_silu(value: torch.Tensor) -> torch.Tensor:
    low, high = torch.zeros_like(value), value + 2
    for _ in range(100):
        middle = (low + high) / 2
        below = torch.nn.functional.silu(middle) < value
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


def test_fact_24_scores_do_not_depend_on_who_else_is_scored():
    mol = random_mol()
    query, items = random_sides(mol)
    whole_BN = mol(query, items)
    order = torch.tensor([4, 2, 6, 0, 1, 3, 5])
    torch.testing.assert_close(mol(query, items.take(order)), whole_BN[:, order])
    for row in range(5):
        torch.testing.assert_close(mol(query.take(slice(row, row + 1)), items), whole_BN[row : row + 1])


def test_a_side_in_parts_put_together_again_is_the_side():
    for side in random_sides(random_mol()):
        again = type(side).cat([side.take(slice(0, 2)), side.take(slice(2, 2)), side.take(slice(2, None))])
        assert all(
            torch.equal(left, right) for left, right in zip(vars(again).values(), vars(side).values(), strict=True)
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.6)])
def test_lower_precision_stays_near_float64(dtype, tolerance):
    mol = random_mol()
    query, items = random_sides(mol)
    expected_BN = mol(query, items)
    lower = mol.to(dtype)
    scores_BN = lower(query.to(dtype), items.to(dtype))
    assert scores_BN.dtype == dtype
    assert (scores_BN.double() - expected_BN).abs().max() < tolerance


def test_empty_sides_give_empty_scores():
    mol = random_mol()
    query, items = random_sides(mol)
    assert mol(query.take(slice(0, 0)), items).shape == (0, 7)
    assert mol(query, items.take(slice(0, 0))).shape == (5, 0)


def test_in_training_dropped_gates_are_zero_and_the_rest_sum_to_one():
    mol = random_mol(gate_dropout=0.5).train()
    for parameter in mol.parameters():
        parameter.mul_(0.3)  # no gate so large that, with it dropped, the rest is below the clamp of 1e-6
    query, items = random_sides(mol, 20, 30)
    torch.manual_seed(3)
    pairs = mol.pairs(query, items)
    dropped = (pairs.gates_BNP == 0).double().mean().item()
    assert dropped == pytest.approx(0.5, abs=0.03)
    torch.testing.assert_close(pairs.gates_BNP.sum(dim=-1), torch.ones_like(pairs.scores_BN))
    torch.manual_seed(3)
    torch.testing.assert_close(mol(query, items), pairs.scores_BN)
    kept = mol.eval().pairs(query, items).gates_BNP * (pairs.gates_BNP > 0)
    torch.testing.assert_close(pairs.gates_BNP, kept / kept.sum(dim=-1, keepdim=True))


def test_in_training_components_read_dropped_inputs_and_gates_read_whole_ones():
    mol = random_mol(query_dropout=0.5, item_dropout=0.5, user_dropout=0.5, num_user_hashes=5)
    whole_query, whole_items = random_sides(mol)
    torch.manual_seed(3)
    query, items = random_sides(mol.train())
    assert torch.equal(query.gate_BP, whole_query.gate_BP)
    assert torch.equal(items.gate_NP, whole_items.gate_NP)
    assert not torch.allclose(items.components_NXD, whole_items.components_NXD)
    for component in range(4):  # the last one is the user's
        assert not torch.allclose(query.components_BQD[:, component], whole_query.components_BQD[:, component])


def test_in_training_dropped_logits_change_the_gates_but_not_the_logits_that_they_weigh():
    mol = random_mol(cross_dropout=0.5, gate_dropout=0.0, item_dropout=0.0)
    whole = mol.pairs(*random_sides(mol))
    torch.manual_seed(3)
    pairs = mol.train().pairs(*random_sides(mol))
    assert torch.equal(pairs.logits_BNP, whole.logits_BNP)
    assert not torch.allclose(pairs.gates_BNP, whole.gates_BNP)


def test_gradients_are_those_of_the_definition():
    mol = random_mol().requires_grad_(True)
    query, items = random_sides(mol, 2, 3)
    inputs = [tensor.detach().requires_grad_() for side in (query, items) for tensor in vars(side).values()]

    def scores(components_BQD, query_gate_BP, components_NXD, item_gate_NP):
        return mol(QuerySide(components_BQD, query_gate_BP), ItemSide(components_NXD, item_gate_NP))

    assert torch.autograd.gradcheck(scores, inputs)


def test_vectors_become_unit_vectors_with_the_gradients_of_normalize():
    torch.manual_seed(0)
    vectors = torch.randn(3, 5, 4, dtype=torch.float64)
    vectors[0, 0] = 0.0  # too short to have a direction
    vectors[0, 1] *= 1e-8
    weights = torch.randn_like(vectors)
    found, expected = vectors.clone().requires_grad_(), vectors.clone().requires_grad_()
    units = mol_module._unit(found)
    (units * weights).sum().backward()
    (F.normalize(expected, dim=-1, eps=mol_module.MIN_NORM) * weights).sum().backward()
    assert torch.equal(units, F.normalize(vectors, dim=-1, eps=mol_module.MIN_NORM))
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-12, atol=1e-12)
