"""What tonight's rules say of each user: the group that they are in, and the items that are hidden from them alone.

Shapes: N items, R users, G groups of users.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.data.columns import numpy_of
from pipeline.data.ids import rows_among
from pipeline.data.lists import Lists, offsets_of
from pipeline.data.predicates import common_type
from pipeline.io.night import Night
from pipeline.io.rule_tables import Blocks
from pipeline.settings import Settings
from pipeline.stages.night_rules import HAS_ROW, Attributes, ByBucket, NightRules
from pipeline.stages.query_batch import UserRules

SAYS_NOTHING = "says nothing"  # of a group: whether a query column that an item's must differ from is null


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
    lengths = found["row"].list.len().fill_null(0).to_numpy().astype(np.int64)
    return Lists(offsets_of(lengths), found["row"].drop_nulls().explode().to_numpy().astype(np.int32))
