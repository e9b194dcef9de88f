"""The promises of a published table, each a check over whole columns that names the rows that break it.

R rows (one per user and item). Pure: no files.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.histories import Bucket
from pipeline.data.lists import Int32
from pipeline.errors import InvalidRunError
from pipeline.schema import USER_STATUSES, candidates, nested_candidates, users

MAX_EXAMPLES = 3
MUST_GIVE_A_REASON = ("short", "skipped", "error")
MUST_BE_EMPTY = ("skipped", "error")

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Expected:
    """What the tables of one unit are held against."""

    requested: pa.Array  # the users that must be accounted for
    histories: Bucket
    item_ids: pa.Array  # of the item index, ascending
    k: int
    layout: Literal["long", "nested"]
    surface: str
    ds: date
    model_version: str
    run_id: str


@dataclass(frozen=True)
class Violation:
    """A promise that was broken, how often, and the first places."""

    promise: str
    count: int
    examples: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.promise}: {self.count} times" + (f", first {'; '.join(self.examples)}" if self.examples else "")


@dataclass(frozen=True)
class Rows:
    """The lists in long form."""

    user_ids: pa.Array
    ranks: Ints
    item_ids: pa.Array
    scores: npt.NDArray[np.float32]

    @staticmethod
    def of(table: pa.Table) -> "Rows":
        user_ids, ranks, item_ids, scores = (
            table[name].combine_chunks() for name in ("user_id", "rank", "item_id", "score")
        )
        return Rows(user_ids, ranks.to_numpy(zero_copy_only=False).astype(np.int64), item_ids, _numpy(scores))

    def name(self, row: int) -> str:
        return f"user {self.user_ids[row]}, rank {self.ranks[row]}, item {self.item_ids[row]}"


def flatten(table: pa.Table) -> Rows:
    """A nested table as rows; its ranks are the places in the lists, whose lengths must agree (schema_faults)."""
    lists = table["item_ids"].combine_chunks()
    lengths = _numpy(lists.value_lengths()).astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    ranks = np.arange(1, lengths.sum() + 1) - np.repeat(starts, lengths)
    user_ids = table["user_id"].combine_chunks().take(pa.array(np.repeat(np.arange(len(lengths)), lengths)))
    return Rows(user_ids, ranks, lists.flatten(), _numpy(table["scores"].combine_chunks().flatten()))


@dataclass(frozen=True)
class Place:
    """Each row's user as a place in the accounting and item as a row of the index (-1: in neither), and where the
    run of rows of one user begins."""

    user_R: Ints
    item_R: Ints
    is_start_R: Bools
    num_users: int
    num_items: int

    @staticmethod
    def of(rows: Rows, user_ids: pa.ChunkedArray, item_ids: pa.Array) -> "Place":
        user_R = _index(rows.user_ids, user_ids)
        is_start_R = np.ones(len(user_R), dtype=np.bool_)
        is_start_R[1:] = user_R[1:] != user_R[:-1]
        return Place(user_R, _index(rows.item_ids, item_ids), is_start_R, len(user_ids), len(item_ids))

    @property
    def keys_R(self) -> Ints:
        return self.keys_of(self.user_R, self.item_R)

    def keys_of(self, users: Ints, items: Ints | Int32) -> Ints:
        """One number per pair of user and item."""
        return (users + 1) * (self.num_items + 1) + items + 1


def list_faults(rows: Rows, place: Place) -> Iterator[Violation]:
    """Ranks, scores, order, uniqueness, ids that are known."""
    starts = np.flatnonzero(place.is_start_R)
    expected_rank = np.arange(len(place.user_R)) - np.repeat(starts, np.diff([*starts, len(place.user_R)])) + 1
    again = np.zeros(len(place.user_R), dtype=np.bool_)
    again[starts] = _is_repeated(place.user_R[starts])
    falls, tied = np.zeros_like(again), np.zeros_like(again)
    inside = ~place.is_start_R[1:]
    falls[1:] = inside & ~(rows.scores[1:] <= rows.scores[:-1])
    tied[1:] = inside & (rows.scores[1:] == rows.scores[:-1]) & (place.item_R[1:] < place.item_R[:-1])
    yield from _rows_where(place.user_R < 0, "the user is in the accounting", rows.name)
    yield from _rows_where(place.item_R < 0, "the item is in the item index", rows.name)
    yield from _rows_where(again, "the rows of a user are together", rows.name)
    yield from _rows_where(rows.ranks != expected_rank, "ranks go 1, 2, 3, … without gaps", rows.name)
    yield from _rows_where(~np.isfinite(rows.scores), "scores are finite", rows.name)
    yield from _rows_where(falls, "scores do not rise within a list", rows.name)
    yield from _rows_where(tied, "equal scores are in ascending order of item id", rows.name)
    keys = place.keys_R
    if len(keys) and (np.diff(np.sort(keys)) == 0).any():
        is_known = (place.user_R >= 0) & (place.item_R >= 0)
        yield from _rows_where(_is_repeated(keys) & is_known, "an item is once in a list", rows.name)


def history_faults(rows: Rows, place: Place, user_ids: pa.ChunkedArray, expected: Expected) -> Iterator[Violation]:
    """No item of a user's whole history."""
    histories = expected.histories
    user_of_event = np.repeat(_index(histories.user_ids, user_ids), np.diff(histories.offsets))
    seen = np.sort(place.keys_of(user_of_event, histories.item_rows)[user_of_event >= 0])
    is_seen_R = _is_in_sorted(place.keys_R, seen) & (place.user_R >= 0)
    yield from _rows_where(is_seen_R, "the item is not in the user's history", rows.name)


