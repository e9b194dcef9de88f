"""What a training run measured: the schema of a checkpoint's `metrics-….json`."""

from collections.abc import Sequence

from pipeline.config import Config
from pipeline.model.training import VALIDATION_CUTOFF, EpochReport


class TrainingMetrics(Config):
    """The chosen epoch and its figures beside popularity's, the speed, and all epochs."""

    cutoff: int  # of the hit rates
    best_epoch: int
    validation_hit_rate: float
    num_validation_users: int
    positions_per_second: float
    seconds: float  # of training alone, without validation
    history: tuple[EpochReport, ...]
    popularity_hit_rate: float


def training_metrics(history: Sequence[EpochReport], popularity_hit_rate: float) -> TrainingMetrics:
    """The metrics of a finished run; its best epoch is the earliest of the best."""
    best = max(history, key=lambda report: (report.worth, -report.epoch))
    seconds = sum(report.seconds for report in history)
    return TrainingMetrics(
        cutoff=VALIDATION_CUTOFF,
        best_epoch=best.epoch,
        validation_hit_rate=best.hit_rate,
        num_validation_users=best.num_validation_users,
        positions_per_second=sum(report.num_positions for report in history) / seconds,
        seconds=seconds,
        history=tuple(history),
        popularity_hit_rate=popularity_hit_rate,
    )
