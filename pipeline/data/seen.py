"""Which of a user's own events hide their items from the user: what somebody has seen is not shown again, unless the
rule lets it back."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.columns import Mask, mask_of
from pipeline.data.lists import Int64
from pipeline.settings import PrepareSettings

# The parts of a history that a step may see (`Bucket.cut`). Their lists are made at different times, so an event may
# hide its item in one part and not in another: bit i of its code stands for part i.
PARTS = ("train", "before_test", "whole")
IN_ALL_PARTS = (1 << len(PARTS)) - 1

OF_TYPE = "of_type:"  # begins the count of the log's events of a type of `prepare.seen_event_types`

Codes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class SeenRule:
    """An event hides its item if it is of one of these types and of these last days."""

    event_types: tuple[str, ...] | None = None  # None: any type
    days: int | None = None  # before the lists are made; None: any time

    @classmethod
    def of(cls, settings: PrepareSettings) -> "SeenRule":
        return cls(settings.seen_event_types, settings.seen_lookback_days)

    def has_type(self, event_types: pa.ChunkedArray) -> Mask:
        """Whether events of these types hide their items."""
        if self.event_types is None:
            return np.ones(len(event_types), dtype=bool)
        return mask_of(pc.is_in(event_types, pa.array(self.event_types, pa.string())))


def hiding_codes(has_type: Mask, times: Int64, since: Sequence[Int64 | int]) -> Codes:
    """The code of each event, given its time and, for each of PARTS, the time (of all or of each) since when events
    hide their items in that part."""
    codes = np.zeros(len(times), np.uint8)
    for number, since_part in enumerate(since):
        codes |= (has_type & (times >= since_part)).astype(np.uint8) << number
    return codes


def hides_in(codes: Codes, part: str) -> Mask:
    """Whether events with these codes hide their items in `part`; KeyError for a part that there is not."""
    if part not in PARTS:
        raise KeyError(part)
    return np.asarray(codes >> PARTS.index(part) & 1, dtype=bool)
