"""Tonight's rules: what a user has seen, what the catalogue, conditions and block lists hide, the bonuses of single
items, and the items that a model which was taken over does not know.

Shapes: N items of the index, B queries, U users, G groups of users.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.data.columns import Mask
from pipeline.data.lists import NO_ITEM, Int64, Lists
from pipeline.data.predicates import Conjunct, holds_for_items
from pipeline.io.checkpoint import load_config
from pipeline.io.night import Night
from pipeline.retrieval.bonuses import Bonuses
from pipeline.retrieval.filters import Eligibility, Rules
from pipeline.settings import Settings
from pipeline.stages.night_rules import HAS_ROW, NightRules
from pipeline.stages.query_batch import UserRules
from pipeline.stages.user_rules import SAYS_NOTHING

KEPT_BYTES = 256_000_000  # of masks, eight items a byte, that a process keeps


class TonightsRules:
    """The rules of a night, for any batch of its queries.

    With `rows`, the items of one shard, conditions that read the query are evaluated for these items alone; they hide
    all others. Raises InputError when the night is not prepared yet, or has no model yet that was to be taken over.
    """

    def __init__(self, night: Night, settings: Settings, rows: range | None = None) -> None:
        rules = NightRules.read(night, settings, has_users=False)  # batches bring what is hidden from single users
        self.is_eligible_N = rules.shown_to_anybody_N
        evaluated = range(len(self.is_eligible_N)) if rows is None else rows
        self._masks = GroupMasks(rules.items, rules.parts(of_query=True), self.is_eligible_N, evaluated)
        self._has_groups = bool(self._masks.parts or rules.differing_columns)
        self._needs_bonus_N = needs_bonus(night)

    def for_queries(self, excluded: Lists, bonuses: Bonuses | None, of_users: UserRules | None = None) -> Rules:
        """The rules for queries whose users have seen the item rows `excluded`, with their bonuses; (B,) all three."""
        hidden = excluded if of_users is None else excluded.union(of_users.blocked)
        if of_users is not None and self._has_groups:
            masks = _OfGroups(self._masks, of_users.groups)
            return Rules(hidden, Eligibility(masks, of_users.group_of_U), bonuses, self._needs_bonus_N)
        if self.is_eligible_N.all():
            return Rules(hidden, None, bonuses, self._needs_bonus_N)
        of_all_1N = torch.from_numpy(self.is_eligible_N)[None, :]
        of_all = Eligibility(of_all_1N, np.zeros(len(excluded), dtype=np.int64))
        return Rules(hidden, of_all, bonuses, self._needs_bonus_N)

    def by_group(self, num_users: int, of_users: UserRules | None) -> Iterator[tuple[Int64, Mask]]:
        """The users of each group, as places among the `num_users`, and the (N,) items that the group may be shown."""
        if of_users is None or not self._has_groups:
            yield np.arange(num_users), self.is_eligible_N
            return
        for group in np.unique(of_users.group_of_U):
            yield np.flatnonzero(of_users.group_of_U == group), self._masks.of(of_users.groups, int(group))

    def rank(
        self, seen: Lists, of_users: UserRules | None, k: int, ranking: Callable[[Int64, Lists, Mask], Int64]
    ) -> Int64:
        """(U, k) item rows of a ranking that gets, for the users of each group, their places, what is hidden from each
        of them (`seen` and what rules block), and the (N,) items that they may be shown."""
        hidden = seen if of_users is None else seen.union(of_users.blocked)
        rows_UK = np.full((len(seen), k), NO_ITEM, dtype=np.int64)
        for users, is_shown_N in self.by_group(len(seen), of_users):
            rows_UK[users] = ranking(users, hidden.take(users), is_shown_N)
        return rows_UK

    def num_hidden(self, excluded: Lists, bonuses: Bonuses | None, of_users: UserRules | None = None) -> Int64:
        """The number of items, not seen, that are hidden from each query's user; as above, `excluded` distinct.

        A rule hides an item, or the model does not know it and the query has no bonus for it.
        """
        return self._count_hidden(excluded, of_users, self._needs_bonus_N, bonuses)

    def num_not_eligible(self, excluded: Lists, of_users: UserRules | None = None) -> Int64:
        """(U,): the number of items, not among the distinct `excluded` ones, that a rule hides from each user."""
        return self._count_hidden(excluded, of_users, None, None)

    def _count_hidden(
        self, excluded: Lists, of_users: UserRules | None, needs_bonus_N: Tensor | None, bonuses: Bonuses | None
    ) -> Int64:
        blocked = Lists.empty(len(excluded)) if of_users is None else of_users.blocked.minus(excluded)
        found = np.zeros(len(excluded), dtype=np.int64)
        for users, is_shown_N in self.by_group(len(excluded), of_users):
            is_hidden_N, apart = ~is_shown_N, excluded.take(users)
            if needs_bonus_N is not None:
                is_hidden_N |= needs_bonus_N.numpy()
                if bonuses is not None:
                    rows = bonuses.take(users).rows
                    apart = apart.union(rows.where(is_shown_N[rows.values]))
            of_each = blocked.take(users)
            is_counted = is_hidden_N[of_each.values] & ~of_each.is_in(apart)
            found[users] = _num_outside(is_hidden_N, apart) + of_each.where(~is_counted).lengths
        return found


@dataclass(frozen=True)
class _OfGroups:
    """The masks of some groups, as `Eligibility` asks for them."""

    masks: "GroupMasks"
    groups: pa.Table

    def __getitem__(self, group: int, /) -> Tensor:
        return torch.from_numpy(self.masks.of(self.groups, group))


class GroupMasks:
    """The items that a group of users may be shown: evaluated when asked for, part by part, and kept as bits."""

    def __init__(self, items: pl.DataFrame, parts: Sequence[Conjunct], shown_to_anybody_N: Mask, rows: range) -> None:
        self.parts = parts
        self._items = items.slice(rows.start, len(rows))
        self._shown_to_anybody_N, self._rows = shown_to_anybody_N, rows
        self._kept: OrderedDict[tuple[int, str], npt.NDArray[np.uint8]] = OrderedDict()
        self._max_kept = max(1, KEPT_BYTES // max(1, len(rows) // 8))

    def of(self, groups: pa.Table, group: int) -> Mask:
        """(N,) the items that row `group` of `groups` may be shown; none outside the rows that this was made for."""
        values = {name: pl.Series(pl.from_arrow(groups[name].slice(group, 1))) for name in groups.column_names}
        is_shown_N = np.zeros(len(self._shown_to_anybody_N), dtype=bool)
        within = slice(self._rows.start, self._rows.stop)
        is_shown_N[within] = self._shown_to_anybody_N[within]
        if values[HAS_ROW][0]:  # else nothing is known of these users, of whom evaluations may have some
            is_shown_N &= not values[SAYS_NOTHING][0]
            for number, part in enumerate(self.parts):
                is_shown_N[within] &= self._holds(number, part, values)
        return is_shown_N

    def _holds(self, number: int, part: Conjunct, values: dict[str, pl.Series]) -> Mask:
        query = {name: values[name] for name in part.query_columns}
        key = (number, repr([series.to_list() for series in query.values()]))
        if key in self._kept:
            self._kept.move_to_end(key)
            return np.unpackbits(self._kept[key], count=len(self._rows)).astype(bool)
        found = holds_for_items(part, self._items, query)
        self._kept[key] = np.packbits(found)
        if len(self._kept) > self._max_kept:
            self._kept.popitem(last=False)
        return found


def _num_outside(is_hidden_N: Mask, lists: Lists) -> Int64:
    """The number of hidden items that are not in each list of distinct items."""
    inside = np.bincount(lists.owners, weights=is_hidden_N[lists.values], minlength=len(lists))
    return int(is_hidden_N.sum()) - inside.astype(np.int64)


def needs_bonus(night: Night) -> Tensor | None:
    """(N,) bool: the items that tonight's model, which was taken over, does not know; None when it knows all.

    Its scores of them would mean nothing. They are shown only where counts speak for them.
    """
    config = load_config(night.storage, night.checkpoint) if night.taken_over else None
    if config is None or not config.unknown_rows:
        return None
    needs_bonus_N = torch.zeros(config.num_items, dtype=torch.bool)
    needs_bonus_N[list(config.unknown_rows)] = True
    return needs_bonus_N
