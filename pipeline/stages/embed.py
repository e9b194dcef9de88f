"""Embedding the items into the Corpus of each of tonight's models; a unit of work is one shard."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import pyarrow as pa
import torch

from pipeline.artifacts import Manifest
from pipeline.errors import InputError, MismatchError
from pipeline.io.artifacts import read_manifest
from pipeline.io.checkpoint import load_model, model_bytes
from pipeline.io.corpus import low_rank_claims, open_corpus, read_low_rank, seal_corpus, shard_claims, write_shard
from pipeline.io.histories import read_item_ids
from pipeline.io.night import Night
from pipeline.io.tuning import are_searches_tried
from pipeline.model.model import RetrievalModel
from pipeline.retrieval.backends import open_index
from pipeline.retrieval.low_rank import low_rank_table
from pipeline.retrieval.shard import Shard, embed_rows, make_shard, shard_bounds
from pipeline.settings import Settings
from pipeline.stages.devices import device_for, memory_to_hold
from pipeline.stages.low_rank import LowRankFitter
from pipeline.stages.runner import Actors, Payload, Runner, Stage, StageFunction, in_turn


def embed_corpora(runner: Runner, night: Night, settings: Settings) -> Manifest:
    """Make the shards that do not exist yet of the Corpus artifacts: that of the model that is measured, and that of
    the model that serves, whose manifest is returned.

    Raises InputError when there is no item, too few users for a low-rank table, or an embedding that is not finite;
    MismatchError when a model was trained on other items; and the errors of `Runner.run_chain`.
    """
    nights = [night.measurement, night] if night.has_refit else [night]
    unfinished = [each for each in nights if read_manifest(each.storage, each.corpus.prefix) is None]
    if settings.search.method == "topk_low_rank" or are_searches_tried(night, settings):
        fits = [(each, low_rank_claims(each.storage, each.corpus).missing([0])) for each in unfinished]
        _run_together(runner, "fit the low-rank table", LowRankFitter, Actors.ONE, fits, settings)
    shards = range(settings.corpus.num_shards)
    missing = [(each, shard_claims(each.storage, each.corpus).missing(shards)) for each in unfinished]
    _run_together(runner, "embed shards", ShardEmbedder, Actors.AS_MANY_AS_FIT, missing, settings)
    for each in unfinished:
        seal_corpus(each, settings, shard_claims(each.storage, each.corpus).done())
    return open_corpus(night.storage, night.corpus)


def _run_together(
    runner: Runner,
    label: str,
    function: Callable[[Night, Settings], StageFunction],
    actors: Actors,
    missing: Sequence[tuple[Night, list[int]]],
    settings: Settings,
) -> None:
    """Send the units that any of the nights lacks through the stage of each such night, in the same process."""
    stages = [
        Stage(
            function,
            {"night": night, "settings": settings},
            gpus=settings.cluster.gpus_per_actor,
            memory=memory_to_hold(model_bytes(night)),
            searches=True,
        )
        for night, units in missing
        if units
    ]
    if stages:
        units = sorted({unit for _, units in missing for unit in units})
        runner.run_chain(label, units, [in_turn(stages, actors)])


class ShardEmbedder:
    """Holds the model; embeds, checks and writes one shard per call."""

    def __init__(self, night: Night, settings: Settings) -> None:
        self._night, self._settings = night, settings
        self._device = device_for(settings.cluster.gpus_per_actor)
        self._model = load_model(night.storage, night.checkpoint).to(self._device)
        fit = read_low_rank(night.storage, night.corpus)
        self._low_rank = fit.low_rank.to(self._device) if fit else None
        if self._model.num_items != len(self._item_ids):
            raise MismatchError(
                f"model {night.checkpoint.id} knows {self._model.num_items} items, but histories "
                f"{night.histories.id} have {len(self._item_ids)}; train on these histories"
            )
        if not len(self._item_ids):
            raise InputError(f"histories {night.histories.id} have no item; there is nothing to search")

    @cached_property
    def _item_ids(self) -> pa.Array:
        return read_item_ids(self._night.storage, self._night.histories)

    def __call__(self, unit: int, payload: Payload) -> Payload:
        """Make shard number `unit`; the payload passes through."""
        low, high = shard_bounds(len(self._item_ids), self._settings.corpus.num_shards)[unit]
        shard = embed_items(self._model, low, high)
        if self._low_rank is not None:
            index = open_index(self._model.mol, shard, self._settings.search)
            shard = replace(shard, low_rank_NR=low_rank_table(index, self._low_rank))
        write_shard(self._night.storage, self._night.corpus, unit, shard, self._item_ids.slice(low, high - low))
        return payload


def embed_items(model: RetrievalModel, low: int, high: int) -> Shard:
    """The shard of item rows `low` to `high` (exclusive)."""
    return make_shard(low, embed_rows(model, torch.arange(low, high, device=model.device)))
