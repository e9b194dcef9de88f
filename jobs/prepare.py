"""Check, clean, order and split tonight's log, and write histories by user bucket.

Writes <root>/histories/<id>/: a Parquet file per user bucket, items-….parquet, quarantine-….parquet (all bad rows,
with the reason), validation-….json (numbers of rows kept, repeated and rejected) and manifest.json. … is a hash of the
content.
"""

from typing import TYPE_CHECKING

from pipeline.command import EXISTS, MADE, Outcome, command, on_night, open_runner

if TYPE_CHECKING:
    from pipeline.io.night import Night
    from pipeline.settings import Settings


def run(settings: "Settings", night: "Night") -> Outcome:
    from pipeline.errors import InputError
    from pipeline.io.artifacts import read_manifest
    from pipeline.io.histories import read_bucket
    from pipeline.stages.content import check_content
    from pipeline.stages.item_columns import check_item_columns
    from pipeline.stages.list_rules import check_list_rules, parse_needs
    from pipeline.stages.night_rules import check_rules, parse_conditions
    from pipeline.stages.prepare.limits import check_worth_training
    from pipeline.stages.prepare.passes import open_job, prepare
    from pipeline.stages.prepare.segments import remove_scratch
    from pipeline.stages.queries import check_cold_users, check_queries

    parse_conditions(night, settings)  # a misspelt condition is refused before the log is read
    parse_needs(night, settings)
    manifest = read_manifest(night.storage, night.histories.prefix)
    status = EXISTS
    if manifest is None:
        job = open_job(night, settings)  # a log that cannot be read is refused before any cluster is started
        check_queries(night, job.columns.user_type)
        manifest, status = prepare(open_runner(settings), job), MADE
    else:
        remove_scratch(night.storage, night.histories)  # left by a crash right after the manifest
        check_queries(night, read_bucket(night.storage, night.histories, 0).user_ids.type)
    faults = settings.faults_with(manifest.counts["items"], night.histories.prefix)
    if faults:  # before hours of training
        raise InputError("; ".join(faults))
    origin = f"{night.storage.uri}/{night.histories.prefix}"
    check_worth_training(manifest.counts, origin, settings.prepare.max_user_events_per_day)
    check_rules(night, settings)
    check_list_rules(night, settings)
    check_item_columns(night, settings)
    check_content(night, settings)
    if settings.queries.cold_users == "raise":
        check_cold_users(night, settings.output.num_buckets)
    return {
        "status": status,
        "ds": night.ds.isoformat(),
        "histories": manifest.id,
        "uri": f"{night.storage.uri}/{night.histories.prefix}",
        **{name: manifest.counts[name] for name in ("users", "items", "events", "rows_read")},
    }


if __name__ == "__main__":
    command(__doc__ or "", on_night(run))
