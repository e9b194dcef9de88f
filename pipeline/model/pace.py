"""How fast a training goes, in words: soon after its start, then every half minute."""

from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.settings import TrainSettings

FIRST_SECONDS, SECONDS_BETWEEN = 10.0, 30.0


@dataclass
class Pace:
    """Counts the steps and positions of this process's attempt at a training, and says how it goes."""

    steps_per_epoch: int
    settings: TrainSettings
    say: Callable[[str], None]
    num_steps: int = 0
    num_positions: int = 0
    seconds: float = 0.0
    next_at: float = field(default=FIRST_SECONDS)

    def tell(self, step: int, num_positions: int, seconds: float, total_seconds: float, loss: float) -> None:
        """Count a step, the training's number `step`, and say how it goes if the last word is half a minute old.

        `total_seconds` is the duration of the whole training so far, `loss` the mean of the steps before this one.
        """
        self.num_steps, self.num_positions = self.num_steps + 1, self.num_positions + num_positions
        self.seconds += seconds
        if self.seconds < self.next_at:
            return
        is_first = self.next_at == FIRST_SECONDS
        self.next_at = self.seconds + SECONDS_BETWEEN
        speed = self.num_positions / self.seconds
        epoch_seconds = self.steps_per_epoch * self.seconds / self.num_steps
        left = self.settings.max_epochs * epoch_seconds - step * self.seconds / self.num_steps
        if self.settings.max_minutes is not None:
            left = min(left, 60 * self.settings.max_minutes - total_seconds)
        if is_first:
            self.say(
                f"about {speed:,.0f} positions/s: an epoch of {self.steps_per_epoch} steps takes "
                f"{spell(epoch_seconds)}, the training at most {spell(left)} more (train.max_epochs, "
                "train.max_minutes; earlier when it no longer improves)"
            )
            return
        epoch, within = divmod(step - 1, self.steps_per_epoch)
        self.say(
            f"epoch {epoch + 1}: step {within + 1} of {self.steps_per_epoch}, loss {loss:.3f}, {speed:,.0f} "
            f"positions/s, at most {spell(left)} left"
        )


def spell(seconds: float) -> str:
    """A duration for a person: two digits are enough."""
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5_400 else f"{seconds / 3_600:.1f} h"