def accounting_faults(user_table: pa.Table, place: Place, expected: Expected) -> Iterator[Violation]:
    """One row per requested user, with a status and a number that agree with the list."""
    user_ids, status = user_table["user_id"].combine_chunks(), user_table["status"].combine_chunks()
    claimed = _numpy(user_table["num_returned"].combine_chunks()).astype(np.int64)
    has_reason = _numpy(pc.greater(pc.utf8_length(user_table["reason"].combine_chunks()), 0))
    returned = np.bincount(place.user_R[place.user_R >= 0], minlength=place.num_users)

    def name(row: int) -> str:
        return f"user {user_ids[row]}, status {status[row]}, num_returned {claimed[row]}, rows {returned[row]}"

    def is_one_of(*statuses: str) -> Bools:
        return _numpy(pc.is_in(status, pa.array(statuses, pa.string()))).astype(np.bool_)

    missing = expected.requested.filter(pa.array(_index(expected.requested, user_ids) < 0))
    if len(missing):
        yield Violation("every requested user is accounted for", len(missing), _first(missing))
    yield from _rows_where(_index(user_ids, expected.requested) < 0, "only requested users are accounted for", name)
    again = _is_repeated(_index(user_ids, pc.unique(user_ids)))
    yield from _rows_where(again, "a user has one accounting row", name)
    yield from _rows_where(~is_one_of(*USER_STATUSES), f"the status is one of {', '.join(USER_STATUSES)}", name)
    # A user that is accounted for twice has been reported; both rows would differ from the list's length.
    yield from _rows_where((returned != claimed) & ~again, "num_returned is the length of the list", name)
    yield from _rows_where(claimed > expected.k, f"a list has at most {expected.k} items", name)
    yield from _rows_where(is_one_of("ok") & (claimed != expected.k), f"ok means exactly {expected.k} items", name)
    yield from _rows_where(is_one_of("short") & (claimed >= expected.k), f"short means under {expected.k}", name)
    yield from _rows_where(is_one_of(*MUST_BE_EMPTY) & (claimed != 0), "skipped and error have no list", name)
    yield from _rows_where(is_one_of(*MUST_GIVE_A_REASON) & ~has_reason, "a short or missing list has a reason", name)
    yield from certificate_faults(user_table, is_one_of(*MUST_BE_EMPTY), name)
    for column in ("num_seen_filtered", "num_rule_filtered"):
        negative = _numpy(user_table[column].combine_chunks()) < 0
        yield from _rows_where(negative, f"{column} is not negative", name)


def certificate_faults(user_table: pa.Table, has_no_list: Bools, name: Callable[[int], str]) -> Iterator[Violation]:
    """A gap is a size; it is 0 where the list is proven, and unknown where there is no list."""
    is_proven = _numpy(user_table["is_proven"].combine_chunks()).astype(np.bool_)
    max_gap = user_table["max_gap"].combine_chunks()
    is_known, gap = _numpy(pc.is_valid(max_gap)).astype(np.bool_), _numpy(max_gap.fill_null(0.0))
    yield from _rows_where(~np.isfinite(gap) | (gap < 0), "max_gap is finite and not negative", name)
    yield from _rows_where(is_proven & (~is_known | (gap != 0)), "a proven list has a max_gap of 0", name)
    yield from _rows_where(has_no_list & (is_proven | is_known), "skipped and error prove nothing", name)


def provenance_faults(candidate_table: pa.Table, user_table: pa.Table, expected: Expected) -> Iterator[Violation]:
    """Every row says of which night, run and model it is."""
    of_run = {"ds": pa.scalar(expected.ds, pa.date32()), "run_id": pa.scalar(expected.run_id)}
    of_list = of_run | {
        "surface": pa.scalar(expected.surface),
        "model_version": pa.scalar(expected.model_version),
    }
    for table, columns in ((candidate_table, of_list), (user_table, of_run)):
        for column, value in columns.items():
            wrong = _numpy(pc.not_equal(table[column].combine_chunks(), value)).astype(np.bool_)
            yield from _cells_where(wrong, f"{column} is {value}", table, column)
    unnamed = _numpy(pc.equal(pc.utf8_length(candidate_table["source"].combine_chunks()), 0)).astype(np.bool_)
    yield from _cells_where(unnamed, "source is named", candidate_table, "source")


