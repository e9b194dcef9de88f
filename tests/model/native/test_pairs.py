"""The native pair network against the tiles of PyTorch, for every instruction set that this CPU can run.

The library for AVX2 multiplies float32 numbers, so it is held to float32's errors; the formulas are the same in all.
"""

import math
import shutil
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.model import mol as mol_module
from pipeline.model import step
from pipeline.model.mol import MixtureOfLogits
from pipeline.model.native.pairs import gate_masks, step_sizes, train_pairs
from pipeline.model.step import Drawn, Positions
from pipeline.native.loader import CPU_FLAGS, cpu_flags, find_library, load_library
from pipeline.settings import MolSettings, TrainSettings
from tests.retrieval.backends.native_libraries import emulated_library

BUILT = [name for name, needed in CPU_FLAGS.items() if needed <= cpu_flags() and find_library(name).functions]
pytestmark = pytest.mark.skipif(not BUILT, reason="no native library for this CPU")
NAMES = ("query components", "query gate", "positive", "item components", "item gate")
PARAMETERS = ("cross_hidden.weight", "cross_hidden.bias", "cross_out.weight", "cross_out.bias")
BFLOAT16 = 2.0**-9  # largest relative error of rounding
SEED = 7


@dataclass(frozen=True)
class Case:
    """A step's inputs: T = G · S positions, N negatives."""

    mol: MixtureOfLogits
    per_position: list[Tensor]
    per_group: list[Tensor]
    corrections_GN: Tensor
    is_left_out_TN: Tensor
    weights_T: Tensor


def make_case(
    seed: int,
    sizes: tuple[int, int, int, int] = (8, 4, 64, 128),
    num_groups: int = 1,
    group_size: int = 8,
    num_negatives: int = 128,
    temperature: float = 0.05,
    gate_dropout: float = 0.0,
    gate_scale: float = 1.0,
) -> Case:
    """Random inputs for (Q, X, D, H); `gate_scale` spreads the gates."""
    torch.manual_seed(seed)
    q, x, d, h = sizes
    settings = MolSettings(
        num_query_components=q,
        num_item_components=x,
        component_dim=d,
        gate_hidden_dim=h,
        query_hidden_dim=2,
        temperature=temperature,
        gate_dropout=gate_dropout,
    )
    mol = MixtureOfLogits(3, settings).train()
    for bias in (mol.cross_hidden.bias, mol.cross_out.bias):
        nn.init.normal_(bias)
    t = num_groups * group_size
    unit = nn.functional.normalize
    per_position = [
        unit(torch.randn(t, q, d), dim=-1),
        gate_scale * torch.randn(t, q * x),
        torch.randn(t) / temperature,
    ]
    per_group = [
        unit(torch.randn(num_groups, num_negatives, x, d), dim=-1),
        torch.randn(num_groups, num_negatives, q * x),
    ]
    is_left_out_TN = torch.rand(t, num_negatives) < 0.1
    corrections_GN = torch.randn(num_groups, num_negatives, dtype=torch.float64)
    weights_T = torch.rand(t) * 2
    weights_T[t - (t > 1) :] = 0.0  # a copy at the end
    return Case(mol, per_position, per_group, corrections_GN, is_left_out_TN, weights_T)


@cache
def library_for(name: str) -> Any:
    return find_library(name).functions


def native(name: str, case: Case) -> dict[str, Tensor]:
    """Loss and gradients of the kernels, gates dropped as SEED says."""
    case.mol.zero_grad(set_to_none=True)
    torch.manual_seed(SEED)
    loss, gradients = train_pairs(library_for(name), *vars(case).values())
    return {"loss": loss, **dict(zip(NAMES, gradients, strict=True)), **parameter_gradients(case.mol)}


def parameter_gradients(mol: MixtureOfLogits) -> dict[str, Tensor]:
    gradients = {name: parameter.grad for name, parameter in mol.named_parameters() if name in PARAMETERS}
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def masks_of(case: Case) -> Tensor:
    torch.manual_seed(SEED)
    num_groups, num_negatives = case.corrections_GN.shape
    group_size = len(case.weights_T) // num_groups
    return gate_masks(library_for(BUILT[0]), step_sizes(case.mol, num_groups, group_size, num_negatives))


