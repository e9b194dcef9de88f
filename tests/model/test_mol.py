"""MoL against the golden vector and the laws that its definition implies (facts of mol.md section 8 by number)."""

import json
import math
from pathlib import Path

import torch

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
