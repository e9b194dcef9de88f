"""Tonight's rules: what a user has seen, what the catalogue hides from everybody, the bonuses of single items, and the
items that a model which was taken over does not know."""

import numpy as np
import torch
from torch import Tensor

from pipeline.data.columns import Mask
from pipeline.data.lists import Int64, Lists
from pipeline.io.checkpoint import load_config
from pipeline.io.histories import read_eligible
from pipeline.io.night import Night
from pipeline.retrieval.bonuses import Bonuses
from pipeline.retrieval.filters import Eligibility, Rules


class TonightsRules:
    """The rules of a night, for any batch of its queries. Raises InputError when the night is not prepared yet, or has
    no model yet that was to be taken over."""

    def __init__(self, night: Night) -> None:
        self.is_eligible_N = read_eligible(night.storage, night.histories)
        self._needs_bonus_N = needs_bonus(night)
        self._is_hidden_N = ~self.is_eligible_N  # from a query without bonuses
        if self._needs_bonus_N is not None:
            self._is_hidden_N |= self._needs_bonus_N.numpy()

    def for_queries(self, excluded: Lists, bonuses: Bonuses | None) -> Rules:
        """The rules for queries whose users have seen the item rows `excluded`, with their bonuses; (B,)."""
        if self.is_eligible_N.all():
            return Rules(excluded, None, bonuses, self._needs_bonus_N)
        of_all_1N = torch.from_numpy(self.is_eligible_N)[None, :]
        of_all = Eligibility(of_all_1N, np.zeros(len(excluded), dtype=np.int64))
        return Rules(excluded, of_all, bonuses, self._needs_bonus_N)

    def num_hidden(self, excluded: Lists, bonuses: Bonuses | None) -> Int64:
        """The number of items, not seen, that a rule hides from each query's user; both as above, `excluded` distinct.

        The catalogue hides an item, or the model does not know it and the query has no bonus for it.
        """
        not_counted = excluded
        if self._needs_bonus_N is not None and bonuses is not None:
            not_counted = excluded.union(bonuses.rows.where(self.is_eligible_N[bonuses.rows.values]))
        return _num_outside(self._is_hidden_N, not_counted)

    def num_not_eligible(self, excluded: Lists) -> Int64:
        """(C,): the number of items, not among the distinct `excluded` ones, that the catalogue hides."""
        return _num_outside(~self.is_eligible_N, excluded)


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
