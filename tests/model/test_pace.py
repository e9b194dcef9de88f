from pipeline.model.pace import Pace, spell
from pipeline.settings import TrainSettings


def lines_of(settings: TrainSettings, num_steps: int) -> list[str]:
    """A training with 100 steps an epoch; each step takes 2 seconds for 1,000 positions."""
    lines: list[str] = []
    pace = Pace(100, settings, lines.append)
    for step in range(1, num_steps + 1):
        pace.tell(step, 1_000, 2.0, total_seconds=2.0 * step, loss=5.0)
    return lines


def test_the_duration_is_announced_after_ten_seconds_and_progress_every_half_minute():
    first, second, third = lines_of(TrainSettings(max_epochs=3, max_minutes=None), 35)
    assert "about 500 positions/s: an epoch of 100 steps takes 3 min, the training at most 10 min more" in first
    assert second == "epoch 1: step 20 of 100, loss 5.000, 500 positions/s, at most 9 min left"
    assert third.startswith("epoch 1: step 35 of 100")


def test_the_time_left_is_bounded_by_the_time_that_the_training_may_take():
    first, *_ = lines_of(TrainSettings(max_epochs=100, max_minutes=2.0), 10)
    assert "the training at most 110 s more" not in first
    assert "the training at most 2 min more" in first


def test_durations_are_short():
    assert [spell(seconds) for seconds in (-1, 0, 89, 90, 3_600, 5_400, 86_400)] == [
        *("0 s", "0 s", "89 s", "2 min", "60 min", "1.5 h", "24.0 h"),
    ]
