"""Rows that a computation cannot do: they are found by halving, and the others are done without them.

One odd user must not end a night. A fault of the whole (a store that is away, a shard that is damaged) is none of this:
our own errors, a lack of memory, and faults of too many rows of a unit are raised as they are.
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
FIRST_FAILED = 8  # rows that fail before any has been done: the fault is not theirs
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
    num_done = 0

    def attempt(rows: Int64) -> list[tuple[Int64, T]]:
        nonlocal num_done
        try:
            done = work(rows)
            num_done += len(rows)
            return [(rows, done)]
        except (NightrailsError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if len(rows) > 1:
                return [part for half in np.array_split(rows, 2) for part in attempt(half)]
            if not len(rows) or len(failed) >= (MAX_FAILED if num_done else FIRST_FAILED):
                raise
            failed[int(rows[0])] = FAILED + f"{type(error).__name__}: {error}".splitlines()[0][:MAX_WORDS]
            log.warning("a user is left out, because %s", failed[int(rows[0])])
            return []

    return attempt(np.arange(num_rows)), failed