def by_torch(case: Case, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Loss and gradients of PyTorch's tiles, with the kernels' masks."""
    masks = masks_of(case)
    monkeypatch.setattr(mol_module, "keep_mask", lambda values, rate: masks.view(values.shape).to(values.dtype))
    monkeypatch.setitem(step.TILE_PAIRS, "cpu", 1 << 40)
    mol = MixtureOfLogits(3, case.mol.settings).train().to(dtype)
    mol.load_state_dict(case.mol.state_dict())
    num_groups, num_positions = len(case.corrections_GN), len(case.weights_T)
    unused = torch.empty(0, dtype=torch.int64)
    positions = Positions(unused, unused, unused, case.weights_T, unused, unused, num_positions, num_groups)
    drawn = Drawn(case.corrections_GN.long(), case.corrections_GN, case.is_left_out_TN)
    sides = ([tensor.to(dtype) for tensor in part] for part in (case.per_position, case.per_group))
    loss, gradients = step._in_tiles(mol, positions, *sides, drawn, TrainSettings())
    return {"loss": loss, **dict(zip(NAMES, gradients, strict=True)), **parameter_gradients(mol)}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], error: float, floor: float = 1e-6) -> None:
    """As vectors, whose difference may be `error` of their length, and `floor` where all numbers are nearly zero."""
    for name, right in expected.items():
        left = found[name].double()
        assert left.shape == right.shape, name
        off = float((left - right).norm())
        assert off <= error * float(right.norm()) + floor, f"{name}: {off} of {float(right.norm())}"


def largest_error(name: str, temperature: float) -> float:
    """A bound on the relative error of a gradient.

    Float32: sums of some thousand numbers. bfloat16: a logit of unit vectors moves by up to 2 · 2^-9 / temperature
    (Cauchy-Schwarz), which a share of the softmax multiplies by its exponential; five more numbers are rounded on the
    way back: logits, hidden units, and the gradients of gates, hidden units and logits.
    """
    if name == "avx2":
        return 2e-5 / min(temperature, 1.0)
    return math.expm1(2 * BFLOAT16 / temperature) + 5 * 2 * BFLOAT16


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("seed", range(24))
def test_loss_and_gradients_are_those_of_pytorch_for_any_shape(name, seed, monkeypatch):
    rng = np.random.default_rng(seed)
    q, x = rng.integers(1, 10, 2)
    temperature = float(rng.choice([0.05, 0.2, 1.0]))
    case = make_case(
        seed,
        sizes=(int(q), int(x), int(rng.integers(1, 80)), int(rng.integers(1, 150))),
        num_groups=int(rng.integers(1, 4)),
        group_size=int(rng.choice([1, 2, 7, 33, 70])),
        num_negatives=int(rng.choice([1, 5, 31, 32, 97, 128, 200])),
        temperature=temperature,
        gate_dropout=float(rng.choice([0.0, 0.2, 0.7])),
        gate_scale=float(rng.choice([0.5, 3.0])),
    )
    assert_close(native(name, case), by_torch(case, monkeypatch), largest_error(name, temperature))


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("gate_dropout", [0.0, 0.2])
def test_the_usual_shape_is_within_a_hundredth_of_pytorch(name, gate_dropout, monkeypatch):
    """Roundings are independent, so that in sums most of them cancel."""
    case = make_case(0, num_groups=2, group_size=70, gate_dropout=gate_dropout)
    assert_close(native(name, case), by_torch(case, monkeypatch), 0.01 if name != "avx2" else 2e-6)
    assert_close(native(name, case), by_torch(case, monkeypatch, torch.float32), 0.01 if name != "avx2" else 1e-5)


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize(("temperature", "gate_scale"), [(0.01, 1.0), (0.05, 30.0), (1.0, 1e4)])
def test_extreme_logits_and_gates_give_what_they_give_in_pytorch(name, temperature, gate_scale, monkeypatch):
    """With gates this far apart, all that are kept after dropout may be nothing beside those that were dropped."""
    case = make_case(1, (3, 2, 8, 16), 2, 40, 30, temperature, gate_dropout=0.5, gate_scale=gate_scale)
    found, expected = native(name, case), by_torch(case, monkeypatch)
    assert all(bool(value.isfinite().all()) for value in found.values())
    if name == "avx2":
        assert_close(found, expected, 1e-3, floor=1e-6 / temperature)  # logit minus score, nearly equal
    else:
        assert abs(float(found["loss"] - expected["loss"])) < 0.02 * float(expected["loss"]) + 0.1


@pytest.mark.parametrize("name", BUILT)
def test_without_any_other_negative_there_is_no_loss_and_nothing_to_learn(name):
    case = make_case(2)
    found = native(name, replace(case, is_left_out_TN=torch.ones_like(case.is_left_out_TN)))
    assert all(not value.any() for value in found.values())


@pytest.mark.parametrize("name", BUILT)
def test_the_result_is_the_same_to_the_bit_on_any_number_of_threads(name):
    case = make_case(3, (3, 5, 7, 13), num_groups=3, group_size=130, num_negatives=40, gate_dropout=0.2)
    first = native(name, case)
    for threads in (1, 2, 3, 16, 2):
        torch.set_num_threads(threads)
        for key, value in native(name, case).items():
            assert torch.equal(value, first[key]), (threads, key)


@pytest.mark.skipif(not shutil.which("c++") or "avx512" not in BUILT, reason="no C++ compiler, or no CPU for AVX-512")
@pytest.mark.parametrize("sizes", [(3, 5, 7, 13), (8, 4, 64, 128), (8, 8, 48, 80), (4, 12, 16, 16)])
@pytest.mark.parametrize("num_negatives", [40, 128])
def test_products_in_tiles_are_those_in_vectors_but_for_roundings(sizes, num_negatives, tmp_path):
    """A model of the tiles is compiled in, which needs no AMX. The order of sums differs, so that now and then a number
    is rounded to the other of two neighbours."""
    case = make_case(3, sizes, group_size=10, num_negatives=num_negatives, gate_dropout=0.2)
    (tmp_path / "amx.so").write_bytes(emulated_library())
    amx = load_library(tmp_path / "amx.so")
    assert amx is not None
    expected = native("avx512", case)
    torch.manual_seed(SEED)
    loss, gradients = train_pairs(amx, *vars(case).values())
    found = {"loss": loss, **dict(zip(NAMES, gradients, strict=True))}
    assert_close(found, {name: expected[name] for name in found}, BFLOAT16 / 4)


@pytest.mark.parametrize("name", BUILT)
def test_one_nan_in_any_input_makes_the_loss_nan(name):
    case = make_case(4, (3, 2, 8, 16), 2, 5, 20, gate_dropout=0.2)
    case = replace(case, is_left_out_TN=torch.zeros_like(case.is_left_out_TN))
    inputs = [*case.per_position, *case.per_group, case.corrections_GN]
    for tensor in inputs + [case.mol.get_parameter(parameter).data for parameter in PARAMETERS]:
        numbers = tensor.view(-1)
        kept = numbers[0].clone()
        for fault in (math.nan, math.inf):
            numbers[0] = fault
            assert not native(name, case)["loss"].isfinite()
        numbers[0] = kept
    assert native(name, case)["loss"].isfinite()


@pytest.mark.parametrize("name", BUILT)
def test_gradients_are_added_to_those_that_the_parameters_have(name):
    case = make_case(5, (2, 2, 4, 8), group_size=3)
    once = native(name, case)
    train_pairs(library_for(name), *vars(case).values())
    for key, gradient in parameter_gradients(case.mol).items():
        torch.testing.assert_close(gradient, 2 * once[key])


def test_gates_are_dropped_at_random_with_the_rate_of_pytorchs_masks():
    case = make_case(6, (8, 4, 1, 1), num_groups=2, group_size=50, gate_dropout=0.2)
    masks = masks_of(case).double()
    mean = 1 - 51 / 256  # 0.2, rounded to 1/256
    error = math.sqrt(mean * (1 - mean))
    for dims in ((0, 1, 2), (0, 1), (0, 2), (1, 2)):  # as a whole; for each pair, negative and position
        kept = masks.mean(dim=dims)
        assert (kept - mean).abs().max() < 5 * error * math.sqrt(kept.numel() / masks.numel())
    for dim in range(3):  # neighbours, and pairs whose bytes are of one random number, are independent
        for distance in (1, 2, 3, 4, 8):
            product = ((masks - mean) * (masks.roll(distance, dim) - mean)).mean() / error**2
            assert abs(product) < 5 / math.sqrt(masks.numel())


def test_the_masks_depend_on_torchs_random_numbers_and_on_nothing_else():
    case = make_case(7, gate_dropout=0.2)
    assert torch.equal(masks_of(case), masks_of(case))
    sizes = [step_sizes(case.mol, 1, 8, 128) for _ in range(2)]
    assert not torch.equal(gate_masks(library_for(BUILT[0]), sizes[0]), gate_masks(library_for(BUILT[0]), sizes[1]))
    for name in BUILT:
        assert torch.equal(gate_masks(library_for(name), sizes[0]), gate_masks(library_for(BUILT[0]), sizes[0]))
    before = torch.get_rng_state()
    assert step_sizes(case.mol.eval(), 1, 8, 128).num_dropped == 0
    assert torch.equal(torch.get_rng_state(), before)
