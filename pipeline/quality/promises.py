"""The promises of a published table. The check of a promise runs over whole columns and names the rows that break it.

R rows (one per user and item). Pure: no files.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date
from itertools import chain
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.columns import mask_of, numpy_of
from pipeline.data.histories import Bucket
from pipeline.data.lists import Float32, Int32
from pipeline.errors import InvalidRunError
from pipeline.schema import MOL, POPULAR, USER_STATUSES, candidates, nested_candidates, users

MAX_EXAMPLES = 3
MUST_GIVE_A_REASON = ("short", "fallback", "skipped", "error")
MUST_BE_EMPTY = ("skipped", "error")

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
BrokenRules = Callable[[pa.Array, Ints, Ints], Iterable[tuple[str, Bools]]]
BrokenListRules = Callable[[pa.Table, Ints, Ints, Float32], Iterable[tuple[str, Bools]]]


@dataclass(frozen=True)
class Expected:
    """The facts that the tables of one unit must agree with."""

    requested: pa.Array  # the users that must be accounted for
    histories: Bucket
    item_ids: pa.Array  # of the item index, ascending
    is_eligible_N: Bools  # whether each of these items may be shown tonight
    k: int
    layout: Literal["long", "nested"]
    surface: str
    ds: date
    model_version: str
    run_id: str
    # Columns of the catalogue that are published beside each item; a row per item.
    item_columns: pa.Table = field(default_factory=lambda: pa.table({}))
    # Tonight's rules: for users, and rows as the places of their users and items, each rule's promise and the rows that
    # break it.
    broken_rules: BrokenRules = lambda user_ids, user_R, item_R: ()
    # The same of the rules for whole lists, for the accounting, and the rows' users, items and scores.
    broken_list_rules: BrokenListRules = lambda users, user_R, item_R, score_R: ()


@dataclass(frozen=True)
class Violation:
    """A broken promise: the number of rows that break it, and the first of them in words."""

    promise: str
    count: int
    examples: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.promise}: {self.count} times" + (f", first {'; '.join(self.examples)}" if self.examples else "")


@dataclass(frozen=True)
class Rows:
    """The published lists, one entry per user and item, in the order of the table."""

    user_ids: pa.Array
    ranks: Ints
    item_ids: pa.Array
    scores: npt.NDArray[np.float32]

    @staticmethod
    def of(table: pa.Table) -> "Rows":
        user_ids, ranks, item_ids, scores = (
            table[name].combine_chunks() for name in ("user_id", "rank", "item_id", "score")
        )
        return Rows(user_ids, numpy_of(ranks).astype(np.int64), item_ids, numpy_of(scores))

    def name(self, row: int) -> str:
        return f"user {self.user_ids[row]}, rank {self.ranks[row]}, item {self.item_ids[row]}"


def flatten(table: pa.Table) -> Rows:
    """Turn a nested table into rows. A rank is a position in the lists, whose lengths must agree (`schema_faults`)."""
    lists = table["item_ids"].combine_chunks()
    lengths = numpy_of(lists.value_lengths()).astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    ranks = np.arange(1, lengths.sum() + 1) - np.repeat(starts, lengths)
    user_ids = table["user_id"].combine_chunks().take(pa.array(np.repeat(np.arange(len(lengths)), lengths)))
    return Rows(user_ids, ranks, lists.flatten(), numpy_of(table["scores"].combine_chunks().flatten()))


@dataclass(frozen=True)
class Matches:
    """The rows matched with the accounting and the item index; row numbers, -1 where nothing matches."""

    user_R: Ints  # row of the accounting
    item_R: Ints  # row of the item index
    is_first_R: Bools  # whether the user differs from the row before
    num_users: int
    num_items: int

    @staticmethod
    def of(rows: Rows, user_ids: pa.ChunkedArray, item_ids: pa.Array) -> "Matches":
        user_R = _index(rows.user_ids, user_ids)
        is_first_R = np.ones(len(user_R), dtype=np.bool_)
        is_first_R[1:] = user_R[1:] != user_R[:-1]
        return Matches(user_R, _index(rows.item_ids, item_ids), is_first_R, len(user_ids), len(item_ids))

    @property
    def keys_R(self) -> Ints:
        return self.keys_of(self.user_R, self.item_R)

    def keys_of(self, users: Ints, items: Ints | Int32) -> Ints:
        """Give each pair of user and item a number of its own."""
        return (users + 1) * (self.num_items + 1) + items + 1


def list_faults(rows: Rows, matches: Matches) -> Iterator[Violation]:
    """Check the ranks, scores and order of each list, and that its user and items are known and not repeated."""
    starts = np.flatnonzero(matches.is_first_R)
    expected_rank = np.arange(len(matches.user_R)) - np.repeat(starts, np.diff([*starts, len(matches.user_R)])) + 1
    resumes = np.zeros(len(matches.user_R), dtype=np.bool_)
    resumes[starts] = _is_repeated(matches.user_R[starts])
    rises, tied_wrongly = np.zeros_like(resumes), np.zeros_like(resumes)
    follows = ~matches.is_first_R[1:]
    rises[1:] = follows & ~(rows.scores[1:] <= rows.scores[:-1])
    tied_wrongly[1:] = follows & (rows.scores[1:] == rows.scores[:-1]) & (matches.item_R[1:] < matches.item_R[:-1])
    yield from _rows_where(matches.user_R < 0, "the user is in the accounting", rows.name)
    yield from _rows_where(matches.item_R < 0, "the item is in the item index", rows.name)
    yield from _rows_where(resumes, "the rows of a user are together", rows.name)
    yield from _rows_where(rows.ranks != expected_rank, "ranks go 1, 2, 3, … without gaps", rows.name)
    yield from _rows_where(~np.isfinite(rows.scores), "scores are finite", rows.name)
    yield from _rows_where(rises, "scores do not rise within a list", rows.name)
    yield from _rows_where(tied_wrongly, "equal scores are in ascending order of item id", rows.name)
    keys = matches.keys_R
    if len(keys) and (np.diff(np.sort(keys)) == 0).any():
        is_known = (matches.user_R >= 0) & (matches.item_R >= 0)
        yield from _rows_where(_is_repeated(keys) & is_known, "an item is once in a list", rows.name)


def history_faults(rows: Rows, matches: Matches, user_ids: pa.ChunkedArray, expected: Expected) -> Iterator[Violation]:
    """Check that no list holds an item that its user has seen and is not shown again."""
    seen_lists = expected.histories.seen("whole")
    owners = _index(expected.histories.user_ids, user_ids)[seen_lists.owners]
    seen = np.sort(matches.keys_of(owners, seen_lists.values)[owners >= 0])
    is_seen_R = _is_in_sorted(matches.keys_R, seen) & (matches.user_R >= 0)
    yield from _rows_where(is_seen_R, "the item is not one that the user has seen", rows.name)


def eligibility_faults(rows: Rows, matches: Matches, expected: Expected) -> Iterator[Violation]:
    """Check that no list holds an item that the catalogue hides tonight."""
    is_hidden_R = (matches.item_R >= 0) & ~expected.is_eligible_N[matches.item_R]
    yield from _rows_where(is_hidden_R, "the catalogue lets the item be shown", rows.name)


def rule_faults(rows: Rows, matches: Matches, user_table: pa.Table, expected: Expected) -> Iterator[Violation]:
    """Check that no row, and no list, breaks a rule of tonight."""
    known = np.flatnonzero((matches.user_R >= 0) & (matches.item_R >= 0))
    user_R, item_R = matches.user_R[known], matches.item_R[known]
    of_rows = expected.broken_rules(user_table["user_id"].combine_chunks(), user_R, item_R)
    of_lists = expected.broken_list_rules(user_table, user_R, item_R, rows.scores[known])
    for promise, is_broken in chain(of_rows, of_lists):
        wrong = np.zeros(len(matches.user_R), dtype=np.bool_)
        wrong[known[is_broken]] = True
        yield from _rows_where(wrong, promise, rows.name)


def item_column_faults(
    candidate_table: pa.Table, rows: Rows, matches: Matches, expected: Expected
) -> Iterator[Violation]:
    """Check that the published columns of items are those of the catalogue."""
    known = np.flatnonzero(matches.item_R >= 0)
    for name in expected.item_columns.column_names:
        published = candidate_table[name].combine_chunks()
        values = published.flatten() if expected.layout == "nested" else published
        values = values.take(pa.array(known))
        right = expected.item_columns[name].combine_chunks().take(pa.array(matches.item_R[known]))
        if not values.equals(right):
            pairs = zip(values.to_pylist(), right.to_pylist(), strict=True)
            wrong = np.zeros(len(matches.item_R), dtype=np.bool_)
            wrong[known] = [repr(value) != repr(its) for value, its in pairs]
            yield from _rows_where(wrong, f"{name} is that of the catalogue", rows.name)


def accounting_faults(user_table: pa.Table, matches: Matches, expected: Expected) -> Iterator[Violation]:
    """Check that each requested user has one row, whose status and numbers agree with the user's list."""
    user_ids, status = user_table["user_id"].combine_chunks(), user_table["status"].combine_chunks()
    claimed = numpy_of(user_table["num_returned"]).astype(np.int64)
    has_reason = mask_of(pc.greater(pc.utf8_length(user_table["reason"].combine_chunks()), 0))
    returned = np.bincount(matches.user_R[matches.user_R >= 0], minlength=matches.num_users)

    def name(row: int) -> str:
        return f"user {user_ids[row]}, status {status[row]}, num_returned {claimed[row]}, rows {returned[row]}"

    def is_one_of(*statuses: str) -> Bools:
        return mask_of(pc.is_in(status, pa.array(statuses, pa.string())))

    missing = expected.requested.filter(pa.array(_index(expected.requested, user_ids) < 0))
    if len(missing):
        yield Violation("every requested user is accounted for", len(missing), _first(missing))
    yield from _rows_where(_index(user_ids, expected.requested) < 0, "only requested users are accounted for", name)
    is_second_row = _is_repeated(_index(user_ids, pc.unique(user_ids)))
    yield from _rows_where(is_second_row, "a user has one accounting row", name)
    yield from _rows_where(~is_one_of(*USER_STATUSES), f"the status is one of {', '.join(USER_STATUSES)}", name)
    # Second rows are reported above; they would break this promise too.
    yield from _rows_where((returned != claimed) & ~is_second_row, "num_returned is the length of the list", name)
    yield from _rows_where(claimed > expected.k, f"a list has at most {expected.k} items", name)
    yield from _rows_where(is_one_of("ok") & (claimed != expected.k), f"ok means exactly {expected.k} items", name)
    yield from _rows_where(is_one_of("short") & (claimed >= expected.k), f"short means under {expected.k}", name)
    yield from _rows_where(is_one_of(*MUST_BE_EMPTY) & (claimed != 0), "skipped and error have no list", name)
    yield from _rows_where(is_one_of(*MUST_GIVE_A_REASON) & ~has_reason, "every status but ok has a reason", name)
    yield from certificate_faults(user_table, is_one_of(*MUST_BE_EMPTY), name)
    for column in ("num_seen_filtered", "num_rule_filtered"):
        negative = numpy_of(user_table[column]) < 0
        yield from _rows_where(negative, f"{column} is not negative", name)


