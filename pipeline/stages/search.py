"""The stages of a search: encode a bucket's queries, meet one shard after the other, hand over. None knows Ray."""

import json
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch

from pipeline.artifacts import FileEntry, Night
from pipeline.data.histories import Bucket
from pipeline.data.lists import Int64, Sequences, offsets_of
from pipeline.errors import InfrastructureError, MismatchError
from pipeline.io.checkpoint import load_model
from pipeline.io.corpus import read_low_rank, read_shard
from pipeline.io.histories import read_bucket
from pipeline.io.parquet import read_parquet_bytes, write_parquet_bytes
from pipeline.io.storage import open_storage
from pipeline.io.storage.base import ObjectNotFoundError, Storage
from pipeline.model.inputs import Events, QueryInput
from pipeline.model.model import RetrievalModel
from pipeline.model.mol import QuerySide
from pipeline.retrieval.backends import open_index
from pipeline.retrieval.filters import Exclusions
from pipeline.retrieval.search import search_shard
from pipeline.retrieval.topk import TopK, empty_topk
from pipeline.settings import Settings
from pipeline.stages.devices import device_for
from pipeline.stages.queries import QuerySource, take_sequences
from pipeline.stages.query_batch import (
    NO_HISTORY,
    NOT_FINITE,
    SEARCHED,
    QueryBatch,
    decode_batch,
    encode_batch,
    topk_columns,
    topk_from_columns,
)

# Sequences that are encoded at once. Always exactly so many (the last tile is padded): a matrix product of another
# shape may differ in its last bits, and a query must not depend on who else is in the bucket.
SEQUENCE_TILE = 256


class Sink(Protocol):
    """What becomes of a unit's result. It is made in the actor that writes, from what every actor gets."""

    def __init__(self, storage_uri: str, night: Night, settings: Settings) -> None: ...

    def write(self, unit: int, batch: QueryBatch, found: TopK) -> dict[str, float]:
        """Make the unit's result durable; returns counts. A unit may be written again, with the same result."""


class QueryEncoder:
    """Reads a bucket, encodes its queries and starts their running top-k, or takes up the one that was spilled."""

    def __init__(
        self,
        storage_uri: str,
        night: Night,
        settings: Settings,
        source: type[QuerySource],
        scratch: str,
        num_covered: int,
    ) -> None:
        self._storage, self._night, self._settings = open_storage(storage_uri), night, settings
        self._scratch, self._num_covered = scratch, num_covered
        self._source = source(storage_uri, night, settings)
        self._model = load_model(self._storage, night.checkpoint)

    def __call__(self, unit: int, payload: bytes) -> pa.Buffer:
        """The unit's queries with a top-k over the first `num_covered` shards; the payload is not used."""
        bucket = read_bucket(self._storage, self._night.histories, unit)
        batch = encode_queries(self._model, bucket, self._source, unit)
        found = empty_topk(len(batch.excluded), self._settings.search.k)
        if self._num_covered:
            found = read_spilled(self._storage, spill_key(self._scratch, self._num_covered, unit), len(found))
        return encode_batch(batch, found)


class ShardSearcher:
    """Holds one item shard for the life of the process and improves each query's running top-k."""

    def __init__(self, storage_uri: str, night: Night, settings: Settings, entry: FileEntry) -> None:
        storage = open_storage(storage_uri)
        self._device = device_for(settings.cluster)
        self._search = settings.search
        mol = load_model(storage, night.checkpoint).mol.to(self._device)
        self._index = open_index(mol, read_shard(storage, night.corpus, entry).to(self._device), settings.search)
        fit = read_low_rank(storage, night.corpus)
        self._query_map = fit.query_map.to(self._device) if fit else None

    def __call__(self, unit: int, payload: bytes) -> pa.Buffer:
        batch, running = decode_batch(payload)
        queries, running = batch.queries.to(self._device), running.to(self._device)
        found = search_shard(self._index, queries, batch.excluded, self._search, running, self._query_map)
        return encode_batch(batch, found)


class Spill:
    """Ends a wave: keeps each unit's running top-k for the next one."""

    def __init__(self, storage_uri: str, scratch: str, num_covered: int) -> None:
        self._storage, self._scratch, self._num_covered = open_storage(storage_uri), scratch, num_covered

    def __call__(self, unit: int, payload: bytes) -> bytes:
        _, found = decode_batch(payload)
        # Whoever was first stays: both hold the top-k of the same shards.
        key = spill_key(self._scratch, self._num_covered, unit)
        self._storage.create(key, write_parquet_bytes(pa.table(topk_columns(found))))
        return b""


