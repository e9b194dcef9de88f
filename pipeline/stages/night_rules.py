"""Tonight's conditions and block lists, the columns of items and queries that they read, and whether these fit.

Shapes: N items, R users.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.data.columns import Mask, mask_of
from pipeline.data.histories import user_bucket
from pipeline.data.ids import rows_among
from pipeline.data.lists import Int64
from pipeline.data.predicates import (
    Condition,
    Conjunct,
    check_columns,
    check_types,
    holds_for_items,
    naive_utc,
    parse_condition,
)
from pipeline.errors import InputError
from pipeline.io.histories import read_bucket, read_items
from pipeline.io.night import Night
from pipeline.io.rule_tables import Blocks, attribute_names, names_users, read_attributes, read_blocks
from pipeline.settings import Settings

HAS_ROW = "has a row"  # of the attributes: whether the queries table has this user; no column can have this name


def parse_conditions(night: Night, settings: Settings) -> tuple[Condition, ...]:
    """Parse `rules.show_if`. Raises InputError for a condition that is no SQL, or more than a condition may be."""
    return tuple(
        parse_condition(f"rules.show_if.{name}", sql, night.ds) for name, sql in settings.rules.show_if.items()
    )


@dataclass(frozen=True)
class NightRules:
    """The conditions and block lists of a night, and the tables that they read."""

    conditions: tuple[Condition, ...]
    item_ids: pa.Array  # (N,)
    items: pl.DataFrame  # (N,): `item_id` and the columns that conditions read
    is_eligible_N: Mask  # what the catalogue lets be shown
    blocks: tuple[Blocks, ...]

    @staticmethod
    def read(night: Night, settings: Settings, has_users: bool = True) -> "NightRules":
        """Read all of it, or without `has_users` all but the block lists of single users.

        Raises InputError when the histories are not prepared yet, for a condition that is no SQL, and for a table that
        cannot be read.
        """
        conditions = parse_conditions(night, settings)
        used = dict.fromkeys(name for condition in conditions for name in condition.whole.item_columns)
        columns = list(dict.fromkeys(["item_id", *used]))
        table = read_items(night.storage, night.histories, ["is_eligible", *columns])
        item_ids = table["item_id"].combine_chunks()
        blocks: tuple[Blocks, ...] = ()
        if night.inputs.blocks:
            user_type = read_bucket(night.storage, night.histories, 0).user_ids.type
            tables, log = night.inputs.blocks, night.inputs.log
            blocks = tuple(
                read_blocks(name, files, user_type, item_ids.type, log, night.ds)
                for name, files in tables
                if has_users or not names_users(files)
            )
        return NightRules(
            conditions,
            item_ids,
            naive_utc(pl.DataFrame(pl.from_arrow(table.select(columns)))),
            mask_of(table["is_eligible"]),
            blocks,
        )

    def parts(self, *, of_query: bool) -> tuple[Conjunct, ...]:
        """The parts of all conditions that read a query's columns, or that do not."""
        return tuple(part for c in self.conditions for part in c.parts if bool(part.query_columns) == of_query)

    @property
    def group_columns(self) -> tuple[str, ...]:
        """The query columns that make groups of users."""
        return tuple(dict.fromkeys(name for part in self.parts(of_query=True) for name in part.query_columns))

    @property
    def differing_columns(self) -> tuple[str, ...]:
        """The query columns that an item's column must differ from."""
        return tuple(dict.fromkeys(differs.query_column for c in self.conditions for differs in c.differs))

    @property
    def are_of_users(self) -> bool:
        """Whether a rule reads the query or names a user."""
        reads_query = self.parts(of_query=True) or self.differing_columns
        return bool(reads_query) or any(block.user_ids is not None for block in self.blocks)

    @cached_property
    def shown_to_anybody_N(self) -> Mask:
        """(N,) whether the items may be shown as far as the catalogue, block lists without users and parts of
        conditions without a query say."""
        is_shown_N = self.is_eligible_N.copy()
        for block in self.blocks:
            if block.user_ids is None:
                rows = rows_among(block.item_ids, self.item_ids)
                is_shown_N[rows[rows >= 0]] = False
        for part in self.parts(of_query=False):
            is_shown_N &= holds_for_items(part, self.items, {})
        return is_shown_N


