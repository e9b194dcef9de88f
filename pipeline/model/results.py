"""What a training run measured: the schema of a checkpoint's `metrics-….json`."""

from collections.abc import Sequence

from pipeline.config import Config
from pipeline.model.rounds import RoundReport, best_round, ended_by
from pipeline.model.training import VALIDATION_CUTOFF
from pipeline.settings import TrainSettings


class TrainingMetrics(Config):
    """The chosen weights and their figures on the validation users beside popularity's, the speed, and all rounds."""

    cutoff: int  # of the hit rates and of the NDCG
    best_epoch: float
    validation_hit_rate: float
    validation_ndcg: float
    num_validation_users: int
    positions_per_second: float
    seconds: float  # of training alone, without validation
    ended_by: str | None  # the setting that ended the training: max_epochs, max_minutes or patience
    history: tuple[RoundReport, ...]
    popularity_hit_rate: float
    backend: str  # of the pair network: `native <instruction set>` or `torch`; several after a restart elsewhere
    # Of a refit: epochs on all events after the selection. The other figures are those of the selection.
    refit_epochs: float = 0.0
    refit_loss: float | None = None
    refit_ndcg: float | None = None  # on the validation events, from which it has learned
    is_refit_served: bool = False  # false: there is none, or it was not sound
    # Of a model that was taken over from an earlier night, whose figures these are: items that are new since then.
    num_unknown_items: int = 0


def refit_metrics(selection: TrainingMetrics, last: RoundReport, is_sound: bool) -> TrainingMetrics:
    """The metrics of a refitted model: those of its selection, because it has learned from the validation events."""
    measured = {"refit_epochs": last.epoch, "refit_loss": last.loss, "refit_ndcg": last.ndcg}
    return selection.model_copy(update=measured | {"is_refit_served": is_sound})


def training_metrics(
    history: Sequence[RoundReport], popularity_hit_rate: float, settings: TrainSettings
) -> TrainingMetrics:
    """The metrics of a finished run; its best round is the earliest of the best."""
    best = best_round(history)
    seconds = sum(report.seconds for report in history)
    return TrainingMetrics(
        cutoff=VALIDATION_CUTOFF,
        best_epoch=best.epoch,
        validation_hit_rate=best.hit_rate,
        validation_ndcg=best.ndcg,
        num_validation_users=best.num_validation_users,
        positions_per_second=sum(report.num_positions for report in history) / max(seconds, 1e-9),
        seconds=seconds,
        ended_by=ended_by(history, settings),
        history=tuple(history),
        popularity_hit_rate=popularity_hit_rate,
        backend=", ".join(dict.fromkeys(report.backend for report in history)),
    )
