"""What tonight is called: the day, and the name of every artifact, known before anything is computed."""

from datetime import date

from pipeline.artifacts import Night, name_night
from pipeline.io.inputs import open_items, open_log, open_queries
from pipeline.io.rows import newest_day
from pipeline.io.storage import open_storage
from pipeline.io.storage.base import Storage
from pipeline.settings import Settings


def open_night(settings: Settings, ds: date | None = None) -> tuple[Storage, Night]:
    """The store below `settings.root`, and tonight's names; `ds` None is the newest day in the log.

    Reads listings only, but for a log without `ds=` partitions whose newest day must be looked up.
    """
    day = newest_day(settings) if ds is None else ds
    log = open_log(settings, day)
    items, queries = open_items(settings, day), open_queries(settings, day)
    night = name_night(
        settings,
        day,
        log.files,
        log.source.model_dump(mode="json"),
        items.files if items else (),
        queries.files if queries else (),
    )
    return open_storage(settings.root), night
