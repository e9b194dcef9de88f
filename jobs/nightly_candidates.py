"""The nightly job: from tonight's log to the published table of candidates.

Runs the other jobs in order and skips a job whose artifact exists. An artifact is named by a fingerprint of its inputs
and settings, so the same command resumes after a crash, and does nothing when the night is published. Without any
argument the job uses a simulated log.
"""

import time
from datetime import date
from typing import TYPE_CHECKING

from pipeline.command import Outcome, command, log, open_runner

if TYPE_CHECKING:
    from pipeline.io.night import Night
    from pipeline.settings import Settings


def run(settings: "Settings", ds: date | None) -> Outcome:
    """Make and publish the candidates of one day; `ds` None is the newest day in the log."""
    from jobs import publish, simulate_log
    from pipeline.io.night import open_night
    from pipeline.settings import SIMULATED

    if settings.log.source == SIMULATED:
        simulate_log.run(settings, ds)
    night = open_night(settings, ds)
    return publish.already_published(night) or run_night(settings, night)


def run_night(settings: "Settings", night: "Night") -> Outcome:
    """Run every step of a night that is not published yet; raises GateError before the search for everybody."""
    from jobs import choose_memory, count_pairs, embed_items, evaluate, prepare, publish, retrieve, train, tune
    from pipeline.io.evaluation import read_metrics
    from pipeline.io.storage.base import check_store
    from pipeline.quality.gates import check_gates
    from pipeline.quality.report import how_to_read, three_users
    from pipeline.quality.stories import read_stories

    check_store(night.storage)  # refuse a store that cannot publish before hours of work
    log.info("%s for ds=%s: %s", settings.name, night.ds, night.run.run_id)
    open_runner(settings)  # likewise a cluster that does not answer
    seconds: dict[str, float] = {}
    outcome: Outcome = {}
    for step in (prepare, count_pairs, train, choose_memory, embed_items, tune, evaluate, retrieve, publish):
        name = step.__name__.removeprefix("jobs.")
        log.info("── %s", name)
        started = time.monotonic()
        outcome = step.run(settings, night)
        seconds[name] = round(time.monotonic() - started, 1)
        log.info("   %s: %s in %.1f s", name, outcome["status"], seconds[name])
        if step is evaluate:
            check_gates(read_metrics(night.storage, night.evaluation), settings.gates)
    log.info("three of its users:\n\n%s\n", three_users(read_stories(night)))
    instructions = how_to_read(night.storage.uri, settings.name)
    log.info("the table of ds=%s is in %s\n%s", night.ds, outcome["uri"], instructions)
    return outcome | {"steps": seconds}


if __name__ == "__main__":
    command(__doc__ or "", run)