def certificate_faults(user_table: pa.Table, has_no_list: Bools, name: Callable[[int], str]) -> Iterator[Violation]:
    """A gap is a size; it is 0 where the list is proven, and unknown where there is no list."""
    is_proven = mask_of(user_table["is_proven"])
    max_gap = user_table["max_gap"].combine_chunks()
    is_known, gap = mask_of(pc.is_valid(max_gap)), numpy_of(max_gap.fill_null(0.0))
    yield from _rows_where(~np.isfinite(gap) | (gap < 0), "max_gap is finite and not negative", name)
    yield from _rows_where(is_proven & (~is_known | (gap != 0)), "a proven list has a max_gap of 0", name)
    yield from _rows_where(has_no_list & (is_proven | is_known), "skipped and error prove nothing", name)


def provenance_faults(candidate_table: pa.Table, user_table: pa.Table, expected: Expected) -> Iterator[Violation]:
    """Check that every row names its night, run and model."""
    of_run = {"ds": pa.scalar(expected.ds, pa.date32()), "run_id": pa.scalar(expected.run_id)}
    of_list = of_run | {
        "surface": pa.scalar(expected.surface),
        "model_version": pa.scalar(expected.model_version),
    }
    for table, columns in ((candidate_table, of_list), (user_table, of_run)):
        for column, value in columns.items():
            wrong = mask_of(pc.not_equal(table[column].combine_chunks(), value))
            yield from _cells_where(wrong, f"{column} is {value}", table, column)
    source = candidate_table["source"].combine_chunks()
    is_fallback = pc.is_in(candidate_table["user_id"].combine_chunks(), _fallback_users(user_table))
    wrong = pc.not_equal(source, pc.if_else(is_fallback, POPULAR, MOL))
    promise = f"source is {POPULAR} for users with the status fallback, {MOL} for others"
    yield from _cells_where(mask_of(wrong), promise, candidate_table, "source")


