"""Encoding the histories of a user bucket into queries."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch

from pipeline.data.histories import Bucket
from pipeline.data.lists import Int64, Lists
from pipeline.errors import MismatchError
from pipeline.model.inputs import Events, QueryInput
from pipeline.model.model import RetrievalModel
from pipeline.model.mol import QuerySide
from pipeline.retrieval.bonuses import Bonuses
from pipeline.stages.poison import around_failures
from pipeline.stages.queries import QuerySource
from pipeline.stages.query_batch import NO_HISTORY, NOT_FINITE, SEARCHED, QueryBatch

# Sequences per tile; the last tile is padded. Tiles of one shape make a query independent of the other users in its
# bucket: a matrix product of another shape may differ in its last bits.
SEQUENCE_TILE = 256
NO_OWNER = -1  # has an empty history

# Gives each query the bonuses of its items, from its visible history (item rows, oldest first) and from what its user
# has seen and is not shown.
BonusSource = Callable[[Lists, Lists], Bonuses]


def encode_queries(
    model: RetrievalModel, bucket: Bucket, source: QuerySource, unit: int, bonus_source: BonusSource | None = None
) -> QueryBatch:
    """The queries of the users that `source` selects; what they have seen is excluded.

    A user without a visible event, or with a query that fails or is not finite, gets a reason instead of one. Without
    `bonus_source` no query has a bonus. Raises MismatchError when a history has an item that the model does not know.
    """
    requested = source.select(unit, bucket)
    visible = bucket.cut(source.part, model.encoder.reads)
    has_history = visible.take(requested.bucket_rows).lengths > 0
    searched_rows = requested.bucket_rows[has_history]
    histories = visible.take(searched_rows)
    if len(histories.values) and int(histories.values.max()) >= model.num_items:
        raise MismatchError(
            f"bucket {unit} has item row {histories.values.max()}, but the model knows {model.num_items} items; "
            "train on these histories"
        )
    keys = bucket.user_keys[searched_rows]
    parts, failed = around_failures(
        lambda rows: encode_sequences(model, histories.take(rows), keys[rows]), len(histories)
    )
    encoded = np.concatenate([np.empty(0, np.int64), *(rows for rows, _ in parts)])
    queries = QuerySide.cat([part for _, part in parts]) if parts else encode_sequences(model, Lists.empty(0), keys[:0])
    is_finite = queries.is_finite_B
    kept = encoded[is_finite.numpy()]
    of_history = np.full(len(histories), NOT_FINITE, dtype=object)
    of_history[kept] = SEARCHED
    of_history[list(failed)] = list(failed.values())
    reasons = np.array(requested.left_out(bucket), dtype=object)
    reasons[reasons == ""] = NO_HISTORY
    reasons[has_history] = of_history
    seen = bucket.seen(source.part).take(searched_rows[kept])
    return QueryBatch(
        requested.user_ids,
        pa.array(reasons, type=pa.string()),
        queries.take(is_finite),
        seen,
        bonuses=bonus_source(histories.take(kept), seen) if bonus_source else None,
    )


@torch.inference_mode()
def encode_sequences(model: RetrievalModel, histories: Lists, user_keys: Int64) -> QuerySide:
    """The query side, on the CPU, of each history (item rows, oldest first, and the columns that the encoder reads),
    computed in tiles of one shape."""
    num_queries = len(histories)
    num_padded = max(SEQUENCE_TILE, -(-num_queries // SEQUENCE_TILE) * SEQUENCE_TILE)
    owners = np.pad(np.arange(num_queries), (0, num_padded - num_queries), constant_values=NO_OWNER)
    keys = torch.from_numpy(np.pad(user_keys, (0, num_padded - num_queries)))
    tiles = []
    for first in range(0, num_padded, SEQUENCE_TILE):
        tile = histories.take(owners[first : first + SEQUENCE_TILE])
        events = Events.last(tile, model.settings.max_length, model.device)
        user_keys_B = keys[first : first + SEQUENCE_TILE].to(model.device)
        tiles.append(model.query_side(QueryInput(events, user_keys_B)).to("cpu"))
    return QuerySide.cat(tiles).take(slice(0, num_queries))
