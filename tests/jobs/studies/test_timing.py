import math
from types import SimpleNamespace

import pytest

from jobs.studies import timing
from jobs.studies.timing import Row, Timing, median_ratio, median_seconds, row, time_interleaved


def test_contenders_take_turns_and_the_warm_up_does_not_count():
    calls: list[str] = []
    timings = time_interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, 3, num_warm_up=2)
    assert calls == list("abc") * 5
    assert all(len(timing.wall) == len(timing.cpu) == 3 for timing in timings.values())


@pytest.fixture
def clocks(monkeypatch):
    """The two clocks, moved by the contenders only."""
    now = SimpleNamespace(wall=0.0, cpu=0.0)
    moved_by_hand = SimpleNamespace(perf_counter=lambda: now.wall, process_time=lambda: now.cpu)
    monkeypatch.setattr(timing, "time", moved_by_hand)
    return now


def test_waiting_takes_wall_time_and_working_takes_cpu_time(clocks):
    def wait() -> None:
        clocks.wall += 3.0

    def work() -> None:
        clocks.wall, clocks.cpu = clocks.wall + 3.0, clocks.cpu + 6.0  # on two cores

    timings = time_interleaved({"wait": wait, "work": work}, 3, num_warm_up=0)
    assert timings == {"wait": Timing((3.0,) * 3, (0.0,) * 3), "work": Timing((3.0,) * 3, (6.0,) * 3)}


def test_a_first_slow_call_is_left_out_of_the_median(clocks):
    pauses = iter([100.0, 1.0, 2.0, 3.0])

    def pause() -> None:
        clocks.wall += next(pauses)

    assert median_seconds(pause, num_rounds=3) == 2.0


def test_the_ratio_is_taken_within_rounds():
    slow, fast = Timing((2.0, 20.0, 6.0), (1.0, 1.0, 1.0)), Timing((1.0, 10.0, 2.0), (4.0, 4.0, 4.0))
    assert median_ratio(slow, fast) == 2.0
    assert median_ratio(slow, fast, "cpu") == 0.25


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="num_rounds"):
        time_interleaved({}, 0)


def test_a_row_holds_when_its_value_meets_the_must():
    assert row("recall@100", 0.991, 0.99, 0.995, "higher") == Row("recall@100", 0.991, "≥ 0.99", "≥ 0.995", True)
    assert not row("recall@100", 0.9899, 0.99, 0.995, "higher").holds
    assert row("latency", 2.0, 2.0, 1.0, "lower", "ms").must == "≤ 2 ms"
    assert row("latency", 2.0, 2.0, 1.0, "lower", "ms").holds
    assert not row("latency", 2.1, 2.0, 1.0, "lower", "ms").holds
    assert not row("latency", math.nan, 2.0, 1.0, "lower", "ms").holds
    assert not row("recall@100", math.nan, 0.99, 1.0, "higher").holds
