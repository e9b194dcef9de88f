"""Refusing a log of which too much is bad, repeated or nobody's; each refusal says what to do."""

import logging
from collections import Counter
from collections.abc import Mapping
from datetime import date

import pyarrow as pa

from pipeline.data.cleaning import MALFORMED, ORPHAN, REASONS, WORD
from pipeline.data.ids import MAX_ID_BYTES
from pipeline.data.seen import OF_TYPE
from pipeline.data.splitting import REUSED
from pipeline.data.times import explain_times
from pipeline.data.volume import EventsByDay, Finding, odd_figures
from pipeline.errors import InputError
from pipeline.io.formats import SHOWN, shown
from pipeline.io.heads import way_out_of_malformed
from pipeline.io.inputs import Log
from pipeline.settings import Settings

logger = logging.getLogger("nightrails")

BAD = (*REASONS, MALFORMED)
IN_WORDS = {
    "user_id_null": "null or empty",
    "user_id_unreadable": "not readable as an id",
    "item_id_null": "null or empty",
    "item_id_unreadable": "not readable as an id",
    "event_ts_null": "null or empty",
    "event_ts_unreadable": "not readable as a time",
    "event_ts_too_old": "before 1990 (of relative_s: before the year 1)",
    "event_ts_in_future": "in the future",
    "event_type_unknown": "unknown: event_weights lacks it",
    MALFORMED: "without the columns of their file",
}
MOST = 0.9  # of the times that must be bad before another unit or format is suggested for all of them
SHOWN_WORDS = 5


def check_bad_share(log: Log, settings: Settings, counts: Counter[str], rejected: pa.Table, num_rows: int) -> None:
    """Raise InputError when more than `prepare.max_bad_share` of the log's `num_rows` rows are bad."""
    num_bad = sum(counts[reason] for reason in BAD)
    if num_bad <= settings.prepare.max_bad_share * num_rows:
        return
    reason = max(BAD, key=lambda name: counts[name])
    of_reason = [row for row in rejected.to_pylist() if row["reason"] == reason]
    first = of_reason[0]
    column = next((name for name in log.source.columns.named if reason.startswith(name)), "")
    log_column = log.source.columns.named.get(column, "")
    value = first["line"] if reason == MALFORMED else first.get(column)
    subject = f"column {log_column!r}: {counts[reason]} values are" if column else f"{counts[reason]} lines are"
    example = shown(value) if isinstance(value, str) else value
    share = counts[reason] / counts["rows_read"]  # so far: a log is refused before its end is read
    values = [str(row["line"] if reason == MALFORMED else row[column]) for row in of_reason]
    hint = _way_out(log, reason, values, share)
    place = "" if reason == MALFORMED else f" in row {first['row']}"  # a malformed line is only known to be before one
    raise InputError(
        f"{log.origin(log.files[first['file']])}, {subject} {IN_WORDS[reason]}, for example {example}{place}; "
        f"{num_bad} of {num_rows} rows are bad and prepare.max_bad_share is {settings.prepare.max_bad_share}"
        + (f"; {hint}" if hint else "")
    )


def _way_out(log: Log, reason: str, values: list[str], share: float) -> str:
    """What to change for rows that are bad for this reason, `values` and their share of all; empty if that is clear."""
    if reason in ("user_id_unreadable", "item_id_unreadable"):
        if values[0] == "(not UTF-8)":
            return "an id is UTF-8 text or an integer; cast the column in the log"
        if len(values[0]) == SHOWN:
            return f"an id has at most {MAX_ID_BYTES:,} bytes; is this the column of the id?"
        return f"set {reason.removesuffix('_unreadable')}_type: string in {log.source_file} to read the ids as text"
    if reason in ("event_ts_unreadable", "event_ts_too_old", "event_ts_in_future"):
        explained = explain_times(values, log.source)
        if share >= MOST:
            return f"{explained} (in {log.source_file})"
        return f"the other times are sane, so these are of another unit or form, or wrong: {explained}"
    if reason == "event_type_unknown":
        return f"add it to event_weights in {log.source_file}, or set unknown_event_types: ignore or weight there"
    hint = way_out_of_malformed(values[0], log.source.csv) if reason == MALFORMED else ""
    return f"{hint} in {log.source_file}" if hint else ""


