"""A small night, finished up to the checkpoint: histories of random users and a model with random weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from pipeline.config import apply_overrides
from pipeline.data.histories import Bucket, user_bucket
from pipeline.data.lists import Lists, offsets_of
from pipeline.data.seen import IN_ALL_PARTS
from pipeline.io.checkpoint import load_model, write_checkpoint
from pipeline.io.histories import items_claims, write_bucket, write_items
from pipeline.io.inputs import Inputs, Log, list_queries
from pipeline.io.night import Night, name_night
from pipeline.io.parquet import read_parquet_bytes
from pipeline.io.storage import open_storage
from pipeline.io.storage.base import ObjectInfo, Storage
from pipeline.model.model import RetrievalModel
from pipeline.model.results import training_metrics
from pipeline.settings import Settings
from pipeline.stages.candidates import CandidateSink
from pipeline.stages.embed import embed_corpora
from pipeline.stages.lists import search_units
from pipeline.stages.local import LocalRunner
from pipeline.stages.queries import TonightsUsers
from pipeline.stages.runner import Runner, Stage
from pipeline.stages.search import Search
from tests.item_index import item_index
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
    "train": {"refit": 0},
    "memory": {"enabled": False},
    "corpus": {"num_shards": 3},
    "search": {"k": 10, "num_preselected": 20, "method": "exact"},
    "output": {"num_buckets": 3},
}


@dataclass(frozen=True)
class World:
    """A night and the settings that named it."""

    settings: Settings
    night: Night

    @property
    def storage(self) -> Storage:
        return self.night.storage

    def with_settings(self, *overrides: str) -> "World":
        """The same histories and model; the later artifacts are named by the changed settings."""
        settings = Settings.model_validate(apply_overrides(self.settings.model_dump(mode="json"), overrides))
        named = name_night(self.storage, settings, self.night.inputs)
        kept = {name: getattr(self.night, name) for name in ("histories", "selected", "measured", "checkpoint")}
        return World(settings, replace(named, **kept))


class RecordingRunner(LocalRunner):
    """The local runner; records the chains that ran (stage names, units) and holds few shards at once if told to."""

    def __init__(self, settings: Settings, shards_at_once: int = 64) -> None:
        super().__init__(settings)
        self._shards_at_once = shards_at_once
        self.ran: list[tuple[str, list[int]]] = []

    def run_chain(self, label: str, units: Sequence[int], stages: Sequence[Stage]) -> None:
        self.ran.append(("+".join(stage.name for stage in stages), list(units)))
        super().run_chain(label, units, stages)

    def num_fitting(self, stages: Sequence[Stage], beside: Sequence[Stage]) -> int:
        return min(super().num_fitting(stages, beside), self._shards_at_once)


def night_of(settings: Settings) -> Night:
    """A night whose log is one file, which no test reads."""
    queries = list_queries(settings, DAY)
    inputs = Inputs(DAY, Log("unused", (ObjectInfo("log", 1, "e"),)), queries=queries)
    return name_night(open_storage(settings.root), settings, inputs)


def make_world(root: Path, num_users: int = 40, num_items: int = 120, overrides: Sequence[str] = ()) -> World:
    """Histories of 1 to 30 events, string ids, and item embeddings so large that no two items score alike."""
    settings = Settings.model_validate(apply_overrides({**SMALL, "root": str(root)}, overrides))
    night = night_of(settings)
    rng = np.random.default_rng(0)
    ids = pa.array(sorted(f"i{number:06d}" for number in range(num_items)))
    write_items(night.storage, night.histories, item_index(ids))
    lengths = {f"u{number:05d}": int(rng.integers(1, 31)) for number in range(num_users)}
    histories = {user: rng.integers(0, num_items, size=length) for user, length in lengths.items()}
    write_histories(night, settings.output.num_buckets, histories)
    torch.manual_seed(0)
    model = RetrievalModel(settings.model, num_items)
    with torch.no_grad():
        model.item_embedding.weight.normal_()
    write_checkpoint(night, model, settings, training_metrics([report(1, 0.1)], 0.1, settings.train))
    return World(settings, night)


def replace_items(night: Night, items: pa.Table) -> None:
    """Put another item index in the place of the night's own."""
    night.storage.delete(items_claims(night.storage, night.histories).key(0))
    write_items(night.storage, night.histories, items)


def write_histories(night: Night, num_buckets: int, histories: Mapping[str, np.ndarray]) -> None:
    """Write the buckets; the last event of each history is held out for test, the one before it for validation."""
    users = pa.array(sorted(histories), type=pa.string())
    buckets = user_bucket(users, num_buckets)
    for bucket in range(num_buckets):
        user_ids = users.filter(pa.array(buckets == bucket))
        rows = [histories[user].astype(np.int32) for user in user_ids.to_pylist()]
        lengths = np.array([len(r) for r in rows], dtype=np.int64)
        events = np.concatenate([np.empty(0, dtype=np.int32), *rows])
        write_bucket(
            night.storage,
            night.histories,
            bucket,
            Bucket(
                user_ids,
                offsets_of(lengths),
                events,
                np.arange(len(events), dtype=np.int64),
                np.ones(len(events), dtype=np.float32),
                np.full(len(events), IN_ALL_PARTS, np.uint8),
                np.maximum(lengths - 2, 0).astype(np.int32),
                np.where(lengths > 1, 1, 0).astype(np.int32),
                pa.repeat("", len(user_ids)),
                Lists.empty(len(user_ids)),
            ),
        )


def retrieve(world: World, runner: Runner | None = None) -> pa.Table:
    """Embed the items, search for all users and return the candidates without the columns that name the run."""
    run_search(world, runner or LocalRunner(world.settings))
    return read_table(world, "candidates")


def run_search(world: World, runner: Runner) -> None:
    """Embed the items and search for all users."""
    night, settings = world.night, world.settings
    embed_corpora(runner, night, settings)
    search_units(runner, search_of(world), range(settings.output.num_buckets), CandidateSink)


def search_of(world: World) -> Search:
    """The search for all users of the night."""
    users = TonightsUsers.of(world.night, world.settings.output.num_buckets)
    return Search(world.night, world.settings, users, f"{world.night.run.prefix}/_wave")


def read_table(world: World, name: str) -> pa.Table:
    """A table of the run, ordered by user and rank, without the columns that name the run."""
    keys = [i.key for i in world.storage.list(f"{world.night.run.prefix}/{name}-")]
    table = pa.concat_tables(read_parquet_bytes(world.storage.read(key), key) for key in keys)
    table = table.drop_columns([n for n in ("run_id", "model_version") if n in table.column_names])
    return table.sort_by([(n, "ascending") for n in ("user_id", "rank") if n in table.column_names])


def model_of(world: World) -> RetrievalModel:
    return load_model(world.storage, world.night.checkpoint)
