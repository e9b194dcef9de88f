"""The nightly job: from tonight's log to the published table of candidates.

Runs the other jobs in order. Each leaves an artifact named by a fingerprint of what it was made from and is skipped
when that artifact exists, so the same command resumes after a crash and does nothing when all is published.
Without any argument it serves a simulated log.
"""

import logging
import time
from datetime import date
from typing import TYPE_CHECKING

from pipeline.command import Outcome, command

if TYPE_CHECKING:
    from pipeline.settings import Settings

log = logging.getLogger("nightrails")


def run(settings: "Settings", ds: date | None) -> Outcome:
    """Make and publish the candidates of one day; `ds` None is the newest day in the log."""
    from jobs import embed_items, evaluate, prepare, publish, retrieve, simulate_log, train, tune
    from pipeline.io.night import open_night
    from pipeline.io.storage import check_store
    from pipeline.quality.report import how_to_read, three_users
    from pipeline.quality.stories import read_stories
    from pipeline.settings import SIMULATED

    if settings.log.source == SIMULATED:
        simulate_log.run(settings, ds)
    storage, night = open_night(settings, ds)
    already = publish.already_published(storage, night)
    if already:
        return already
    from pipeline.distributed.cluster import connect, deadline  # brings torch and Ray, which the above does not need

    check_store(storage)  # a store that cannot publish is better known before the work than after it
    log.info("%s for ds=%s: %s", settings.name, night.ds, night.run.run_id)
    seconds: dict[str, float] = {}
    with deadline(settings.cluster.deadline_minutes):
        connect(settings)
        for step in (prepare, train, embed_items, tune, retrieve, evaluate, publish):
            name = step.__name__.removeprefix("jobs.")
            log.info("── %s", name)
            started = time.monotonic()
            outcome = step.run(settings, night.ds)
            seconds[name] = round(time.monotonic() - started, 1)
            log.info("   %s: %s in %.1f s", name, outcome["status"], seconds[name])
    log.info("three of its users\n\n%s\n", three_users(read_stories(storage, night)))
    log.info("the table of ds=%s lies in %s\n%s", night.ds, outcome["uri"], how_to_read(storage.uri, settings.name))
    return outcome | {"steps": seconds}


if __name__ == "__main__":
    command(__doc__ or "", run)
