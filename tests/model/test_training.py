import copy
from dataclasses import dataclass, field, replace

import pytest
import torch

from pipeline.data.batches import Windows, epoch_batches
from pipeline.errors import InputError
from pipeline.model import step, training
from pipeline.model.inputs import Events
from pipeline.model.losses import mutual_information_loss, sampled_softmax_loss, user_norm_loss
from pipeline.model.negatives import Negatives
from pipeline.model.step import accumulate_gradients
from pipeline.model.training import (
    EpochReport,
    Ranks,
    TrainingState,
    average_gradients,
    fit,
    popular_hit_rate,
    train_steps,
)
from pipeline.settings import TrainSettings
from tests.model.planted import NUM_ITEMS, SMALL_MODEL, SMALL_MOL, start, training_data

SETTINGS = TrainSettings(
    max_epochs=3, batch_size=32, num_negatives=16, positions_per_negatives=64, learning_rate=5e-3, patience=3
)
# Without dropout a step is a plain function of the batch and the negatives.
SURE_MOL = SMALL_MOL.model_copy(
    update={"num_user_hashes": 50, "gate_dropout": 0.0, "item_dropout": 0.0, "user_dropout": 0.0}
)
SURE_MODEL = SMALL_MODEL.model_copy(update={"dropout": 0.0, "mol": SURE_MOL})


def no_report(state: TrainingState) -> None:
    pass


def weights(state: TrainingState) -> list[torch.Tensor]:
    return [value.clone() for value in state.model.state_dict().values()]


def test_training_learns_the_planted_pattern():
    data = training_data(SETTINGS)
    state = start(SETTINGS)
    fit(state, data, SETTINGS, Ranks(), no_report)
    losses = [report.loss for report in state.history]
    assert losses == sorted(losses, reverse=True)
    assert state.best.hit_rate > 1.5 * popular_hit_rate(data, Ranks(), torch.device("cpu"))
    assert state.history[0].num_positions == data.windows.num_targets


def test_processes_with_the_same_data_draw_different_negatives():
    """A single window leaves no order that could differ between them."""
    settings = SETTINGS.model_copy(update={"max_epochs": 1})
    data = training_data(settings, num_users=1)
    first = data.windows
    windows = Windows(first.events.narrow(0, 1), first.user_keys[:1], first.users[:1], first.own)
    losses = []
    for rank in (0, 1, 0):
        state = start(settings, SURE_MODEL)
        fit(state, replace(data, windows=windows, steps=1), settings, Ranks(rank), no_report)
        losses.append(state.history[0].loss)
    assert losses[0] == losses[2] != losses[1]


def test_bfloat16_learns_it_too():
    settings = SETTINGS.model_copy(update={"precision": "bfloat16", "max_epochs": 2})
    state = start(settings)
    fit(state, training_data(settings), settings, Ranks(), no_report)
    assert state.history[1].loss < 0.8 * state.history[0].loss
    assert all(value.dtype == torch.float32 for value in state.model.parameters())


def test_the_same_seed_gives_the_same_weights():
    settings = SETTINGS.model_copy(update={"max_epochs": 1})
    data = training_data(settings, num_users=60)
    states = [start(settings), start(settings), start(settings.model_copy(update={"seed": 1}))]
    for state in states[:2]:
        fit(state, data, settings, Ranks(), no_report)
    fit(states[2], data, settings.model_copy(update={"seed": 1}), Ranks(), no_report)
    for left, right in zip(weights(states[0]), weights(states[1]), strict=True):
        assert torch.equal(left, right)
    assert not torch.equal(weights(states[0])[0], weights(states[2])[0])