@dataclass(frozen=True)
class ByBucket:
    """Some distinct users by bucket, so that those of a bucket are found among few."""

    user_ids: pa.Array  # in order of bucket
    places: Int64  # the place of each in the array that was given
    bounds: Int64  # bucket b is at bounds[b]:bounds[b + 1]

    @staticmethod
    def of(user_ids: pa.Array, num_buckets: int) -> "ByBucket":
        buckets = user_bucket(user_ids, num_buckets)
        places = np.argsort(buckets, kind="stable")
        bounds = np.searchsorted(buckets[places], np.arange(num_buckets + 1))
        return ByBucket(user_ids.take(pa.array(places)), places, bounds)

    def places_of(self, unit: int, user_ids: pa.Array) -> Int64:
        """(R,) the places of users of bucket `unit`, -1 for a user who is not there."""
        low, high = int(self.bounds[unit]), int(self.bounds[unit + 1])
        found = rows_among(user_ids, self.user_ids.slice(low, high - low))
        return np.where(found >= 0, self.places[np.minimum(low + found, len(self.places) - 1)], -1) if high else found


@dataclass(frozen=True)
class Attributes:
    """The columns of the queries table that conditions read, a row per user."""

    users: ByBucket | None  # None: nothing is read of a queries table
    values: pl.DataFrame

    @staticmethod
    def read(night: Night, conditions: Sequence[Condition], num_buckets: int) -> "Attributes":
        """Raises InputError for a table that cannot be read."""
        used = dict.fromkeys(name for c in conditions for name in c.whole.query_columns if name != "user_id")
        if not used or night.inputs.queries is None:
            return Attributes(None, pl.DataFrame())
        user_type = read_bucket(night.storage, night.histories, 0).user_ids.type
        declared = night.inputs.log.source.user_id_type
        table = read_attributes(night.inputs.queries, list(used), user_type, declared)
        values = naive_utc(pl.DataFrame(pl.from_arrow(table.select(list(used)))))
        return Attributes(ByBucket.of(table["user_id"].combine_chunks(), num_buckets), values)

    def of(self, unit: int, user_ids: pa.Array) -> pl.DataFrame:
        """The attributes of these users, `user_id` among them, and whether they have a row; null without one."""
        own = pl.DataFrame({"user_id": pl.Series(pl.from_arrow(user_ids))})
        if self.users is None:
            return own.with_columns(pl.lit(True).alias(HAS_ROW))
        places = pl.Series(self.users.places_of(unit, user_ids), dtype=pl.Int64)
        has_row = places >= 0
        values = self.values.select(pl.all().gather(places.set(~has_row, None)))
        return own.hstack(values).with_columns(has_row.alias(HAS_ROW))


def check_rules(night: Night, settings: Settings) -> None:
    """Raise InputError for rules that tonight's tables do not fit: a column that is not there, types that cannot be
    compared, more groups of users than `rules.max_groups`, and when nothing is left that may be shown to anybody."""
    if not settings.rules.are_there:
        return
    conditions = parse_conditions(night, settings)
    item_names = [name for name in read_items(night.storage, night.histories).column_names if name != "is_eligible"]
    query_names = ["user_id", *(attribute_names(night.inputs.queries) if night.inputs.queries else [])]
    no_queries = "" if night.inputs.queries else "; there is no queries table: set queries.uri"
    for condition in conditions:
        check_columns(condition, item_names, query_names, no_queries)
    rules = NightRules.read(night, settings)
    attributes = Attributes.read(night, conditions, settings.output.num_buckets)
    user_type = read_bucket(night.storage, night.histories, 0).user_ids.type
    of_no_user = attributes.of(0, pa.array([], user_type))
    for condition in conditions:
        check_types(condition, rules.items.schema, of_no_user.schema)
    if not rules.shown_to_anybody_N.any():
        names = [f"show_if.{name}" for name in settings.rules.show_if]
        names += [f"block.{name}" for name in settings.rules.block]
        raise InputError(f"rules ({', '.join(names)}): no item is left that may be shown to anybody; see each in turn")
    _check_groups(night, settings, rules, attributes)


def _check_groups(night: Night, settings: Settings, rules: NightRules, attributes: Attributes) -> None:
    columns = list(rules.group_columns)
    num_groups = 0
    if "user_id" in columns:
        units = range(settings.output.num_buckets)
        num_groups = sum(read_bucket(night.storage, night.histories, unit).num_users for unit in units)
    elif columns:
        num_groups = attributes.values.select(columns).n_unique()
    if num_groups > settings.rules.max_groups:
        raise InputError(
            f"rules.show_if compares {', '.join(f'query.{name}' for name in columns)}, which have {num_groups:,} "
            f"different values together, and each needs a mask over all items; compare columns with fewer values "
            f"(item.x <> query.y by itself needs no mask), or raise rules.max_groups ({settings.rules.max_groups:,})"
        )
