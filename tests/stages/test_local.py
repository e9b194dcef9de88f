"""The order of the local runner, and its progress."""

from pipeline.settings import Settings
from pipeline.stages.local import LocalRunner
from pipeline.stages.progress import Progress
from pipeline.stages.runner import Stage


class Adds:
    """A stage that appends its name to the payload and its call to `order`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, unit: int, payload: bytes) -> bytes:
        order.append((self._name, unit, payload))
        return payload + self._name.encode()


order: list[tuple[str, int, bytes]] = []


def test_one_unit_after_the_other_goes_through_all_stages():
    order.clear()
    stages = [Stage(Adds, {"name": name}) for name in ("a", "b", "c")]
    LocalRunner(Settings()).run_chain("test", [3, 1], stages)
    assert order == [(n, unit, p) for unit in (3, 1) for n, p in (("a", b""), ("b", b"a"), ("c", b"ab"))]


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
