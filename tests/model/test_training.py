import copy
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from pipeline.data.batches import ValidationUsers, epoch_batches
from pipeline.errors import InputError
from pipeline.model import step, training
from pipeline.model.gradients import average_gradients, clip_gradients
from pipeline.model.inputs import Events
from pipeline.model.losses import mutual_information_loss, sampled_softmax_loss, user_norm_loss
from pipeline.model.model import RetrievalModel
from pipeline.model.negatives import Negatives
from pipeline.model.ranks import Ranks
from pipeline.model.rounds import RoundProgress, best_round, ended_by
from pipeline.model.step import accumulate_gradients
from pipeline.model.training import (
    TrainingState,
    average_weights,
    fit,
    popular_hit_rate,
    round_end,
)
from pipeline.model.validation import RankingSums
from pipeline.settings import TrainSettings
from tests.model.planted import NUM_ITEMS, SMALL_MODEL, SMALL_MOL, report, start, training_data

SETTINGS = TrainSettings(
    max_epochs=3,
    batch_positions=240,
    num_negatives=16,
    positions_per_negatives=64,
    learning_rate=5e-3,
    warmup_steps=5,
    patience=3,
)
# Without dropout a step is a plain function of the batch and the negatives.
SURE_MOL = SMALL_MOL.model_copy(
    update={"num_user_hashes": 50, "gate_dropout": 0.0, "item_dropout": 0.0, "user_dropout": 0.0}
)
SURE_MODEL = SMALL_MODEL.model_copy(update={"dropout": 0.0, "mol": SURE_MOL})


def no_report(state: TrainingState) -> None:
    pass


