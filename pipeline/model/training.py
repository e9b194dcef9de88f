"""The training loop, in one process or in many that sum their gradients. No Ray, no files.

A step makes the gradients of one batch. After a round of steps, an epoch or less, the weights are validated. What is
validated and kept is a running average of the weights: it is better than the last weights, and steadier, so that noise
does not end the training (Polyak & Juditsky 1992).
"""

import copy
import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.data.batches import ValidationUsers, Windows, epoch_batches
from pipeline.errors import InputError
from pipeline.model.backends import training_backend
from pipeline.model.gradients import average_gradients, clip_gradients
from pipeline.model.model import RetrievalModel
from pipeline.model.negatives import Negatives
from pipeline.model.optimiser import Optimiser
from pipeline.model.pace import Pace
from pipeline.model.ranks import Ranks
from pipeline.model.rounds import RoundProgress, RoundReport, best_round, ended_by, is_late
from pipeline.model.step import accumulate_gradients
from pipeline.model.validation import RankingSums, Validate, rank_by_counts, rank_by_model
from pipeline.settings import TrainSettings

VALIDATION_CUTOFF = 10
STEPS_PER_AVERAGE = 8  # the average takes the weights in after so many steps: reading all of them takes time


@dataclass(frozen=True)
class TrainingData:
    """The data of one process."""

    windows: Windows
    steps: int  # batches per epoch, the same number on all processes
    validation: ValidationUsers
    item_counts_N: Tensor  # training events of every item


@dataclass
class TrainingState:
    """Everything that a run needs to continue, at any step."""

    model: RetrievalModel
    average: RetrievalModel
    optimiser: Optimiser
    step: int = 0  # steps that are done, of all epochs
    history: list[RoundReport] = field(default_factory=list)
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    progress: RoundProgress = field(default_factory=RoundProgress)
    number: int = 0  # of the states that were reported so far, this one included

    @property
    def seconds(self) -> float:
        """The duration of all that is done, validation included, in all attempts."""
        return self.progress.seconds + sum(report.total_seconds for report in self.history)

    def is_finished(self, settings: TrainSettings) -> bool:
        """Whether a setting ends the training after the round that is done."""
        return (
            bool(self.history) and self.history[-1].step == self.step and ended_by(self.history, settings) is not None
        )


def new_state(model: RetrievalModel, settings: TrainSettings) -> TrainingState:
    """A run before its first step; `model` is already on its device."""
    return TrainingState(model, copy.deepcopy(model).requires_grad_(False), Optimiser(model, settings))


def fit(
    state: TrainingState,
    data: TrainingData,
    settings: TrainSettings,
    ranks: Ranks,
    on_state: Callable[[TrainingState], None],
    say: Callable[[str], None] = lambda line: None,
    validate: Validate = rank_by_model,
) -> None:
    """Train until the state is finished.

    `on_state` is called after each round and every `steps_between_states` steps, equally often on all processes: a
    state that it has saved continues as if the run had never stopped. `say` gets a line about the speed now and then.
    Raises InputError when the training diverges.
    """
    pace = Pace(data.steps, settings, say)
    while not state.is_finished(settings):
        stop = round_end(state.step, data.steps, settings.steps_between_validations)
        was_late = train_to(state, stop, data, settings, ranks, pace)
        if state.step == stop or was_late:
            finish_round(state, data, settings, ranks, validate)
        state.number += 1
        on_state(state)


