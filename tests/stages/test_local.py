"""The runner of a night in this process."""

import pytest

from pipeline.errors import InputError
from pipeline.settings import Settings
from pipeline.stages.local import LocalRunner
from pipeline.stages.progress import Progress
from pipeline.stages.runner import Stage


class Adds:
    """A stage that appends its name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, unit: int, payload: bytes) -> bytes:
        order.append((self._name, unit, payload))
        return payload + self._name.encode()


class Refuses:
    def __call__(self, unit: int, payload: bytes) -> bytes:
        raise InputError(f"unit {unit}: column user_id is missing")


order: list[tuple[str, int, bytes]] = []


def test_every_unit_goes_through_all_stages_in_order():
    order.clear()
    stages = [Stage(Adds, {"name": name}) for name in ("a", "b", "c")]
    LocalRunner(Settings()).run_chain("test", [3, 1], stages)
    assert order == [(n, unit, p) for unit in (3, 1) for n, p in (("a", b""), ("b", b"a"), ("c", b"ab"))]


def test_an_error_of_a_stage_or_a_task_comes_out_as_it_was_raised():
    with pytest.raises(InputError, match=r"^unit 7: column user_id is missing$"):
        LocalRunner(Settings()).run_chain("test", [7], [Stage(Refuses, {})])
    with pytest.raises(InputError):
        list(LocalRunner(Settings()).run_tasks("test", Refuses().__call__, [(7, b"")]))


def test_tasks_give_their_results():
    assert list(LocalRunner(Settings()).run_tasks("test", divmod, [(7, 2), (9, 4)])) == [(3, 1), (2, 1)]


def test_progress_is_logged_with_what_is_left(caplog):
    caplog.set_level("INFO", logger="nightrails")
    progress = Progress("search", 3, seconds_between_lines=0.0)
    for _ in range(3):
        progress.report(1)
    progress.finish()
    lines = [record.message for record in caplog.records]
    assert [line[:24] for line in lines] == [
        "search: 1 of 3 units, ab",
        "search: 2 of 3 units, ab",
        "search: 3 units in 0 s",
    ]
