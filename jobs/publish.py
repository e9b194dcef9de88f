"""Check every row of a run against its promises, apply the gates, and make the run the table of its day."""

from datetime import date
from typing import TYPE_CHECKING

from pipeline.command import Outcome, command

if TYPE_CHECKING:
    from pipeline.artifacts import Night
    from pipeline.io.commits import Commit, RunManifest
    from pipeline.io.storage import Storage
    from pipeline.settings import Settings


def run(settings: "Settings", ds: date | None) -> Outcome:
    from pipeline.io.commits import commit, propose, published, refresh_latest, write_run_manifest
    from pipeline.io.evaluations import read_metrics
    from pipeline.io.night import open_night
    from pipeline.io.runs import finished_units
    from pipeline.io.storage import check_store
    from pipeline.io.tunings import read_tuning, tuned
    from pipeline.quality.gates import check_gates
    from pipeline.quality.inspection import describe_run, inspect_run

    storage, night = open_night(settings, ds)
    if already := already_published(storage, night):
        return already
    settings = tuned(storage, night, settings)
    head = published(storage, night.run.table, night.ds)
    check_store(storage)
    sidecars = finished_units(storage, night.run, settings.output.num_buckets)
    verdicts = check_gates(read_metrics(storage, night.evaluation), settings.gates)
    inspection = inspect_run(storage, night, settings, sidecars)
    manifest = describe_run(night, settings, inspection, verdicts, read_tuning(storage, night))
    proposal = propose(night.run, head, *write_run_manifest(storage, night.run, manifest))
    standing = commit(storage, night.run, proposal)
    refresh_latest(storage, night.run.table)
    status = "published" if standing.uuid == proposal.uuid else "already published"
    return outcome_of(status, storage, night, standing, manifest)


def already_published(storage: "Storage", night: "Night") -> Outcome | None:
    """What to answer when readers already see this very run, else None."""
    from pipeline.io.commits import published, read_run_manifest, refresh_latest

    head = published(storage, night.run.table, night.ds)
    if head is None or not head.offers(night.run):
        return None
    refresh_latest(storage, night.run.table)  # a run that died right after its commit left the old one
    manifest = read_run_manifest(storage, night.run.table, head)
    return outcome_of("already published", storage, night, head, manifest)


def outcome_of(status: str, storage: "Storage", night: "Night", standing: "Commit", manifest: "RunManifest") -> Outcome:
    """The last line of the job."""
    return {
        "status": status,
        "run_id": standing.run_id,
        "uri": f"{storage.uri}/{night.run.table_prefix}",
        "ds": night.ds.isoformat(),
        "rows": int(manifest.counts["candidates"]),
        "users": int(manifest.counts["users"]),
        "commit": standing.seq,
    }


if __name__ == "__main__":
    command(__doc__ or "", run)
