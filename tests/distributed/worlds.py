"""A small finished night up to the checkpoint: histories of random users and a model with random weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.artifacts import InputObject, Night, name_night
from pipeline.config import apply_overrides
from pipeline.data.histories import Bucket, user_bucket
from pipeline.data.lists import offsets_of
from pipeline.distributed import embed, search, tune
from pipeline.distributed.chain import Stage
from pipeline.distributed.cluster import Cluster, Node
from pipeline.io.checkpoint import load_model, write_checkpoint
from pipeline.io.histories import write_bucket
from pipeline.io.parquet import read_parquet_bytes, write_parquet_bytes
from pipeline.io.storage import open_storage
from pipeline.io.storage.base import Storage, put
from pipeline.model.model import RetrievalModel
from pipeline.model.results import training_metrics
from pipeline.schema import items as items_schema
from pipeline.settings import Settings
from pipeline.stages.candidates import CandidateSink
from pipeline.stages.queries import TonightsUsers
from tests.model.planted import report

DAY = date(2026, 11, 20)
SMALL = {
    "log": {"uri": "unused", "source": "default"},
    "model": {
        "dim": 16,
        "num_blocks": 1,
        "num_heads": 2,
        "ffn_dim": 16,
        "max_length": 8,
        "mol": {
            "num_query_components": 3,
            "num_item_components": 2,
            "component_dim": 8,
            "query_hidden_dim": 16,
            "gate_hidden_dim": 8,
            "num_user_hashes": 16,
        },
    },
    "corpus": {"num_shards": 3},
    "search": {"k": 10, "query_tile": 16, "item_tile": 32, "num_preselected": 20},
    "output": {"num_buckets": 3},
}


@dataclass(frozen=True)
class World:
    storage: Storage
    settings: Settings
    night: Night

    def with_settings(self, *overrides: str) -> "World":
        """The same histories and model under other settings of what follows."""
        settings = Settings.model_validate(apply_overrides(self.settings.model_dump(mode="json"), overrides))
        named = _night(settings)
        night = replace(named, histories=self.night.histories, checkpoint=self.night.checkpoint)
        return World(self.storage, settings, night)


def make_world(root: Path, num_users: int = 40, num_items: int = 120, overrides: Sequence[str] = ()) -> World:
    """Histories of 1 to 30 events, ids as strings, weights of a scale that tells items apart."""
    storage = open_storage(str(root))
    settings = Settings.model_validate(apply_overrides({**SMALL, "root": str(root)}, overrides))
    night = _night(settings)
    rng = np.random.default_rng(0)
    ids = pa.array(sorted(f"i{number:06d}" for number in range(num_items)))
    counts = pa.array(np.zeros(num_items, dtype=np.int64))
    table = pa.Table.from_arrays([ids, counts, counts, counts], schema=items_schema(pa.string()))
    put(storage, night.histories.items_key, write_parquet_bytes(table))
    lengths = {f"u{number:05d}": int(rng.integers(1, 31)) for number in range(num_users)}
    histories = {user: rng.integers(0, num_items, size=length) for user, length in lengths.items()}
    write_histories(storage, night, settings.output.num_buckets, histories)
    torch.manual_seed(0)
    model = RetrievalModel(settings.model, num_items)
    with torch.no_grad():
        model.item_embedding.weight.normal_()
    write_checkpoint(storage, night.checkpoint, model, settings, training_metrics([report(1, 0.1)], 0.1), {})
    return World(storage, settings, night)


def write_histories(storage: Storage, night: Night, num_buckets: int, histories: Mapping[str, np.ndarray]) -> None:
    """Write the buckets; the last event of each history is the test's, the one before the validation's."""
    users = pa.array(sorted(histories), type=pa.string())
    buckets = user_bucket(users, num_buckets)
    for bucket in range(num_buckets):
        chosen = users.filter(pa.array(buckets == bucket))
        rows = [histories[user].astype(np.int32) for user in chosen.to_pylist()]
        lengths = np.array([len(r) for r in rows], dtype=np.int64)
        events = np.concatenate([np.empty(0, dtype=np.int32), *rows])
        write_bucket(
            storage,
            night.histories,
            bucket,
            Bucket(
                chosen,
                offsets_of(lengths),
                events,
                np.arange(len(events), dtype=np.int64),
                np.ones(len(events), dtype=np.float32),
                np.maximum(lengths - 2, 0).astype(np.int32),
                np.where(lengths > 1, 1, 0).astype(np.int32),
            ),
        )


def without_ray(monkeypatch: pytest.MonkeyPatch, cpus: float = 64.0) -> list[tuple[str, list[int]]]:
    """Let chains run in this process, on an imaginary cluster; returns a log of the stages and units that ran."""
    ran: list[tuple[str, list[int]]] = []

    def run_here(what: str, units: Sequence[int], stages: Sequence[Stage], threads: int) -> dict[int, bytes]:
        ran.append(("+".join(stage.name for stage in stages), list(units)))
        functions = [stage.function(**stage.arguments) for stage in stages]
        payloads: dict[int, bytes] = {}
        for unit in units:
            payload = b""
            for function in functions:
                payload = bytes(function(unit, payload))
            payloads[unit] = payload
        return payloads

    for module in (embed, search, tune):
        monkeypatch.setattr(module, "run_chain", run_here)
        monkeypatch.setattr(module, "connect", lambda settings: Cluster((Node(cpus),), is_local=True))
    return ran


def retrieve(world: World) -> pa.Table:
    """Embed, search and read back the candidates, without what names the run."""
    run_search(world)
    return read_table(world, "candidates")


def run_search(world: World) -> None:
    """Embed the items and search for all users."""
    embed.embed_corpus(world.storage, world.night, world.settings)
    search.search_units(
        world.storage.uri,
        world.night,
        world.settings,
        range(world.settings.output.num_buckets),
        TonightsUsers,
        CandidateSink,
        f"{world.night.run.prefix}/_wave",
    )


def read_table(world: World, name: str) -> pa.Table:
    """A table of the run, ordered by user, without what names the run."""
    keys = [i.key for i in world.storage.list(f"{world.night.run.prefix}/{name}-")]
    table = pa.concat_tables(read_parquet_bytes(world.storage.read(key), key) for key in keys)
    table = table.drop_columns([n for n in ("run_id", "model_version") if n in table.column_names])
    return table.sort_by([(n, "ascending") for n in ("user_id", "rank") if n in table.column_names])


def model_of(world: World) -> RetrievalModel:
    return load_model(world.storage, world.night.checkpoint)


def _night(settings: Settings) -> Night:
    return name_night(settings, DAY, [InputObject("log", 1, "e")], {})