def slow_loss(model, batch, settings, negatives_GN, item_counts_V) -> torch.Tensor:
    """The definition, position by position: mean over targets of the sampled softmax, plus the regularisers."""
    losses, gates, users = [], [], []
    order = torch.randperm(int((batch.targets_BL >= 0).sum()))
    queries_BLE = model.encode_positions(Events(torch.from_numpy(batch.item_rows_BL)))
    places = torch.from_numpy(batch.targets_BL >= 0).nonzero()[order]
    size = -(-len(places) // len(negatives_GN))
    for index, (row, column) in enumerate(places.tolist()):
        user = model.user_rows(torch.tensor([batch.user_keys_B[row]]))
        query = model.mol.query_side(queries_BLE[row, column].unsqueeze(0), user)
        target = torch.tensor([batch.targets_BL[row, column]], dtype=torch.int64)
        positive = model.mol.pairs(query, model.item_side(target))
        negatives_N = negatives_GN[index // size]
        scores = model.mol.pairs(query, model.item_side(negatives_N)).scores_BN
        is_own = torch.isin(negatives_N, torch.from_numpy(batch.own[row]).long())
        # the chance of an item: 13 of 16 negatives by popularity, 3 uniformly
        chance_N = 13 / 16 * item_counts_V[negatives_N].double() / item_counts_V.sum() + 3 / 16 / NUM_ITEMS
        corrected = scores - (settings.num_negatives * chance_N).log()
        losses.append(sampled_softmax_loss(positive.scores_BN[0], corrected, is_own.unsqueeze(0)))
        gates.append(positive.gates_BNP[0])
        users.append(model.mol.user_vectors(user))
    regulariser = settings.mutual_information_weight * mutual_information_loss(torch.cat(gates))
    regulariser = regulariser + settings.user_norm_weight * user_norm_loss(torch.cat(users))
    return torch.cat(losses).sum() + len(losses) * regulariser


@pytest.mark.parametrize("positions_per_negatives", [1, 5, 1000])
@pytest.mark.parametrize("tile_pairs", [1, 40, 100_000])
def test_a_step_in_tiles_has_the_gradients_of_the_definition(monkeypatch, positions_per_negatives, tile_pairs):
    monkeypatch.setitem(step.TILE_PAIRS, "cpu", tile_pairs)
    settings = SETTINGS.model_copy(
        update={"positions_per_negatives": positions_per_negatives, "mutual_information_weight": 0.5}
    )
    data = training_data(settings, num_users=4)
    batch = next(epoch_batches(data.windows, 2, seed=0, epoch=1, rank=0))
    model = start(settings, SURE_MODEL).model.double().train()
    expected = copy.deepcopy(model)
    num_targets = int((batch.targets_BL >= 0).sum())
    torch.manual_seed(9)
    sampler = Negatives.of(data.item_counts_N, settings)
    found, count = accumulate_gradients(model, batch, sampler, settings)
    assert count == num_targets
    torch.manual_seed(9)
    # The step draws its order first, then its negatives.
    state = torch.get_rng_state()
    torch.randperm(num_targets)
    negatives_GN = sampler.draw(-(-num_targets // positions_per_negatives))
    torch.set_rng_state(state)
    slow_loss(expected, batch, settings, negatives_GN, data.item_counts_N).backward()
    for (name, left), right in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, msg=lambda text, name=name: f"{name}: {text}")
    assert torch.isfinite(found)


@pytest.mark.parametrize("tile_pairs", [1, 100, 1_000, 100_000])
def test_the_softmax_is_taken_in_float32_over_tiles_of_bounded_size(monkeypatch, tile_pairs):
    dtypes: set[torch.dtype] = set()
    sizes: list[int] = []

    def spy(positive_GS, scores_GSN, is_own_GSN):
        dtypes.update([positive_GS.dtype, scores_GSN.dtype])
        sizes.append(scores_GSN.numel())
        return sampled_softmax_loss(positive_GS, scores_GSN, is_own_GSN)

    monkeypatch.setitem(step.TILE_PAIRS, "cpu", tile_pairs)
    monkeypatch.setattr(step, "sampled_softmax_loss", spy)
    settings = SETTINGS.model_copy(update={"precision": "bfloat16"})
    data = training_data(settings)
    batch = next(epoch_batches(data.windows, 5, seed=0, epoch=1, rank=0))
    accumulate_gradients(start(settings).model.train(), batch, Negatives.of(data.item_counts_N, settings), settings)
    assert dtypes == {torch.float32}
    assert max(sizes) <= max(tile_pairs, settings.num_negatives)


def test_the_loss_of_some_steps_is_the_sum_over_their_targets():
    settings = SETTINGS.model_copy(update={"learning_rate": 1e-30})
    data = training_data(settings, num_users=40)
    state = start(settings)
    batches = list(epoch_batches(data.windows, data.steps, seed=0, epoch=1, rank=0))
    torch.manual_seed(9)
    sampler = Negatives.of(data.item_counts_N, settings)
    loss_sum, num_targets = train_steps(state, batches, sampler, settings, Ranks())
    torch.manual_seed(9)
    sums, counts = zip(*(accumulate_gradients(state.model, batch, sampler, settings) for batch in batches), strict=True)
    assert num_targets == sum(counts) == data.windows.num_targets
    assert loss_sum == pytest.approx(sum(sums).item())


def test_weights_without_a_gradient_decay_by_learning_rate_times_weight_decay():
    settings = SETTINGS.model_copy(update={"learning_rate": 0.1, "weight_decay": 0.5})
    state = start(settings)
    before = [parameter.detach().clone() for parameter in state.model.parameters()]
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimiser.step()
    for parameter, value in zip(state.model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), 0.95 * value)


class Twins(Ranks):
    """Two processes with the same data and the same random numbers."""

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        return values.mul_(2)


def test_two_processes_with_the_same_data_report_what_one_does_on_twice_as_many_targets_and_users():
    settings = SETTINGS.model_copy(update={"max_epochs": 2})
    data = training_data(settings, num_users=60)
    reports = []
    for ranks in (Ranks(), Twins(world_size=2)):
        state = start(settings)
        fit(state, data, settings, ranks, no_report)
        reports.append(state.history)
    for alone, both in zip(*reports, strict=True):
        assert both.loss == pytest.approx(alone.loss, rel=1e-4)
        assert both.hit_rate == pytest.approx(alone.hit_rate)
        assert (both.num_positions, both.num_validation_users) == (
            2 * alone.num_positions,
            2 * alone.num_validation_users,
        )
    rates = [popular_hit_rate(data, ranks, torch.device("cpu")) for ranks in (Ranks(), Twins(world_size=2))]
    assert rates[0] == rates[1] > 0


@pytest.mark.parametrize("ranks", [Ranks(), Twins(world_size=2)], ids=["alone", "two"])
@pytest.mark.parametrize("steps_between_states", [1_000, 2])
def test_a_run_that_stopped_at_any_state_goes_on_as_if_it_had_not(steps_between_states, ranks):
    """With 2 steps between states, each epoch of 5 steps pauses twice."""
    settings = SETTINGS.model_copy(update={"max_epochs": 2, "steps_between_states": steps_between_states})
    data = replace(training_data(settings, num_users=60), steps=5)
    whole = start(settings)
    saved: list[TrainingState] = []
    fit(whole, data, settings, ranks, lambda state: saved.append(copy.deepcopy(state)))
    within_epoch = [state.progress.num_steps for state in saved]
    assert within_epoch == ([0, 0] if steps_between_states > 5 else [2, 4, 0] * 2)
    assert [state.number for state in saved] == list(range(1, len(saved) + 1))
    for state in saved:
        torch.manual_seed(12345)  # whatever happened in between
        fit(state, data, settings, ranks, no_report)
        for left, right in zip(weights(whole), weights(state), strict=True):
            assert torch.equal(left, right)
        assert [report.loss for report in whole.history] == [report.loss for report in state.history]


def report(epoch: int, hit_rate: float, users: int = 10, loss: float = 1.0) -> EpochReport:
    return EpochReport(epoch, loss, hit_rate, users, 100, 1.0, 1.0)


def test_training_stops_after_patience_epochs_without_a_better_one():
    state = TrainingState(None, None)
    settings = TrainSettings(max_epochs=10, patience=2)
    for epoch, (hit_rate, finished) in enumerate([(0.1, False), (0.3, False), (0.3, False), (0.2, True)], start=1):
        state.history.append(report(epoch, hit_rate))
        assert state.is_finished(settings) == finished
    assert state.best.epoch == 2


def test_without_validation_users_the_loss_decides():
    state = TrainingState(None, None, [report(1, 0.0, 0, 2.0), report(2, 0.0, 0, 1.0), report(3, 0.0, 0, 1.5)])
    assert state.best.epoch == 2


def test_the_weights_of_the_best_epoch_are_kept(monkeypatch):
    hits = iter([3, 5, 1])
    monkeypatch.setattr(training, "count_model_hits", lambda model, users, k: next(hits))
    kept: list[list[torch.Tensor]] = []
    state = start(SETTINGS)
    fit(state, training_data(SETTINGS, num_users=60), SETTINGS, Ranks(), lambda s: kept.append(weights(s)))
    assert state.best.epoch == 2
    for best, second, last in zip(state.best_weights.values(), kept[1], kept[2], strict=True):
        assert torch.equal(best, second)
        assert last.shape == best.shape
    assert not torch.equal(next(iter(state.best_weights.values())), kept[2][0])


def test_divergence_is_said_so():
    state = start(SETTINGS)
    with torch.no_grad():
        state.model.mol.cross_out.bias.fill_(float("nan"))
    with pytest.raises(InputError, match=r"train\.learning_rate"):
        fit(state, training_data(SETTINGS, num_users=60), SETTINGS, Ranks(), no_report)


@dataclass(frozen=True)
class WithAnother(Ranks):
    """Two processes, of which the other one sends fixed values."""

    world_size: int = 2
    sent: torch.Tensor = field(default_factory=torch.Tensor)

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        return values.add_(self.sent)


def test_gradients_of_all_ranks_weigh_every_target_alike():
    """Two ranks with 30 and 10 targets: the average is that of one process with all 40."""
    alone, first, second = (start(SETTINGS, SURE_MODEL).model for _ in range(3))
    for model, value in ((first, 2.0), (second, 8.0)):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
    for parameter in alone.parameters():
        parameter.grad = torch.full_like(parameter, 10.0)
    sent = torch.cat([*(parameter.grad.flatten() for parameter in second.parameters()), torch.tensor([10.0])])
    average_gradients(alone, 40, Ranks())
    average_gradients(first, 30, WithAnother(sent=sent))
    for left, right in zip(first.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad)
