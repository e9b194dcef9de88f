"""The Neighbours artifact: for each item the items that follow it most, in one Parquet file per range of items."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from pipeline.artifacts import Artifact, FileEntry, Manifest
from pipeline.data.columns import numpy_of
from pipeline.data.lists import Lists
from pipeline.data.neighbours import COUNTINGS, Neighbours, ScoredLists
from pipeline.io.artifacts import Claims, read_file, require_manifest, seal, sizes_of, write_file
from pipeline.io.night import Night
from pipeline.io.parquet import read_parquet_bytes, write_parquet_bytes
from pipeline.io.storage.base import Storage
from pipeline.schema import SCHEMA_VERSION
from pipeline.schema import neighbours as neighbours_schema
from pipeline.settings import Settings

REMEDY = "remove the neighbours and run jobs/count_pairs.py again"


def range_claims(storage: Storage, neighbours: Artifact) -> Claims[FileEntry]:
    """The claims of the ranges of items: part n is range n."""
    return Claims(storage, neighbours.prefix, "range", FileEntry, lambda entry: sizes_of(neighbours.prefix, entry))


def write_range(storage: Storage, neighbours: Artifact, index: int, lists: ScoredLists) -> FileEntry:
    """Write the lists of one range of items and its claim. The first attempt's entry stands."""
    schema = neighbours_schema()
    offsets = lists.items.offsets.astype(np.int32)
    columns = [
        pa.ListArray.from_arrays(offsets, pa.array(values), type=schema.field(name).type)
        for name, values in (("item_rows", lists.items.values), ("scores", lists.scores))
    ]
    footer = {"neighbours_id": neighbours.id, "schema_version": str(SCHEMA_VERSION)}
    data = write_parquet_bytes(pa.Table.from_arrays(columns, schema=schema), footer)
    entry = write_file(storage, neighbours.prefix, f"range-{index:05d}.parquet", data, len(lists))
    return range_claims(storage, neighbours).claim(index, entry)


def seal_neighbours(night: Night, settings: Settings, ranges: Mapping[int, FileEntry]) -> Manifest:
    """Write the manifest; `ranges` has the file of each range by its number."""
    files = [ranges[index] for index in sorted(ranges)]
    return seal(
        night.storage,
        night.neighbours,
        kind="neighbours",
        lineage={"histories": night.histories.id},
        settings={"counts": settings.counts.model_dump(mode="json") | {"pairs": settings.counted_pairs}},
        files=files,
        counts={"num_items": sum(entry.rows for entry in files), "num_ranges": len(files)},
    )


def open_neighbours(night: Night) -> Manifest:
    """Read the manifest. Raises InputError when the pairs are not counted yet."""
    return require_manifest(night.storage, night.neighbours, "count_pairs")


def read_neighbours(night: Night) -> Neighbours:
    """Read the lists of all items, 8 bytes for each neighbour. Raises InputError when they are not there or damaged."""
    storage, prefix = night.storage, night.neighbours.prefix
    parts, manifest = [], open_neighbours(night)
    for entry in manifest.files:
        table = read_parquet_bytes(read_file(storage, prefix, entry, REMEDY), f"{storage.uri}/{prefix}/{entry.key}")
        rows, scores = (table[name].combine_chunks() for name in ("item_rows", "scores"))
        lists = Lists(numpy_of(rows.offsets).astype(np.int64), numpy_of(rows.flatten()))
        parts.append(ScoredLists(lists, numpy_of(scores.flatten())))
    joined = ScoredLists.concat(parts)
    return Neighbours(joined.items, joined.scores, COUNTINGS[manifest.settings["counts"]["pairs"]])
