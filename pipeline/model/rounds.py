"""The rounds of a training: what each measured, which is the best, and when the training ends. No torch here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.settings import TrainSettings


@dataclass(frozen=True)
class RoundReport:
    """One line of the history: losses and counts over all processes, times in this one.

    `hit_rate` is the share of validation users with a held-out item among the VALIDATION_CUTOFF best of all items,
    `ndcg` their mean NDCG at this cutoff.
    """

    epoch: float  # epochs that are done
    step: int  # steps that are done
    loss: float
    hit_rate: float
    ndcg: float
    num_validation_users: int
    num_positions: int  # targets trained on
    seconds: float
    validation_seconds: float
    backend: str = "torch"  # of the pair network, in this process

    @property
    def worth(self) -> float:
        """The highest is the best: the NDCG, or, without validation users, minus the loss.

        Without either, before the first step, nothing speaks for the round.
        """
        if self.num_validation_users:
            return self.ndcg
        return -self.loss if self.step else -math.inf

    @property
    def total_seconds(self) -> float:
        return self.seconds + self.validation_seconds


@dataclass(frozen=True)
class RoundProgress:
    """The part of a round that is done: sums over all processes, seconds in this one."""

    loss_sum: float = 0.0
    weight: float = 0.0
    num_positions: int = 0
    seconds: float = 0.0


def best_round(history: Sequence[RoundReport]) -> RoundReport:
    """The best round; of equal ones the earliest."""
    return max(history, key=lambda report: (report.worth, -report.step))


def ended_by(history: Sequence[RoundReport], settings: TrainSettings) -> str | None:
    """The setting that ends a training after these rounds; None while it goes on."""
    if history[-1].epoch >= settings.max_epochs:
        return "max_epochs"
    if len(history) - 1 - history.index(best_round(history)) >= settings.patience:
        return "patience"
    return "max_minutes" if is_late(sum(report.total_seconds for report in history), settings) else None


def is_late(seconds: float, settings: TrainSettings) -> bool:
    """Whether a training of this duration has used up its time."""
    return settings.max_minutes is not None and seconds >= 60 * settings.max_minutes
