"""Tonight's rules: what a user has seen, what the catalogue hides from everybody, and the bonuses of single items."""

import numpy as np
import torch

from pipeline.data.lists import Int64, Lists
from pipeline.io.histories import read_eligible
from pipeline.io.night import Night
from pipeline.retrieval.bonuses import Bonuses
from pipeline.retrieval.filters import Eligibility, Rules


class TonightsRules:
    """The rules of a night, for any batch of its queries. Raises InputError when the night is not prepared yet."""

    def __init__(self, night: Night) -> None:
        self.is_eligible_N = read_eligible(night.storage, night.histories)
        self._num_hidden = int((~self.is_eligible_N).sum())

    def for_queries(self, excluded: Lists, bonuses: Bonuses | None) -> Rules:
        """The rules for queries whose users have seen the item rows `excluded`, with their bonuses; (B,)."""
        if not self._num_hidden:
            return Rules(excluded, bonuses=bonuses)
        of_all_1N = torch.from_numpy(self.is_eligible_N)[None, :]
        return Rules(excluded, Eligibility(of_all_1N, np.zeros(len(excluded), dtype=np.int64)), bonuses)

    def num_hidden(self, excluded: Lists) -> Int64:
        """The number of unseen items that the catalogue hides from each query's user; `excluded` as above, distinct."""
        is_hidden = ~self.is_eligible_N[excluded.values]
        seen_hidden_B = np.bincount(excluded.owners, weights=is_hidden, minlength=len(excluded))
        return self._num_hidden - seen_hidden_B.astype(np.int64)
