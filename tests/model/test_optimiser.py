import pytest
import torch

from pipeline.model.optimiser import BETA1, BETA2, EPSILON, FADED_STEPS, RowAdam

NUM_ROWS, DIM, RATE = 12, 3, 0.01


def gradients(num_steps: int, share: float, seed: int = 0) -> list[torch.Tensor]:
    """Gradients of a table, in which a row has one with the chance `share`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn((num_steps, NUM_ROWS, DIM), generator=generator, dtype=torch.float64)
    return list(drawn * (torch.rand((num_steps, NUM_ROWS, 1), generator=generator) < share))


def table() -> torch.Tensor:
    return torch.linspace(-1, 1, NUM_ROWS * DIM, dtype=torch.float64).view(NUM_ROWS, DIM).clone()


def by_rows(steps: list[torch.Tensor], rates: list[float], decay: float = 0.0, settle_every: int = 0) -> torch.Tensor:
    weight = table().requires_grad_()
    optimiser = RowAdam(weight, decay)
    for index, (gradient, rate) in enumerate(zip(steps, rates, strict=True)):
        weight.grad = gradient.to_sparse(1).coalesce()
        optimiser.step(rate)
        is_another_rate = rate != rates[min(index + 1, len(rates) - 1)]
        if is_another_rate or (settle_every and index % settle_every == 0):
            optimiser.settle()
    optimiser.settle()
    return weight.detach()


def by_torch(steps: list[torch.Tensor], rates: list[float], decay: float = 0.0) -> torch.Tensor:
    weight = table().requires_grad_()
    optimiser = torch.optim.AdamW([weight], RATE, (BETA1, BETA2), EPSILON, decay)
    for gradient, rate in zip(steps, rates, strict=True):
        weight.grad = gradient.clone()
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
    return weight.detach()


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_a_table_whose_rows_all_have_gradients_moves_as_by_adamw(decay):
    steps = gradients(40, 1.0)
    rates = [RATE * (1 + index % 3) for index in range(40)]
    torch.testing.assert_close(by_rows(steps, rates, decay), by_torch(steps, rates, decay))


@pytest.mark.parametrize("share", [0.02, 0.2, 0.7])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_rows_that_miss_steps_end_where_adamw_moves_them(share, decay):
    """At a constant rate, after the first steps, in which the bias corrections change from step to step."""
    steps = gradients(900, share)
    rates = [0.0] * 500 + [RATE] * 400
    found, expected = by_rows(steps, rates, decay), by_torch(steps, rates, decay)
    assert (expected - table()).abs().min() > 1e-3, "all rows have moved"
    torch.testing.assert_close(found, expected, rtol=0.0, atol=2e-3 * float((expected - table()).abs().max()))


@pytest.mark.parametrize("decay", [100.0, 200.0])
def test_a_decay_that_leaves_nothing_of_a_weight_is_as_of_adamw(decay):
    """One step keeps none of a weight, or its opposite: too much, but nothing divides by it."""
    steps = gradients(600, 0.3)
    rates = [0.0] * 500 + [RATE] * 100
    found, expected = by_rows(steps, rates, decay), by_torch(steps, rates, decay)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=5e-3)


def test_a_row_whose_momentum_has_faded_is_left_alone():
    """And only then: before, settling moves it."""
    weight = table().requires_grad_()
    optimiser = RowAdam(weight, weight_decay=0.0)
    late_step = 2 * FADED_STEPS

    def step(row: int) -> None:
        gradient = torch.zeros(NUM_ROWS, DIM, dtype=torch.float64)
        gradient[row] = 1.0
        weight.grad = gradient.to_sparse(1).coalesce()
        optimiser.step(RATE)

    step(3)
    for number in range(late_step):
        step(7)
        if number in (1, late_step // 2, late_step - 1):
            before = weight.detach().clone()
            optimiser.settle()
            moved = (weight.detach() != before).any(dim=1).nonzero()[:, 0].tolist()
            assert moved == ([3] if number < late_step - 1 else [])
    assert (optimiser.state["settled_at"] == 0).sum() == NUM_ROWS - 2, "rows without a gradient are never read"


def test_it_does_not_matter_when_the_table_is_settled():
    steps, rates = gradients(600, 0.2), [0.0] * 500 + [RATE] * 100
    once = by_rows(steps, rates)
    for settle_every in (1, 7):
        torch.testing.assert_close(by_rows(steps, rates, settle_every=settle_every), once, rtol=0.0, atol=1e-5)


def test_a_step_touches_its_rows_only():
    weight = table().requires_grad_()
    optimiser = RowAdam(weight, weight_decay=0.1)
    for rows in ([2, 5], [5]):
        before = weight.detach().clone()
        gradient = torch.zeros(NUM_ROWS, DIM, dtype=torch.float64)
        gradient[rows] = 1.0
        weight.grad = gradient.to_sparse(1).coalesce()
        optimiser.step(RATE)
        assert (weight.detach() != before).any(dim=1).nonzero()[:, 0].tolist() == rows
    optimiser.settle()
    assert (weight.detach() != table()).all()  # the decay of all
