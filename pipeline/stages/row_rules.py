"""Judging published rows by tonight's rules, one by one: the check of what the search has made of the rules.

Shapes: R rows, each of a user and an item.
"""

from collections.abc import Iterator

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.data.columns import Mask
from pipeline.data.ids import rows_among
from pipeline.data.lists import Int64
from pipeline.data.predicates import holds_for_pairs
from pipeline.io.night import Night
from pipeline.settings import Settings
from pipeline.stages.night_rules import Attributes, NightRules


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