def schema_faults(candidate_table: pa.Table, user_table: pa.Table, expected: Expected) -> Iterator[Violation]:
    user_type, item_type = expected.requested.type, expected.item_ids.type
    of_lists = (nested_candidates if expected.layout == "nested" else candidates)(user_type, item_type)
    for name, table, schema in (("candidates", candidate_table, of_lists), ("users", user_table, users(user_type))):
        if not table.schema.equals(schema):
            wrong = sorted(set(map(str, schema)) ^ set(map(str, table.schema)))
            yield Violation(f"{name} has the columns of its schema", 1, (", ".join(wrong) or "other order or nulls",))
            continue
        for column in schema.names:
            nulls = table[column].null_count
            values = table[column].combine_chunks()
            if pa.types.is_list(values.type):
                nulls += values.flatten().null_count
            if nulls and not schema.field(column).nullable:
                yield Violation(f"{name}.{column} has no nulls", nulls, ())
    if expected.layout == "nested" and candidate_table.schema.equals(of_lists):
        lengths = [_numpy(candidate_table[name].combine_chunks().value_lengths()) for name in ("item_ids", "scores")]
        yield from _cells_where(lengths[0] != lengths[1], "item_ids and scores are as long", candidate_table, "user_id")


def _rows_where(wrong: Bools, promise: str, name: Callable[[int], str]) -> Iterator[Violation]:
    found = np.flatnonzero(wrong)
    if len(found):
        yield Violation(promise, len(found), tuple(name(int(row)) for row in found[:MAX_EXAMPLES]))


def _cells_where(wrong: Bools, promise: str, table: pa.Table, column: str) -> Iterator[Violation]:
    yield from _rows_where(wrong, promise, lambda row: f"user {table['user_id'][row]}, {column} {table[column][row]}")


def _index(values: pa.Array, known: pa.Array | pa.ChunkedArray) -> Ints:
    """The place of each value among the known ones, -1 where it is not."""
    if isinstance(known, pa.ChunkedArray):
        known = known.combine_chunks()
    return _numpy(pc.fill_null(pc.index_in(values, known), -1)).astype(np.int64)


def _is_in_sorted(values: Ints, ascending: Ints) -> Bools:
    """Whether each value is among the ascending ones: far faster than np.isin on keys that come by user."""
    if not len(ascending):
        return np.zeros(len(values), dtype=np.bool_)
    at = np.searchsorted(ascending, values)
    return np.asarray(ascending[np.minimum(at, len(ascending) - 1)] == values)


def _is_repeated(values: Ints) -> Bools:
    """True for every value that was there before."""
    repeated = np.ones(len(values), dtype=np.bool_)
    repeated[np.unique(values, return_index=True)[1]] = False
    return repeated


def _first(values: pa.Array) -> tuple[str, ...]:
    return tuple(f"user {value}" for value in values[:MAX_EXAMPLES])


def _numpy(array: pa.Array) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return values


@dataclass(frozen=True)
class UnitAudit:
    """The outcome for one unit; `num_rows` counts user-item pairs in either layout."""

    num_rows: int
    num_users: int
    statuses: dict[str, int]
    violations: tuple[Violation, ...]


def audit_unit(candidate_table: pa.Table, user_table: pa.Table, expected: Expected) -> UnitAudit:
    """Check every row of a unit against every promise."""
    wrong = [*schema_faults(candidate_table, user_table, expected)]
    if wrong:  # nothing else can be asked of other columns
        return UnitAudit(candidate_table.num_rows, user_table.num_rows, {}, tuple(wrong))
    rows = flatten(candidate_table) if expected.layout == "nested" else Rows.of(candidate_table)
    place = Place.of(rows, user_table["user_id"], expected.item_ids)
    violations = [
        *list_faults(rows, place),
        *history_faults(rows, place, user_table["user_id"], expected),
        *accounting_faults(user_table, place, expected),
        *provenance_faults(candidate_table, user_table, expected),
    ]
    statuses = {entry["values"]: entry["counts"] for entry in pc.value_counts(user_table["status"]).to_pylist()}
    return UnitAudit(len(rows.scores), user_table.num_rows, statuses, tuple(violations))


def require_sound(audit: UnitAudit, origin: str) -> None:
    """Raise InvalidRunError that names the unit and the first places where it breaks a promise."""
    if audit.violations:
        lines = "\n".join(f"  {violation}" for violation in audit.violations)
        raise InvalidRunError(
            f"{origin}: {len(audit.violations)} promises are broken, so nothing is published\n{lines}"
        )
