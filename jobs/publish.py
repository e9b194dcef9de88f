"""Check every row of a run against its promises, apply the gates, and make the run the table of its day."""

from typing import TYPE_CHECKING

from pipeline.command import ALREADY_PUBLISHED, PUBLISHED, Outcome, command, on_night

if TYPE_CHECKING:
    from pipeline.io.night import Night
    from pipeline.io.publication.commits import Commit, RunManifest
    from pipeline.settings import Settings


def run(settings: "Settings", night: "Night") -> Outcome:
    from pipeline.io.evaluation import read_metrics
    from pipeline.io.histories import odd_days
    from pipeline.io.publication.commits import commit, propose, published, refresh_latest, write_run_manifest
    from pipeline.io.publication.units import finished_units
    from pipeline.io.storage.base import check_store
    from pipeline.io.tuning import as_chosen, read_tuning
    from pipeline.quality.gates import check_errors, check_fallback, check_gates
    from pipeline.quality.inspection import describe_run, inspect_run
    from pipeline.quality.report import warnings_of

    if already := already_published(night):
        return already
    storage = night.storage
    head = published(storage, night.run.table, night.ds)
    check_store(storage)
    sidecars = finished_units(storage, night.run, settings.output.num_buckets)
    metrics = read_metrics(storage, night.evaluation)
    verdicts, warnings = check_gates(metrics, settings.gates), odd_days(storage, night.histories)
    warnings += warnings_of(metrics) if metrics else []
    chosen = as_chosen(night, settings)
    inspection = inspect_run(night, chosen, sidecars)
    verdicts += [check_fallback(inspection.counts, settings.gates), check_errors(inspection.counts, settings.gates)]
    if num_errors := inspection.counts["error"]:
        warnings.append(f"{num_errors} users have no list: the computation failed (status error in the accounting)")
    manifest = describe_run(night, chosen, inspection, verdicts, warnings, read_tuning(night))
    proposal = propose(night.run, head, *write_run_manifest(storage, night.run, manifest))
    standing = commit(storage, night.run, proposal)
    refresh_latest(storage, night.run.table)
    status = PUBLISHED if standing.uuid == proposal.uuid else ALREADY_PUBLISHED
    return outcome_of(status, night, standing, manifest)


def already_published(night: "Night") -> Outcome | None:
    """The job's outcome when this run is already published, else None."""
    from pipeline.io.publication.commits import published, read_run_manifest, refresh_latest

    head = published(night.storage, night.run.table, night.ds)
    if head is None or not head.offers(night.run):
        return None
    refresh_latest(night.storage, night.run.table)  # still the old one after a crash right after the commit
    manifest = read_run_manifest(night.storage, night.run.table, head)
    return outcome_of(ALREADY_PUBLISHED, night, head, manifest)


def outcome_of(status: str, night: "Night", standing: "Commit", manifest: "RunManifest") -> Outcome:
    """The job's outcome, printed as its last line."""
    return {
        "status": status,
        "run_id": standing.run_id,
        "uri": f"{night.storage.uri}/{night.run.table_prefix}",
        "ds": night.ds.isoformat(),
        "rows": manifest.counts["candidates"],
        "users": manifest.counts["users"],
        "commit": standing.seq,
        "backends": manifest.backends,
        "hit_rates": hit_rates(manifest),
        "warnings": [*fallbacks(manifest.backends), *manifest.warnings],
    }


def hit_rates(manifest: "RunManifest") -> dict[str, float]:
    """The hit rates of the model and of its floors at the smallest cutoff, as its gates have read them."""
    rates = [audit.get("hit_rates", {}) for audit in manifest.audits]
    return {name: round(rate, 4) for each in rates for name, rate in each.items()}


def fallbacks(backends: dict[str, int]) -> list[str]:
    """A warning for each fallback: a backend whose name ends with the reason in parentheses."""
    return [f"{count} units were searched with {name}" for name, count in backends.items() if name.endswith(")")]


if __name__ == "__main__":
    command(__doc__ or "", on_night(run))
