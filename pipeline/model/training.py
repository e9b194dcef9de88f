"""The training loop, in one process or in many that sum their gradients. No Ray, no files."""

import math
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.data.batches import SequenceBatch, ValidationUsers, Windows, epoch_batches
from pipeline.errors import InputError
from pipeline.model.model import RetrievalModel
from pipeline.model.negatives import Negatives
from pipeline.model.step import accumulate_gradients
from pipeline.model.validation import count_model_hits, count_popular_hits
from pipeline.settings import TrainSettings

ADAM_BETAS = (0.9, 0.98)
VALIDATION_CUTOFF = 10


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    world_size: int = 1

    def sum_(self, values: Tensor) -> Tensor:
        """Replace `values` by their sum over all processes."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values


@dataclass(frozen=True)
class TrainingData:
    """The data of one process."""

    windows: Windows
    steps: int  # batches per epoch, the same number on all processes
    validation: ValidationUsers
    item_counts_N: Tensor  # training events of every item


@dataclass(frozen=True)
class EpochReport:
    """One line of the history: losses and counts over all processes, times in this one.

    `hit_rate` is the share of validation users with a held-out item among the VALIDATION_CUTOFF best of all items.
    """

    epoch: int
    loss: float
    hit_rate: float
    num_validation_users: int
    num_positions: int  # targets trained on
    seconds: float
    validation_seconds: float

    @property
    def worth(self) -> float:
        """The highest is the best: the hit rate, or, without validation users, minus the loss."""
        return self.hit_rate if self.num_validation_users else -self.loss


@dataclass(frozen=True)
class EpochProgress:
    """The part of an epoch that is done: steps of each process, sums over all processes, seconds in this one."""

    num_steps: int = 0
    loss_sum: float = 0.0
    num_positions: int = 0
    seconds: float = 0.0


@dataclass
class TrainingState:
    """Everything that a run needs to continue: after its last finished epoch, or within an epoch."""

    model: RetrievalModel
    optimiser: torch.optim.Optimizer
    history: list[EpochReport] = field(default_factory=list)
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    progress: EpochProgress = EpochProgress()
    number: int = 0  # of the states that were reported so far, this one included

    @property
    def best(self) -> EpochReport:
        """The best epoch; of equal ones the earliest."""
        return max(self.history, key=lambda report: (report.worth, -report.epoch))

    def is_finished(self, settings: TrainSettings) -> bool:
        """Whether all epochs are done, or the last `patience` epochs have not improved on the best."""
        done = len(self.history)
        return done >= settings.max_epochs or (done > 0 and done - self.best.epoch >= settings.patience)


def new_state(model: RetrievalModel, settings: TrainSettings) -> TrainingState:
    """A run before its first epoch; `model` is already on its device."""
    return TrainingState(
        model,
        torch.optim.AdamW(
            model.parameters(), settings.learning_rate, ADAM_BETAS, weight_decay=settings.weight_decay, fused=True
        ),
    )


def fit(
    state: TrainingState,
    data: TrainingData,
    settings: TrainSettings,
    ranks: Ranks,
    on_state: Callable[[TrainingState], None],
) -> None:
    """Train until the state is finished; call `on_state` after each epoch and every `steps_between_states` steps.

    A state that `on_state` has saved continues exactly as if the run had never stopped. All processes call it equally
    often.
    """
    while not state.is_finished(settings):
        train_epoch(state, data, settings, ranks, on_state)
        trained = time.monotonic()
        num_hits = count_model_hits(state.model, data.validation, VALIDATION_CUTOFF)
        hit_rate, num_users = _hit_rate(num_hits, data, ranks, state.model.device)
        done = state.progress
        report = EpochReport(
            epoch=len(state.history) + 1,
            loss=done.loss_sum / max(done.num_positions, 1),
            hit_rate=hit_rate,
            num_validation_users=num_users,
            num_positions=done.num_positions,
            seconds=done.seconds,
            validation_seconds=time.monotonic() - trained,
        )
        state.history.append(report)
        state.progress = EpochProgress()
        if state.best is report:
            state.best_weights = {name: value.clone() for name, value in state.model.state_dict().items()}
        state.number += 1
        on_state(state)


def popular_hit_rate(data: TrainingData, ranks: Ranks, device: torch.device) -> float:
    """The validation users' hit rate when everyone is shown the items with the most training events."""
    num_hits = count_popular_hits(data.item_counts_N, data.validation, VALIDATION_CUTOFF)
    return _hit_rate(num_hits, data, ranks, device)[0]