def round_end(step: int, steps_per_epoch: int, max_steps: int) -> int:
    """The step at which the round that `step` is in ends. An epoch is cut into as few equal rounds as can be."""
    epoch, within = divmod(step, steps_per_epoch)
    num_rounds = -(-steps_per_epoch // max_steps)
    return epoch * steps_per_epoch + next(
        end for end in (steps_per_epoch * (index + 1) // num_rounds for index in range(num_rounds)) if end > within
    )


def train_to(
    state: TrainingState, stop: int, data: TrainingData, settings: TrainSettings, ranks: Ranks, pace: Pace
) -> bool:
    """Make steps up to step `stop` or to the next state to save, within one epoch; returns whether time was over.

    Raises InputError when the training diverges.
    """
    model = state.model.train()
    only_met = model.item_embedding.content is not None
    negatives = Negatives.of(data.item_counts_N.to(model.device), settings, only_met)
    epoch, first = divmod(state.step, data.steps)
    last = min(stop - epoch * data.steps, first + settings.steps_between_states)
    time_is_over = False
    for batch in epoch_batches(data.windows, data.steps, settings.seed, epoch + 1, ranks.rank, first, last):
        started = time.monotonic()
        seed_everything(settings.seed, state.step, ranks.rank)
        state.optimiser.zero_grad()
        sums = accumulate_gradients(model, batch, negatives, settings)
        loss_sum, weight, num_positions = average_gradients(model, sums.loss, sums.weight, sums.num_targets, ranks)
        _check(loss_sum, clip_gradients(model, settings.max_gradient_norm), state.step)
        state.optimiser.step(settings.learning_rate * min(1.0, (state.step + 1) / max(settings.warmup_steps, 1)))
        state.step += 1
        done, seconds = state.progress, time.monotonic() - started
        state.progress = RoundProgress(
            done.loss_sum + loss_sum, done.weight + weight, done.num_positions + num_positions, done.seconds + seconds
        )
        pace.tell(state.step, num_positions, seconds, state.seconds, done.loss_sum / max(done.weight, 1e-9))
        time_is_over = _any(is_late(state.seconds, settings), settings, ranks, model.device)
        if state.step % STEPS_PER_AVERAGE == 0 or state.step == stop or time_is_over:
            average_weights(state, settings.average_decay)
        if time_is_over:
            break
    return time_is_over


def finish_round(
    state: TrainingState, data: TrainingData, settings: TrainSettings, ranks: Ranks, validate: Validate
) -> None:
    """Validate the averaged weights, and keep them if they are the best so far.

    Before the first step this makes a round of no steps, so that trained weights to start from are kept too.
    """
    started = time.monotonic()
    sums = validate(state.average, data.validation, VALIDATION_CUTOFF)
    hit_rate, ndcg, num_users = means(sums, data, ranks, state.model.device)
    done = state.progress
    report = RoundReport(
        epoch=state.step / data.steps,
        step=state.step,
        loss=done.loss_sum / done.weight if done.weight else 0.0,
        hit_rate=hit_rate,
        ndcg=ndcg,
        num_validation_users=num_users,
        num_positions=done.num_positions,
        seconds=done.seconds,
        validation_seconds=time.monotonic() - started,
        backend=training_backend(state.model.mol, settings).name,
    )
    state.history.append(report)
    state.progress = RoundProgress()
    if best_round(state.history) is report:
        state.best_weights = {name: value.clone() for name, value in state.average.state_dict().items()}


def popular_hit_rate(data: TrainingData, ranks: Ranks, device: torch.device) -> float:
    """The validation users' hit rate when everyone is shown the items with the most training events."""
    sums = rank_by_counts(data.item_counts_N, data.validation, VALIDATION_CUTOFF)
    return means(sums, data, ranks, device)[0]


def means(sums: RankingSums, data: TrainingData, ranks: Ranks, device: torch.device) -> tuple[float, float, int]:
    """Hit rate and NDCG of the validation users, and their number, over all processes."""
    values = torch.tensor([sums.num_hits, sums.ndcg, len(data.validation)], dtype=torch.float64, device=device)
    num_hits, ndcg, num_users = ranks.sum_(values).tolist()
    return num_hits / max(num_users, 1), ndcg / max(num_users, 1), int(num_users)


@torch.no_grad()
def average_weights(state: TrainingState, decay: float) -> None:
    """Take the weights into their average, as if after each of the steps since they were taken in last.

    In the beginning the average spans a tenth of the steps that are done, so that it forgets the random weights.
    """
    end_of_last_round = state.history[-1].step if state.history else 0
    last_time = max(end_of_last_round, (state.step - 1) // STEPS_PER_AVERAGE * STEPS_PER_AVERAGE)
    kept = min(decay, (1 + state.step) / (10 + state.step)) ** (state.step - last_time)
    state.optimiser.settle()
    pairs = zip(state.average.parameters(), state.model.parameters(), strict=True)
    averages, weights = (list(column) for column in zip(*pairs, strict=True))
    torch._foreach_lerp_(averages, [weight.detach() for weight in weights], 1.0 - kept)


def _check(loss_sum: float, norm: float, step: int) -> None:
    """Raise InputError when the loss or the norm of the gradient is not finite. No state holds such weights."""
    if not (math.isfinite(loss_sum) and math.isfinite(norm)):
        raise InputError(
            f"training diverged at step {step + 1} (the loss is {loss_sum}, the norm of the gradient {norm}); lower "
            "train.learning_rate"
        )


def _any(is_so: bool, settings: TrainSettings, ranks: Ranks, device: torch.device) -> bool:
    """Whether it is so in any process: clocks differ, but all processes must stop at the same step."""
    if ranks.world_size == 1 or settings.max_minutes is None:
        return is_so
    return bool(ranks.sum_(torch.tensor([float(is_so)], device=device)).item())


def seed_everything(*numbers: int) -> None:
    """Seed torch's random numbers with these numbers, in this order."""
    torch.manual_seed(zlib.crc32(repr(numbers).encode()))
