"""The input of a query: a user's events and key. Text can stand beside the events later.

Shapes: B queries, L positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.data.lists import Columns, EventColumn, Int32, Lists


@dataclass(frozen=True)
class Events:
    """Event sequences, oldest event first, padded with item row -1 at the right.

    `columns` holds what the encoder reads besides the items, (B, L) each: times in microseconds since 1970, weights as
    the log's source gives them.
    """

    item_rows_BL: Tensor
    columns: Mapping[EventColumn, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(item_rows_BL: Int32, columns: Columns, device: torch.device) -> "Events":
        """The events of these arrays, on the device."""
        tensors = {name: torch.from_numpy(column).to(device) for name, column in columns.items()}
        return Events(torch.from_numpy(item_rows_BL).to(device, torch.int64), tensors)

    @staticmethod
    def last(histories: Lists, max_length: int, device: torch.device) -> "Events":
        """The last events of each history, at most `max_length`, with the columns that the histories have."""
        item_rows_BL, _ = histories.last(max_length)
        return Events.of(item_rows_BL, histories.last_columns(max_length), device)

    @property
    def is_event_BL(self) -> Tensor:
        return self.item_rows_BL >= 0

    @property
    def lengths_B(self) -> Tensor:
        """(B,) int64 numbers of events."""
        return self.is_event_BL.sum(dim=1)


@dataclass(frozen=True)
class QueryInput:
    """One query per user: the user's events, and a key (any int64) that chooses a row of the user table."""

    events: Events
    user_keys_B: Tensor
