"""Check, clean, order and split tonight's log, and write histories by user bucket.

Leaves <root>/histories/<id>/: one Parquet file per user bucket, items.parquet, quarantine.parquet (bad rows with the
reason), validation.json (where every row of the log went) and manifest.json.
"""

from datetime import date

from pipeline.command import Outcome, command
from pipeline.settings import Settings


def run(settings: Settings, ds: date | None) -> Outcome:
    """Prepare the histories of one day; `ds` None is the newest day in the log."""
    from pipeline.distributed.cluster import connect
    from pipeline.distributed.prepare import prepare
    from pipeline.io.night import open_night

    storage, night = open_night(settings, ds)
    connect(settings)
    manifest, existed = prepare(settings, storage, night)
    return {
        "status": "exists" if existed else "made",
        "ds": night.ds.isoformat(),
        "histories": manifest.id,
        "uri": f"{storage.uri}/{night.histories.prefix}",
        **{name: int(manifest.counts[name]) for name in ("users", "items", "events", "rows_read")},
    }


if __name__ == "__main__":
    command(__doc__, run)
