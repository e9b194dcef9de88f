"""Rows that a computation cannot do: they are found by halving, and the others are done without them.

One odd user must not end a night. A fault of the whole (a store that is away, a shard that is damaged) is none of this:
our own errors, a lack of memory, and faults of more than MAX_FAILED rows of a unit are raised as they are.
"""

import logging
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from pipeline.data.lists import Int64
from pipeline.errors import NightrailsError

T = TypeVar("T")

MAX_FAILED = 100  # rows of a unit
MAX_WORDS = 200  # characters of a reason
FAILED = "the computation failed: "  # begins the reason of such a row

log = logging.getLogger("nightrails")


def around_failures(work: Callable[[Int64], T], num_rows: int) -> tuple[list[tuple[Int64, T]], dict[int, str]]:
    """Do `work` for rows 0 to `num_rows`, at once if that goes, else without the rows that it fails for.

    Returns the parts that were done, each with its rows, in order, and the reason of each row that fails even alone.
    `work` gets ascending rows, at least one unless there are none, and must treat each as if it were alone. Raises what
    it raises when that is no fault of single rows.
    """
    failed: dict[int, str] = {}

    def attempt(rows: Int64) -> list[tuple[Int64, T]]:
        try:
            return [(rows, work(rows))]
        except (NightrailsError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if len(rows) > 1:
                return [part for half in np.array_split(rows, 2) for part in attempt(half)]
            if not len(rows) or len(failed) >= MAX_FAILED:
                raise
            failed[int(rows[0])] = FAILED + f"{type(error).__name__}: {error}".splitlines()[0][:MAX_WORDS]
            log.warning("a user is left out, because %s", failed[int(rows[0])])
            return []

    return attempt(np.arange(num_rows)), failed
