"""The progress of a step: one log line a minute, with an estimate of the time left."""

import logging
import time

SECONDS_BETWEEN_LINES = 60.0

log = logging.getLogger("nightrails")


class Progress:
    """Counts finished units out of `total` and logs the count."""

    def __init__(self, label: str, total: int, seconds_between_lines: float = SECONDS_BETWEEN_LINES) -> None:
        self._label, self._total, self._done = label, total, 0
        self._seconds_between_lines = seconds_between_lines
        self._started = self._reported = time.monotonic()

    def report(self, num_finished: int) -> None:
        """Add finished units; log a line if the last one is older than `seconds_between_lines`."""
        self._done += num_finished
        now = time.monotonic()
        if now - self._reported < self._seconds_between_lines or not 0 < self._done < self._total:
            return
        self._reported = now
        minutes = (now - self._started) / self._done * (self._total - self._done) / 60
        log.info("%s: %d of %d units, about %.0f min left", self._label, self._done, self._total, minutes)

    def finish(self) -> None:
        """Log the number of units and the seconds they took."""
        log.info("%s: %d units in %.0f s", self._label, self._done, time.monotonic() - self._started)
