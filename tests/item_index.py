"""An item index without a log."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import schema
from pipeline.data.days import DAY_US


def item_index(ids: pa.Array, counts: npt.ArrayLike = 0, is_eligible: npt.ArrayLike = True) -> pa.Table:
    """An item index (`schema.items`) in which all three counts of an item are the same, and item n has its first event
    on day n."""
    counts_N = pa.array(np.broadcast_to(np.asarray(counts, dtype=np.int64), len(ids)))
    first_N = pa.array(np.arange(len(ids)) * DAY_US, schema.TIMESTAMP)
    is_eligible_N = pa.array(np.broadcast_to(np.asarray(is_eligible, dtype=bool), len(ids)))
    columns = [ids, counts_N, counts_N, counts_N, first_N, is_eligible_N]
    return pa.Table.from_arrays(columns, schema=schema.items(ids.type))
