"""Check, clean, order and split tonight's log, and write histories by user bucket.

Leaves <root>/histories/<id>/: one Parquet file per user bucket, items.parquet, quarantine.parquet (bad rows with the
reason), validation.json (where every row of the log went) and manifest.json.
"""

from datetime import date
from typing import TYPE_CHECKING

from pipeline.command import Outcome, command
from pipeline.errors import InputError

if TYPE_CHECKING:
    from pipeline.settings import Settings


def run(settings: "Settings", ds: date | None) -> Outcome:
    """Prepare the histories of one day; `ds` None is the newest day in the log."""
    from pipeline.distributed.cluster import connect
    from pipeline.distributed.prepare import prepare
    from pipeline.io.manifests import read_manifest
    from pipeline.io.night import open_night
    from pipeline.io.passes import open_job
    from pipeline.io.spill import remove_spill

    storage, night = open_night(settings, ds)
    manifest = read_manifest(storage, night.histories.prefix)
    existed = manifest is not None
    if manifest is None:
        job = open_job(settings, storage, night)
        connect(settings)
        manifest = prepare(job)
    else:
        remove_spill(storage, night.histories)  # what a crash at the very end has left
    faults = settings.faults_with(int(manifest.counts["items"]), f"{night.histories.prefix}/items.parquet")
    if faults:  # before hours of training
        raise InputError("; ".join(faults))
    return {
        "status": "exists" if existed else "made",
        "ds": night.ds.isoformat(),
        "histories": manifest.id,
        "uri": f"{storage.uri}/{night.histories.prefix}",
        **{name: int(manifest.counts[name]) for name in ("users", "items", "events", "rows_read")},
    }


if __name__ == "__main__":
    command(__doc__, run)