class Writer:
    """Ends the last wave: hands each unit to the sink; the payload becomes its counts, as JSON."""

    def __init__(self, storage_uri: str, night: Night, settings: Settings, sink: type[Sink]) -> None:
        self._sink = sink(storage_uri, night, settings)

    def __call__(self, unit: int, payload: bytes) -> bytes:
        return json.dumps(self._sink.write(unit, *decode_batch(payload))).encode()


def encode_queries(model: RetrievalModel, bucket: Bucket, source: QuerySource, unit: int) -> QueryBatch:
    """The queries of the users that `source` selects; all that they have seen is excluded.

    Users without a visible event, and those whose query is not finite, are named with the reason and not searched.
    """
    requested = source.select(unit, bucket)
    visible = bucket.cut(source.part)
    has_history = take_sequences(visible, requested.at).lengths > 0
    at = requested.at[has_history]
    histories = take_sequences(visible, at)
    if len(histories.item_rows) and int(histories.item_rows.max()) >= model.num_items:
        raise MismatchError(
            f"bucket {unit} has item row {histories.item_rows.max()}, but the model knows {model.num_items} items; "
            "train on these histories"
        )
    queries = encode_sequences(model, histories, bucket.user_keys[at])
    is_finite = torch.isfinite(queries.components_BQD).flatten(1).all(1) & torch.isfinite(queries.gate_BP).all(1)
    kept = is_finite.nonzero()[:, 0]
    reasons = np.full(len(requested.at), NO_HISTORY, dtype=object)
    reasons[has_history] = np.where(is_finite.numpy(), SEARCHED, NOT_FINITE)
    return QueryBatch(
        requested.user_ids,
        pa.array(reasons, type=pa.string()),
        queries.take(kept),
        seen_items(take_sequences(histories, kept.numpy()), model.num_items),
    )


@torch.inference_mode()
def encode_sequences(model: RetrievalModel, histories: Sequences, user_keys: Int64) -> QuerySide:
    """The query side of each history, computed in tiles of one shape."""
    rows_BL, _ = histories.last(model.settings.max_length)
    num_queries = len(rows_BL)
    padding = max(SEQUENCE_TILE, -(-num_queries // SEQUENCE_TILE) * SEQUENCE_TILE) - num_queries
    rows = torch.from_numpy(np.pad(rows_BL, ((0, padding), (0, 0)), constant_values=-1)).split(SEQUENCE_TILE)
    keys = torch.from_numpy(np.pad(user_keys, (0, padding))).split(SEQUENCE_TILE)
    tiles = [model.query_side(QueryInput(Events(r_BL), k_B)) for r_BL, k_B in zip(rows, keys, strict=True)]
    return QuerySide.cat(tiles).take(slice(0, num_queries))


def seen_items(histories: Sequences, num_items: int) -> Exclusions:
    """Each query's distinct items, ascending."""
    queries = np.repeat(np.arange(len(histories.lengths)), histories.lengths)
    pairs = np.unique(queries * num_items + histories.item_rows)
    counts = np.bincount(pairs // num_items, minlength=len(histories.lengths)).astype(np.int64)
    return Exclusions(offsets_of(counts), (pairs % num_items).astype(np.int32))


def spill_key(scratch: str, num_covered: int, unit: int) -> str:
    """Where a unit's top-k over the first `num_covered` shards lies between two waves."""
    return f"{scratch}/first-{num_covered:05d}-shards/unit-{unit:05d}.parquet"


def read_spilled(storage: Storage, key: str, num_queries: int) -> TopK:
    """A spilled running top-k. Raises InfrastructureError when it is not of these queries."""
    try:
        data = storage.read(key)
    except ObjectNotFoundError:
        raise InfrastructureError(
            f"{storage.uri}/{key}: gone; has another process finished this search meanwhile? Run again"
        ) from None
    found = topk_from_columns(read_parquet_bytes(data, f"{storage.uri}/{key}"))
    if len(found) != num_queries:
        storage.delete(key)
        raise InfrastructureError(f"{storage.uri}/{key}: of {len(found)} queries, not {num_queries}; run again")
    return found