def _fallback_users(user_table: pa.Table) -> pa.Array:
    is_fallback = pc.equal(user_table["status"], "fallback")
    return user_table["user_id"].filter(is_fallback).combine_chunks()


def schema_faults(candidate_table: pa.Table, user_table: pa.Table, expected: Expected) -> Iterator[Violation]:
    """Check the columns and their types, that nothing is null, and that both nested lists of a user are as long."""
    user_type, item_type = expected.requested.type, expected.item_ids.type
    layout = nested_candidates if expected.layout == "nested" else candidates
    of_lists = layout(user_type, item_type, list(expected.item_columns.schema))
    for name, table, schema in (("candidates", candidate_table, of_lists), ("users", user_table, users(user_type))):
        if not table.schema.equals(schema):
            wrong = sorted(set(map(str, schema)) ^ set(map(str, table.schema)))
            yield Violation(f"{name} has the columns of its schema", 1, (", ".join(wrong) or "other order or nulls",))
            continue
        for column in schema.names:
            nulls = table[column].null_count
            values = table[column].combine_chunks()
            if pa.types.is_list(values.type) and not values.type.value_field.nullable:
                nulls += values.flatten().null_count
            if nulls and not schema.field(column).nullable:
                yield Violation(f"{name}.{column} has no nulls", nulls, ())
    if expected.layout == "nested" and candidate_table.schema.equals(of_lists):
        names = ["item_ids", "scores", *expected.item_columns.column_names]
        lengths = [numpy_of(candidate_table[name].combine_chunks().value_lengths()) for name in names]
        wrong = np.any([length != lengths[0] for length in lengths], axis=0)
        yield from _cells_where(wrong, f"{' and '.join(names)} are as long", candidate_table, "user_id")