def check_words(log: Log, settings: Settings, counts: Counter[str]) -> None:
    """Raise InputError when the ids of more than `prepare.max_bad_share` of the rows are words that mean nobody."""
    for column in ("user_id", "item_id"):
        prefix = f"{WORD}{column}:"
        words = Counter({name.removeprefix(prefix): n for name, n in counts.items() if name.startswith(prefix)})
        if words.total() > settings.prepare.max_bad_share * counts["rows_read"]:
            raise InputError(
                f"{log.name}, column {log.source.columns.named[column]!r}: {words.total()} of {counts['rows_read']} "
                f"rows have a word that usually means nobody ({in_words(words)}); if it does, leave these rows out "
                f"with null_words: {list(words)} in {log.source_file}; if they are real ids, set null_words: []"
            )


def in_words(words: Counter[str]) -> str:
    """The most frequent words with their numbers of rows."""
    return ", ".join(f"{word!r} {number}" for word, number in words.most_common(SHOWN_WORDS))


def check_duplicates(log: Log, settings: Settings, counts: Counter[str]) -> None:
    """Raise InputError when more than `prepare.max_duplicate_share` of the rows were delivered before, or have the
    `event_id` of another event."""
    most = settings.prepare.max_duplicate_share
    limit = f"prepare.max_duplicate_share is {most}"
    if counts[REUSED] > most * counts["rows_read"]:
        raise InputError(
            f"{log.name}, column {log.source.columns.event_id!r}: {counts[REUSED]} of {counts['rows_read']} rows have "
            f"an id that another event of the same user has, so it is not the id of a delivery, and {limit}; take "
            f"event_id out of columns in {log.source_file}"
        )
    if counts["duplicates"] > most * counts["rows_read"]:
        raise InputError(
            f"{log.name}: {counts['duplicates']} of {counts['rows_read']} rows repeat an earlier one (the same user, "
            f"item and time), and {limit}; is the log there more than once, or are its times too coarse?"
        )


def check_seen_types(log: Log, settings: Settings, counts: Counter[str]) -> None:
    """Raise InputError for a type of `prepare.seen_event_types` that neither the log nor `event_weights` has."""
    for name in settings.prepare.seen_event_types or ():
        if not counts[f"{OF_TYPE}{name}"] and name not in log.source.event_weights:
            known = ", ".join(log.source.event_weights) or "none"
            raise InputError(
                f"{log.name}: no event is of the type {name!r} (prepare.seen_event_types), so none would hide its "
                f"item; event_weights in {log.source_file} names: {known}"
            )


def check_worth_training(counts: Mapping[str, int], origin: str, max_user_events_per_day: int) -> None:
    """Raise InputError for histories, with these counts of their manifest, that cannot be trained or measured on."""
    if not counts["users"]:
        why = (
            f": all {counts['bot_users']} have a day with more than {max_user_events_per_day} events "
            "(prepare.max_user_events_per_day) and are taken for bots"
        )
        raise InputError(f"{origin}: no user is left{why if counts['bot_users'] else ''}")
    if not counts["trainable_users"]:
        raise InputError(
            f"{origin}: no user has two events to train on before the days that are held out; give a longer log, or "
            "hold out less with split.validation_days and split.test_days"
        )
    if not counts["evaluable_users"]:
        raise InputError(
            f"{origin}: nobody has a test event on an item that may be shown to them, so the model could not be "
            "measured; hold out more with split.test_days, give a longer log, or let people find again what they have "
            "seen (prepare.seen_event_types, seen_lookback_days)"
        )


def check_volume(log: Log, settings: Settings, events: EventsByDay, ds: date) -> list[Finding]:
    """Warn of what is odd about the events of `ds`, or raise InputError, as `prepare.odd_days` says; return it."""
    if settings.prepare.odd_days == "ignore":
        return []
    found = odd_figures(events, ds, settings.prepare)
    if found and settings.prepare.odd_days == "error":
        raise InputError(
            f"{log.name}: {'; '.join(finding.words for finding in found)}; is the log complete? If it is, set "
            "prepare.odd_days: warn"
        )
    for finding in found:
        logger.warning("the log: %s (prepare.%s)", finding.words, finding.rule)
    return found


def check_orphans(log: Log, settings: Settings, counts: Counter[str], rejected: pa.Table) -> None:
    """Raise InputError when the catalogue lacks the items of more than `prepare.max_orphan_share` of the events."""
    num_events = counts["kept"] + counts[ORPHAN] + counts["bot_events"]
    if counts[ORPHAN] <= settings.prepare.max_orphan_share * num_events:
        return
    first = next(row for row in rejected.to_pylist() if row["reason"] == ORPHAN)
    raise InputError(
        f"{log.origin(log.files[first['file']])}, column {log.source.columns.item_id!r}: {counts[ORPHAN]} of "
        f"{num_events} events are on items that the catalogue lacks, for example {first['item_id']!r}, and "
        f"prepare.max_orphan_share is {settings.prepare.max_orphan_share}; is items.uri the catalogue of this log?"
    )