def _hit_rate(num_hits: int, data: TrainingData, ranks: Ranks, device: torch.device) -> tuple[float, int]:
    """Share of validation users with a hit, and their number, over all processes."""
    total_hits, num_users = ranks.sum_(torch.tensor([num_hits, len(data.validation)], device=device)).tolist()
    return total_hits / max(num_users, 1), num_users


def train_epoch(
    state: TrainingState,
    data: TrainingData,
    settings: TrainSettings,
    ranks: Ranks,
    on_state: Callable[[TrainingState], None],
) -> None:
    """Make the steps of the epoch that the state's progress lacks; call `on_state` at each pause but the last."""
    epoch = len(state.history) + 1
    negatives = Negatives.of(data.item_counts_N.to(state.model.device), settings)
    while (first := state.progress.num_steps) < data.steps:
        last = min(first + settings.steps_between_states, data.steps)
        started = time.monotonic()
        seed_everything(settings.seed, epoch, first, ranks.rank)
        batches = epoch_batches(data.windows, data.steps, settings.seed, epoch, ranks.rank, first, last)
        loss_sum, num_positions = train_steps(state, batches, negatives, settings, ranks)
        done, seconds = state.progress, time.monotonic() - started
        state.progress = EpochProgress(
            last, done.loss_sum + loss_sum, done.num_positions + num_positions, done.seconds + seconds
        )
        if last < data.steps:
            state.number += 1
            on_state(state)


def train_steps(
    state: TrainingState, batches: Iterable[SequenceBatch], negatives: Negatives, settings: TrainSettings, ranks: Ranks
) -> tuple[float, int]:
    """Make one step per batch; returns the sum of the losses and the number of targets, over all processes.

    Raises InputError when a loss is not finite.
    """
    model = state.model.train()
    total = torch.zeros(2, dtype=torch.float64, device=model.device)
    for batch in batches:
        state.optimiser.zero_grad(set_to_none=True)
        loss_sum, num_positions = accumulate_gradients(model, batch, negatives, settings)
        average_gradients(model, num_positions, ranks)
        state.optimiser.step()
        total += torch.stack([loss_sum.double(), torch.full_like(total[0], num_positions)])
    ranks.sum_(total)
    loss_sum, count = total.tolist()
    if not math.isfinite(loss_sum):
        raise InputError(f"training diverged (the loss is {loss_sum}); lower train.learning_rate")
    return loss_sum, int(count)


def seed_everything(*numbers: int) -> None:
    """Seed torch's random numbers with these numbers, in this order."""
    torch.manual_seed(zlib.crc32(repr(numbers).encode()))


def average_gradients(model: RetrievalModel, num_positions: int, ranks: Ranks) -> None:
    """Divide the gradients, summed over all processes, by the number of targets of all processes.

    Each target has the same weight, however the targets are spread over the processes.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if ranks.world_size == 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= num_positions
        return
    for parameter in parameters:
        if parameter.grad is None:  # this process had nothing to train on
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    count = torch.tensor([num_positions], dtype=gradients[0].dtype, device=gradients[0].device)
    # All in one message. DistributedDataParallel would send after the first of the step's many backward passes.
    summed = ranks.sum_(torch.cat([*(gradient.flatten() for gradient in gradients), count]))
    summed /= summed[-1].clone()
    parts = torch.split(summed[:-1], [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