def _rows_where(wrong: Bools, promise: str, name: Callable[[int], str]) -> Iterator[Violation]:
    rows = np.flatnonzero(wrong)
    if len(rows):
        yield Violation(promise, len(rows), tuple(name(int(row)) for row in rows[:MAX_EXAMPLES]))


def _cells_where(wrong: Bools, promise: str, table: pa.Table, column: str) -> Iterator[Violation]:
    yield from _rows_where(wrong, promise, lambda row: f"user {table['user_id'][row]}, {column} {table[column][row]}")


def _index(values: pa.Array, known: pa.Array | pa.ChunkedArray) -> Ints:
    """The position of each value in `known`, -1 for an unknown value."""
    value_set = known.combine_chunks() if isinstance(known, pa.ChunkedArray) else known
    return numpy_of(pc.fill_null(pc.index_in(values, value_set), -1)).astype(np.int64)


def _is_in_sorted(values: Ints, ascending: Ints) -> Bools:
    """Whether each value is in `ascending`. Far faster than np.isin, because the values come user by user."""
    if not len(ascending):
        return np.zeros(len(values), dtype=np.bool_)
    positions = np.searchsorted(ascending, values)
    return np.asarray(ascending[np.minimum(positions, len(ascending) - 1)] == values)


def _is_repeated(values: Ints) -> Bools:
    """Whether each value occurs earlier in the array."""
    repeated = np.ones(len(values), dtype=np.bool_)
    repeated[np.unique(values, return_index=True)[1]] = False
    return repeated


def _first(values: pa.Array) -> tuple[str, ...]:
    return tuple(f"user {value}" for value in values[:MAX_EXAMPLES])


@dataclass(frozen=True)
class UnitAudit:
    """The audit of one unit; `num_rows` counts user-item pairs in either layout."""

    num_rows: int
    num_users: int
    statuses: dict[str, int]
    violations: tuple[Violation, ...]


def audit_unit(candidate_table: pa.Table, user_table: pa.Table, expected: Expected) -> UnitAudit:
    """Check every row of a unit against every promise."""
    wrong = [*schema_faults(candidate_table, user_table, expected)]
    if wrong:  # the other checks need the columns of the schema
        return UnitAudit(candidate_table.num_rows, user_table.num_rows, {}, tuple(wrong))
    rows = flatten(candidate_table) if expected.layout == "nested" else Rows.of(candidate_table)
    matches = Matches.of(rows, user_table["user_id"], expected.item_ids)
    violations = [
        *list_faults(rows, matches),
        *history_faults(rows, matches, user_table["user_id"], expected),
        *eligibility_faults(rows, matches, expected),
        *rule_faults(rows, matches, user_table, expected),
        *item_column_faults(candidate_table, rows, matches, expected),
        *accounting_faults(user_table, matches, expected),
        *provenance_faults(candidate_table, user_table, expected),
    ]
    statuses = {entry["values"]: entry["counts"] for entry in pc.value_counts(user_table["status"]).to_pylist()}
    return UnitAudit(len(rows.scores), user_table.num_rows, statuses, tuple(violations))


def require_sound(audit: UnitAudit, origin: str) -> None:
    """Raise InvalidRunError with every broken promise and its first rows; `origin` names the unit's files."""
    if audit.violations:
        lines = "\n".join(f"  {violation}" for violation in audit.violations)
        raise InvalidRunError(f"{origin}: nothing is published, because these rows break our promises:\n{lines}")