def dense(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def sparse(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient of a table, with the rows that are not zero."""
    return gradient.to_sparse(1).coalesce()


def weights(state: TrainingState) -> list[torch.Tensor]:
    return [value.clone() for value in state.model.state_dict().values()]


def test_training_learns_the_planted_pattern():
    data = training_data(SETTINGS)
    state = start(SETTINGS)
    fit(state, data, SETTINGS, Ranks(), no_report)
    losses = [report.loss for report in state.history]
    assert losses == sorted(losses, reverse=True)
    assert best_round(state.history).hit_rate > 1.5 * popular_hit_rate(data, Ranks(), torch.device("cpu"))
    assert state.history[0].num_positions == data.windows.num_targets


def test_processes_with_the_same_data_draw_different_negatives():
    """A single window leaves no order that could differ between them."""
    settings = SETTINGS.model_copy(update={"max_epochs": 1})
    data = training_data(settings, num_users=1)
    first = data.windows
    windows = first.take(np.arange(1))
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


def slow_loss(model, batch, settings, order, negatives_GN, expected_GN) -> torch.Tensor:
    """The definition, position by position: the sampled softmax and the head's, which knows all items, by the targets'
    weights, plus the regularisers. `expected_GN` is how often each negative is expected to be drawn."""
    losses, gates, users, weights = [], [], [], []
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
        corrected = scores - expected_GN[index // size].log()
        all_rows = torch.arange(NUM_ITEMS)
        head = model.item_side(all_rows).components_NXD[:, 0] @ query.components_BQD[0, 0] / model.mol.temperature
        is_own_of_all = torch.isin(all_rows, torch.from_numpy(batch.own[row]).long())
        head_loss = sampled_softmax_loss(head[target], head.unsqueeze(0), is_own_of_all.unsqueeze(0))
        loss = sampled_softmax_loss(positive.scores_BN[0], corrected, is_own.unsqueeze(0))
        weights.append(float(batch.weights_BL[row, column]))
        losses.append(weights[-1] * (loss + settings.head_weight * head_loss))
        gates.append(positive.gates_BNP[0])
        users.append(model.mol.user_vectors(user))
    regulariser = settings.mutual_information_weight * mutual_information_loss(torch.cat(gates))
    regulariser = regulariser + settings.user_norm_weight * user_norm_loss(torch.cat(users))
    return torch.cat(losses).sum() + sum(weights) * regulariser


@pytest.mark.parametrize("positions_per_negatives", [1, 5, 1000])
@pytest.mark.parametrize(("tile_pairs", "hard"), [(1, 0.0), (40, 0.5), (100_000, 0.0), (100_000, 0.5)])
def test_a_step_in_tiles_has_the_gradients_of_the_definition(monkeypatch, positions_per_negatives, tile_pairs, hard):
    monkeypatch.setitem(step.TILE_PAIRS, "cpu", tile_pairs)
    settings = SETTINGS.model_copy(
        update={
            "positions_per_negatives": positions_per_negatives,
            "mutual_information_weight": 0.5,
            "hard_negatives": hard,
        }
    )
    data = training_data(settings, num_users=4)
    weights = np.random.default_rng(3).choice([0.0, 0.5, 2.0], len(data.windows.weights)).astype(np.float32)
    windows = replace(data.windows, weights=weights)
    batch = next(epoch_batches(windows, 2, seed=0, epoch=1, rank=0))
    model = start(settings, SURE_MODEL).model.double().train()
    expected = copy.deepcopy(model)
    num_targets = int((batch.targets_BL >= 0).sum())
    seen = []

    def draw(self, num_groups, demand=None):
        seen.append((Negatives.draw(self, num_groups, demand), demand))
        return seen[-1][0]

    sampler = type("Spied", (Negatives,), {"draw": draw})(**vars(Negatives.of(data.item_counts_N, settings)))
    torch.manual_seed(9)
    found = accumulate_gradients(model, batch, sampler, settings)
    assert found.num_targets == num_targets
    assert found.weight == batch.weights_BL.sum()
    torch.manual_seed(9)
    order = torch.arange(num_targets) if hard else torch.randperm(num_targets)
    ((negatives_GN, demand),) = seen
    counts = data.item_counts_N.double()
    num_hard = 8 if hard else 0
    num_popular = 6 if hard else 13
    expected_GN = num_popular * counts[negatives_GN] / counts.sum() + (16 - num_hard - num_popular) / NUM_ITEMS
    if hard:
        expected_GN = expected_GN + 8 * demand.shares(negatives_GN)
    slow_loss(expected, batch, settings, order, negatives_GN, expected_GN).backward()
    for (name, left), right in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(dense(left.grad), dense(right.grad), msg=lambda text, name=name: f"{name}: {text}")
    assert torch.isfinite(found.loss)


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
    settings = SETTINGS.model_copy(update={"precision": "bfloat16", "backend": "torch"})
    data = training_data(settings)
    batch = next(epoch_batches(data.windows, 5, seed=0, epoch=1, rank=0))
    accumulate_gradients(start(settings).model.train(), batch, Negatives.of(data.item_counts_N, settings), settings)
    assert dtypes == {torch.float32}
    assert max(sizes) <= max(tile_pairs, settings.num_negatives)


def test_the_loss_of_an_epoch_is_the_mean_over_its_targets_by_weight():
    settings = SETTINGS.model_copy(update={"learning_rate": 1e-30, "max_epochs": 1})
    data = training_data(settings, num_users=40)
    weights = np.random.default_rng(3).choice([0.5, 2.0], len(data.windows.weights)).astype(np.float32)
    data = replace(data, windows=replace(data.windows, weights=weights))
    state = start(settings)
    fit(state, data, settings, Ranks(), no_report)
    sampler = Negatives.of(data.item_counts_N, settings)
    sums = []
    for index, batch in enumerate(epoch_batches(data.windows, data.steps, settings.seed, 1, 0)):
        training.seed_everything(settings.seed, index, 0)
        sums.append(accumulate_gradients(state.model, batch, sampler, settings))
    mean = sum(each.loss.item() for each in sums) / sum(each.weight for each in sums)
    assert state.history[0].loss == pytest.approx(mean)
    assert state.history[0].num_positions == sum(each.num_targets for each in sums) == data.windows.num_targets


def test_weights_without_a_gradient_decay_by_learning_rate_times_weight_decay():
    settings = SETTINGS.model_copy(update={"learning_rate": 0.1, "weight_decay": 0.5})
    state = start(settings)
    before = [parameter.detach().clone() for parameter in state.model.parameters()]
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.model.item_embedding.weight.grad = sparse(state.model.item_embedding.weight.grad)
    state.optimiser.step(settings.learning_rate)
    state.optimiser.settle()
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
    """Each epoch has 5 steps, in rounds of 2 and 3; with 2 steps between states the second round pauses once."""
    settings = SETTINGS.model_copy(
        update={
            "max_epochs": 2,
            "steps_between_states": steps_between_states,
            "steps_between_validations": 3,
            "patience": 9,
        }
    )
    data = replace(training_data(settings, num_users=60), steps=5)
    whole = start(settings)
    saved: list[TrainingState] = []
    fit(whole, data, settings, ranks, lambda state: saved.append(copy.deepcopy(state)))
    assert [state.step for state in saved] == ([2, 5, 7, 10] if steps_between_states > 5 else [2, 4, 5, 7, 9, 10])
    assert [report.step for report in whole.history] == [2, 5, 7, 10]
    assert [report.epoch for report in whole.history] == [0.4, 1.0, 1.4, 2.0]
    assert [state.number for state in saved] == list(range(1, len(saved) + 1))
    for state in saved:
        torch.manual_seed(12345)  # whatever happened in between
        fit(state, data, settings, ranks, no_report)
        for left, right in zip(weights(whole), weights(state), strict=True):
            assert torch.equal(left, right)
        for name, value in whole.best_weights.items():
            assert torch.equal(value, state.best_weights[name])
        assert [report.loss for report in whole.history] == [report.loss for report in state.history]


def test_states_may_be_saved_as_often_as_one_likes():
    """The weights do not depend on it."""
    states = []
    for steps_between_states in (1, 1_000):
        settings = SETTINGS.model_copy(update={"max_epochs": 1, "steps_between_states": steps_between_states})
        states.append(start(settings))
        fit(states[-1], training_data(settings, num_users=60), settings, Ranks(), no_report)
    for left, right in zip(*map(weights, states), strict=True):
        assert torch.equal(left, right)


def test_an_epoch_is_cut_into_few_equal_rounds():
    ends = {round_end(step, 25, 10) for step in range(50)}
    assert ends == {8, 16, 25, 33, 41, 50}
    assert round_end(0, 25, 25) == round_end(24, 25, 100) == 25


def test_training_ends_after_patience_rounds_without_a_better_one():
    settings = TrainSettings(max_epochs=10, patience=2)
    ndcgs = [0.1, 0.3, 0.3, 0.2]
    history = [report(epoch, ndcg) for epoch, ndcg in enumerate(ndcgs, start=1)]
    assert [ended_by(history[: n + 1], settings) for n in range(4)] == [None, None, None, "patience"]
    assert best_round(history).epoch == 2


def test_training_ends_with_its_last_epoch_or_its_time():
    history = [report(0.5, 0.1), report(1.0, 0.2)]  # 3 seconds each
    assert ended_by(history, TrainSettings(max_epochs=1)) == "max_epochs"
    assert ended_by(history, TrainSettings(max_epochs=2, max_minutes=0.1)) == "max_minutes"
    assert ended_by(history, TrainSettings(max_epochs=2, max_minutes=0.11)) is None


@pytest.mark.parametrize("ranks", [Ranks(), Twins(world_size=2)], ids=["alone", "two"])
def test_when_the_time_is_over_the_round_is_validated_where_it_is(ranks):
    """The time of a state goes on where it was saved: here a minute is over at once."""
    settings = SETTINGS.model_copy(update={"max_minutes": 1.0, "max_epochs": 100})
    data = training_data(settings, num_users=60)
    state = start(settings)
    state.progress = RoundProgress(seconds=60.0)
    fit(state, data, settings, ranks, no_report)
    assert state.step == 1 < data.steps
    assert [report.step for report in state.history] == [1]
    assert ended_by(state.history, settings) == "max_minutes"
    assert state.best_weights


def test_a_training_that_is_told_to_go_on_does_so():
    """From the state that ended it, with more epochs, it reaches what a longer training would have reached."""
    data = training_data(SETTINGS, num_users=60)
    longer = SETTINGS.model_copy(update={"max_epochs": 4})
    short, whole = start(SETTINGS), start(longer)
    fit(short, data, SETTINGS, Ranks(), no_report)
    fit(short, data, longer, Ranks(), no_report)
    fit(whole, data, longer, Ranks(), no_report)
    assert all(torch.equal(left, right) for left, right in zip(weights(short), weights(whole), strict=True))


def test_without_validation_users_the_loss_decides():
    history = [report(1, 0.0, 0, 2.0), report(2, 0.0, 0, 1.0), report(3, 0.0, 0, 1.5)]
    assert best_round(history).epoch == 2


def test_a_start_without_a_step_is_the_best_round_only_where_validation_says_so():
    start_of = {users: report(0, ndcg=0.3, num_validation_users=users, loss=0.0) for users in (0, 50)}
    assert best_round([start_of[50], report(1, 0.2), report(2, 0.3)]).epoch == 0
    assert best_round([start_of[50], report(1, 0.4)]).epoch == 1
    assert best_round([start_of[0], report(1, 0.0, num_validation_users=0, loss=9.0)]).epoch == 1


def test_the_averaged_weights_of_the_best_round_are_kept():
    ndcgs = iter([0.3, 0.5, 0.1])
    kept: list[list[torch.Tensor]] = []

    def keep(state: TrainingState) -> None:
        kept.append([value.clone() for value in state.average.state_dict().values()])

    def validate(model: RetrievalModel, users: ValidationUsers, cutoff: int) -> RankingSums:
        return RankingSums(0.0, next(ndcgs))

    state = start(SETTINGS)
    fit(state, training_data(SETTINGS, num_users=60), SETTINGS, Ranks(), keep, validate=validate)
    assert best_round(state.history).epoch == 2
    assert all(torch.equal(best, second) for best, second in zip(state.best_weights.values(), kept[1], strict=True))
    assert not torch.equal(kept[1][0], kept[2][0])


@pytest.mark.parametrize("num_steps", [3, 8, 29])
def test_the_average_is_that_of_every_step_if_the_weights_stand_still(num_steps, monkeypatch):
    """Weights of 0 before and of 1 in all later steps: the share of the ones is that of an average at every step."""
    monkeypatch.setattr(training, "STEPS_PER_AVERAGE", 1)
    state = start(SETTINGS)
    for parameter, average in zip(state.model.parameters(), state.average.parameters(), strict=True):
        torch.nn.init.ones_(parameter)
        torch.nn.init.zeros_(average)
    expected = 0.0
    for number in range(1, num_steps + 1):
        state.step = number
        average_weights(state, 0.9)
        kept = min(0.9, (1 + number) / (10 + number))
        expected = kept * expected + 1 - kept
    assert next(state.average.parameters()).flatten()[0].item() == pytest.approx(expected, rel=1e-5)


def test_no_step_counts_twice_in_the_average():
    """Rounds of 5 steps end between the multiples of 8. Weights stand still at 1, and their average was 0."""
    shares = []
    for rounds in ([20], [5, 10, 15, 20]):
        state = start(SETTINGS)
        for parameter, average in zip(state.model.parameters(), state.average.parameters(), strict=True):
            torch.nn.init.ones_(parameter)
            torch.nn.init.zeros_(average)
        for number in range(1, 21):
            state.step = 1_000 + number  # late enough for the whole decay
            if number % training.STEPS_PER_AVERAGE == 0 or number in rounds:
                average_weights(state, 0.9)
            if number in rounds:
                state.history.append(replace(report(number / 10, 0.1), step=1_000 + number))
        shares.append(next(state.average.parameters()).flatten()[0].item())
    assert shares == pytest.approx([1 - 0.9**20] * 2, rel=1e-5)


def test_without_a_decay_the_average_is_the_weights():
    settings = SETTINGS.model_copy(update={"average_decay": 0.0, "max_epochs": 1})
    state = start(settings)
    fit(state, training_data(settings, num_users=60), settings, Ranks(), no_report)
    for left, right in zip(state.model.parameters(), state.average.parameters(), strict=True):
        torch.testing.assert_close(left.detach(), right)


def test_the_learning_rate_rises_in_the_first_steps():
    rates: list[float] = []
    settings = SETTINGS.model_copy(update={"warmup_steps": 4, "max_epochs": 1, "steps_between_states": 1})
    state = start(settings)
    data = replace(training_data(settings, num_users=60), steps=6)
    fit(state, data, settings, Ranks(), lambda state: rates.append(state.optimiser.others.param_groups[0]["lr"]))
    assert rates == pytest.approx([5e-3 * share for share in (0.25, 0.5, 0.75, 1, 1, 1)])


def test_a_large_gradient_is_scaled_down():
    norms: list[float] = []

    def keep_norm(state: TrainingState) -> None:
        gradients = [parameter.grad for parameter in state.model.parameters()]
        norms.append(torch.cat([dense(gradient).flatten() for gradient in gradients]).norm().item())

    for max_norm in (1e-3, 1e3):
        settings = SETTINGS.model_copy(update={"max_gradient_norm": max_norm, "max_epochs": 1})
        fit(start(settings), training_data(settings, num_users=20), settings, Ranks(), keep_norm)
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)
    assert norms[1] > 1e-2


@pytest.mark.parametrize("weights", ["mol.cross_out.bias", "item_embedding.weight", "mol.item_out.weight"])
def test_divergence_is_said_so(weights):
    """Wherever the broken weights lie: the drawing of the negatives reads some of them first."""
    state = start(SETTINGS)
    with torch.no_grad():
        state.model.get_parameter(weights).fill_(float("nan"))
    with pytest.raises(InputError, match=r"train\.learning_rate"):
        fit(state, training_data(SETTINGS, num_users=60), SETTINGS, Ranks(), no_report)


@dataclass(frozen=True)
class WithAnother(Ranks):
    """Two processes, of which the other one sends these values, one after the other."""

    world_size: int = 2
    sent: list[torch.Tensor] = field(default_factory=list)

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        return values.add_(self.sent.pop(0))


def test_gradients_of_all_ranks_weigh_every_target_alike():
    """Two ranks with targets of weight 15 and 5: the average is that of one process with all 20. Each rank has touched
    other rows of the table of items."""
    alone, first, second = (start(SETTINGS, SURE_MODEL).model for _ in range(3))
    rows = {first: [1, 5], second: [2, 5, 9], alone: [1, 2, 5, 9]}
    values = {first: [2.0, 2.0], second: [8.0, 8.0, 8.0], alone: [2.0, 8.0, 10.0, 8.0]}
    for model in (alone, first, second):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, values[model][-1])
        table = model.item_embedding.weight
        table.grad = torch.zeros_like(table)
        table.grad[rows[model]] = torch.tensor(values[model]).unsqueeze(1)
        table.grad = sparse(table.grad)
    for parameter in alone.parameters():
        if not parameter.grad.is_sparse:
            parameter.grad.fill_(10.0)
    table = second.item_embedding.weight
    is_touched = torch.zeros(len(table), dtype=torch.int32)
    is_touched[rows[second]] = 1
    others = [p.grad.flatten() for p in second.parameters() if p is not table]
    sent = [
        torch.tensor([1.0, 5.0, 10]),
        is_touched,
        torch.cat([table.grad.to_dense()[rows[alone]].flatten(), *others]),
    ]
    average_gradients(alone, torch.tensor(4.0), 20.0, 40, Ranks())
    assert average_gradients(first, torch.tensor(3.0), 15.0, 30, WithAnother(sent=sent)) == (4.0, 20.0, 40)
    for left, right in zip(first.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad)


def test_a_rank_without_targets_takes_part():
    model = start(SETTINGS, SURE_MODEL).model
    average_gradients(model, torch.tensor(0.0), 0.0, 0, Ranks())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.item_embedding.weight.grad.indices().shape == (1, 0)


def test_clipping_scales_all_gradients_to_the_norm():
    model = start(SETTINGS, SURE_MODEL).model
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    table = model.item_embedding.weight
    table.grad[3:] = 0.0
    whole = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    table.grad = sparse(table.grad)
    assert clip_gradients(model, 1e9) == pytest.approx(float(whole.norm()))
    assert clip_gradients(model, 2.0) == pytest.approx(float(whole.norm()))
    clipped = torch.cat([dense(parameter.grad).flatten() for parameter in model.parameters()])
    torch.testing.assert_close(clipped, whole * (2.0 / whole.norm()))
