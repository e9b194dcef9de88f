import math
import time

import pytest

from jobs.studies.timing import Row, Timing, median_ratio, median_seconds, row, time_interleaved


def test_contenders_take_turns_and_the_warm_up_does_not_count():
    calls: list[str] = []
    timings = time_interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, 3, num_warm_up=2)
    assert calls == list("abc") * 5
    assert all(len(timing.wall) == len(timing.cpu) == 3 for timing in timings.values())


def test_waiting_takes_wall_time_and_working_takes_cpu_time():
    def work() -> None:
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass

    timings = time_interleaved({"wait": lambda: time.sleep(0.05), "work": work}, 3, num_warm_up=0)
    assert timings["wait"].median_wall >= 0.05
    assert timings["wait"].median_cpu < 0.04
    assert timings["work"].median_cpu >= 0.05


def test_a_first_slow_call_is_left_out_of_the_median():
    pauses = iter([0.1, 0.0, 0.0, 0.0])
    assert median_seconds(lambda: time.sleep(next(pauses)), num_rounds=1) < 0.1
    assert list(pauses) == [0.0, 0.0]


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
