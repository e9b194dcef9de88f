"""What tonight's conditions and block lists say of each user: read from the queries table and the block lists.

Shapes: N items, R users, G groups of users.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.data.columns import Mask, mask_of, numpy_of
from pipeline.data.histories import user_bucket
from pipeline.data.ids import rows_among
from pipeline.data.lists import Int64, Lists, offsets_of
from pipeline.data.predicates import (
    Condition,
    Conjunct,
    check_condition,
    common_type,
    holds_for_items,
    holds_for_pairs,
    naive_utc,
    parse_condition,
)
from pipeline.errors import InputError
from pipeline.io.histories import read_bucket, read_items
from pipeline.io.inputs import Blocks, read_attributes, read_blocks
from pipeline.io.night import Night
from pipeline.settings import Settings
from pipeline.stages.query_batch import UserRules

# Columns of the groups beside the query's own: whether the queries table has these users, and whether it says nothing
# in a column that an item's must differ from.
HAS_ROW, SAYS_NOTHING = "has a row", "says nothing"


@dataclass(frozen=True)
class NightRules:
    """The conditions and block lists of a night, and the tables that they read."""

    conditions: tuple[Condition, ...]
    item_ids: pa.Array  # (N,)
    items: pl.DataFrame  # (N,): the columns that conditions read
    is_eligible_N: Mask  # what the catalogue lets be shown
    blocks: tuple[Blocks, ...]

    @staticmethod
    def read(night: Night, settings: Settings) -> "NightRules":
        """Read all of it. Raises InputError when the histories are not prepared yet, for a condition that is no SQL,
        and for a table that cannot be read."""
        conditions = parse_conditions(night, settings)
        used = dict.fromkeys(name for condition in conditions for name in condition.whole.item_columns)
        table = read_items(night.storage, night.histories, list(dict.fromkeys(["item_id", "is_eligible", *used])))
        item_ids = table["item_id"].combine_chunks()
        blocks: tuple[Blocks, ...] = ()
        if night.inputs.blocks:
            user_type = read_bucket(night.storage, night.histories, 0).user_ids.type
            tables, log = night.inputs.blocks, night.inputs.log
            blocks = tuple(read_blocks(name, files, user_type, item_ids.type, log, night.ds) for name, files in tables)
        return NightRules(
            conditions,
            item_ids,
            naive_utc(pl.DataFrame(pl.from_arrow(table.select(list(used))))),
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


class UserRulesSource:
    """Tells the rules of users, bucket by bucket. Its tables stay in memory."""

    def __init__(self, night: Night, settings: Settings) -> None:
        self._rules = NightRules.read(night, settings)
        self._num_buckets = settings.output.num_buckets
        self._attributes = Attributes.read(night, self._rules.conditions, self._num_buckets)

    def __call__(self, unit: int, user_ids: pa.Array) -> UserRules | None:
        """The rules of some users of bucket number `unit`; None when no rule reads the query or names a user."""
        if not self._rules.are_of_users:
            return None
        attributes = self._attributes.of(unit, user_ids).with_columns(
            pl.any_horizontal(pl.lit(False), *(pl.col(name).is_null() for name in self._rules.differing_columns)).alias(
                SAYS_NOTHING
            )
        )
        columns = [HAS_ROW, SAYS_NOTHING, *self._rules.group_columns]
        groups = attributes.select(columns).unique(maintain_order=True)
        numbered = attributes.select(columns).join(
            groups.with_row_index("group"), on=columns, how="left", nulls_equal=True, maintain_order="left"
        )
        blocked = Lists.empty(len(user_ids))
        for block in self._blocks:
            blocked = blocked.union(block.of(unit, user_ids))
        for condition in self._rules.conditions:
            for differing in condition.differs:
                values = self._rules.items[differing.item_column], attributes[differing.query_column]
                blocked = blocked.union(equal_items(*values))
        return UserRules(groups.to_arrow(), numbered["group"].to_numpy().astype(np.int64), blocked)

    @cached_property
    def _blocks(self) -> "list[BlockedPairs]":
        return [
            BlockedPairs.in_buckets(block, self._rules.item_ids, self._num_buckets)
            for block in self._rules.blocks
            if block.user_ids is not None
        ]


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


@dataclass(frozen=True)
class BlockedPairs:
    """The items that a block list hides from single users, in order of user."""

    users: ByBucket
    lists: Lists

    @staticmethod
    def in_buckets(block: Blocks, item_ids: pa.Array, num_buckets: int) -> "BlockedPairs":
        """Items and users that the night does not know are left out."""
        assert block.user_ids is not None
        rows = rows_among(block.item_ids, item_ids)
        encoded = block.user_ids.dictionary_encode()
        users = numpy_of(encoded.indices).astype(np.int64)
        order = np.argsort(users, kind="stable")
        order = order[rows[order] >= 0]
        lengths = np.bincount(users[order], minlength=len(encoded.dictionary)).astype(np.int64)
        lists = Lists(offsets_of(lengths), rows[order].astype(np.int32)).distinct()
        return BlockedPairs(ByBucket.of(encoded.dictionary, num_buckets), lists)

    def of(self, unit: int, user_ids: pa.Array) -> Lists:
        """(R,) the blocked items of users of bucket `unit`."""
        return self.lists.take(self.users.places_of(unit, user_ids))


def equal_items(values_N: pl.Series, values_R: pl.Series) -> Lists:
    """(R,) for each value, the rows of the items that have the same; a null is equal to nothing."""
    kind = common_type(values_N.dtype, values_R.dtype)
    items = pl.DataFrame({"value": values_N.cast(kind)}).with_row_index("row").drop_nulls()
    rows = items.group_by("value").agg("row")
    found = pl.DataFrame({"value": values_R.cast(kind)}).join(rows, on="value", how="left", maintain_order="left")
    return Lists.of(found["row"].fill_null([]).to_list())


def parse_conditions(night: Night, settings: Settings) -> tuple[Condition, ...]:
    """Parse `rules.show_if`. Raises InputError for a condition that is no SQL, or more than a condition may be."""
    return tuple(
        parse_condition(f"rules.show_if.{name}", sql, night.ds) for name, sql in settings.rules.show_if.items()
    )


def check_rules(night: Night, settings: Settings) -> None:
    """Raise InputError for rules that tonight's tables do not fit: a column that is not there, types that cannot be
    compared, more groups of users than `rules.max_groups`, and when nothing is left that may be shown to anybody."""
    if not settings.rules.are_there:
        return
    conditions = parse_conditions(night, settings)
    item_schema = read_items(night.storage, night.histories).slice(0, 0).drop_columns(["is_eligible"])
    user_type = read_bucket(night.storage, night.histories, 0).user_ids.type
    no_queries = "; there is no queries table: set queries.uri" if night.inputs.queries is None else ""
    query_schema = pa.table({"user_id": pa.array([], user_type)})
    used = {name for condition in conditions for name in condition.whole.query_columns}
    if night.inputs.queries is not None and used - {"user_id"}:
        declared = night.inputs.log.source.user_id_type
        query_schema = read_attributes(night.inputs.queries, None, user_type, declared).slice(0, 0)
    items, queries = (naive_utc(pl.DataFrame(pl.from_arrow(table))) for table in (item_schema, query_schema))
    for condition in conditions:
        check_condition(condition, items.schema, queries.schema, no_queries)
    rules = NightRules.read(night, settings)
    if not rules.shown_to_anybody_N.any():
        names = [f"show_if.{name}" for name in settings.rules.show_if] + [
            f"block.{name}" for name in settings.rules.block
        ]
        raise InputError(f"rules ({', '.join(names)}): no item is left that may be shown to anybody; see each in turn")
    _check_groups(night, settings, rules)


def _check_groups(night: Night, settings: Settings, rules: NightRules) -> None:
    attributes = Attributes.read(night, rules.conditions, settings.output.num_buckets)
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


class RowRules:
    """Judges published rows one by one, to check what the masks and lists of the search have made of the rules."""

    def __init__(self, night: Night, settings: Settings) -> None:
        self._rules = NightRules.read(night, settings)
        self._attributes = Attributes.read(night, self._rules.conditions, settings.output.num_buckets)

    def broken(self, unit: int, user_ids: pa.Array, user_R: Int64, item_R: Int64) -> Iterator[tuple[str, Mask]]:
        """For each rule a promise in words, and whether a row breaks it: row r is of user `user_ids[user_R[r]]`, of
        bucket `unit`, with item row `item_R[r]`."""
        users = self._attributes.of(unit, user_ids)
        queries = users.select(pl.all().gather(user_R))
        items = self._rules.items.select(pl.all().gather(item_R))
        for condition in self._rules.conditions:
            yield f"{condition.name} holds", ~holds_for_pairs(condition, items, queries, len(item_R))
        published = pl.DataFrame({"user": user_R, "item": item_R})
        for block in self._rules.blocks:
            blocked = {"item": rows_among(block.item_ids, self._rules.item_ids)}
            if block.user_ids is not None:
                blocked["user"] = rows_among(block.user_ids, user_ids)
            known = pl.DataFrame(blocked).filter(pl.all_horizontal(pl.all() >= 0)).unique()
            is_blocked = published.with_row_index("row").join(known, on=list(blocked), how="semi")["row"].to_numpy()
            mask = np.zeros(len(item_R), dtype=bool)
            mask[is_blocked] = True
            yield f"rules.block.{block.name} does not block the item", mask
