"""The lists of a search: the best k of each query, or, under rules for whole lists, k that are chosen from more.

Then the search goes in rounds. In the first, each query's list is chosen from a ranking twice as long; the queries
whose rules could not be kept yet are searched for again, four times as deep, until there are none, or down to
`rules.max_depth`. The store keeps the lists of each round. Shapes: B queries, M items of a ranking, K of a list.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.artifacts import FileEntry
from pipeline.config import Config
from pipeline.data.columns import Mask, mask_of, numpy_of
from pipeline.data.histories import Bucket
from pipeline.data.lists import NO_ITEM, Int64
from pipeline.errors import InfrastructureError
from pipeline.io.artifacts import Claims, read_file, sizes_of, write_file
from pipeline.io.corpus import open_corpus
from pipeline.io.night import Night
from pipeline.io.parquet import read_parquet_bytes, write_parquet_bytes
from pipeline.retrieval.list_rules import in_words
from pipeline.retrieval.topk import TopK
from pipeline.settings import RulesSettings, Settings
from pipeline.stages.list_rules import read_list_rules
from pipeline.stages.queries import QuerySource, Requested
from pipeline.stages.query_batch import (
    QueryBatch,
    backends_in,
    backends_metadata,
    decode_batch,
    topk_columns,
    topk_from_columns,
)
from pipeline.stages.runner import Actors, Payload, Runner, Stage
from pipeline.stages.search import AGAIN, Search, check_k, encoder_stage, remove_running, search_shards

FIRST, GROWTH = 2, 4  # the depth of the first round, in lists, and how much deeper each other round is


class Sink(Protocol):
    """Writes the result of a unit to the store. A unit may be written twice, with the same result."""

    def write(self, unit: int, batch: QueryBatch, result: TopK) -> None: ...


SinkMaker = Callable[[Night, Settings], Sink]


def search_units(
    runner: Runner,
    search: Search,
    units: Sequence[int],
    sink: SinkMaker,
    sink_memory: int = 0,
    *,
    keeps_list_rules: bool = True,
) -> None:
    """Search for the queries of each unit (a user bucket) and hand the results to the sink, which takes at most
    `sink_memory` bytes (0: little). Without `keeps_list_rules` the results are the best k, whatever the rules for
    lists say.

    An interrupted search resumes from its scratch; a finished search removes it. Raises InputError when the corpus does
    not exist or has fewer than k items, and the errors of `Runner.run_chain`.
    """
    check_k(search.settings, open_corpus(search.night.storage, search.night.corpus))
    arguments = {"night": search.night, "settings": search.settings, "sink": sink}
    if keeps_list_rules and search.settings.rules.are_of_lists:
        rounds = _search_rounds(runner, search, units)
        writer = Stage(ListWriter, arguments | {"rounds": rounds}, Actors.ONE, memory=sink_memory)
        if units:
            runner.run_chain("write lists", units, [encoder_stage(search), writer])
    else:
        search_shards(runner, search, units, Stage(Writer, arguments, Actors.ONE, memory=sink_memory))
    remove_running(search.night.storage, search.scratch)


class Writer:
    """Ends a search: hands each unit to the sink."""

    def __init__(self, night: Night, settings: Settings, sink: SinkMaker) -> None:
        self._sink = sink(night, settings)

    def __call__(self, unit: int, payload: Payload) -> bytes:
        batch, result = decode_batch(payload)
        sound = torch.from_numpy(np.flatnonzero(batch.is_sound))
        self._sink.write(unit, batch.without_failures(), result.take(sound))
        return b""


class UnitLists(Config):
    """The lists that a round has chosen for a unit."""

    file: FileEntry
    num_open: int  # queries whose lists need a longer ranking


@dataclass(frozen=True)
class Round:
    """One round of a search: rankings of the `depth` best items."""

    search: Search  # for the users that it searches for
    k: int
    depth: int
    is_last: bool

    def claims(self) -> Claims[UnitLists]:
        """The units whose lists are chosen."""
        prefix = f"{self.search.scratch}/lists"
        return Claims(
            self.search.night.storage, prefix, "unit", UnitLists, lambda record: sizes_of(prefix, record.file)
        )


def depths(rules: RulesSettings, k: int, num_items: int) -> tuple[int, ...]:
    """The depths of the rounds. A minimum score alone only cuts lists short: one round of depth k is enough."""
    most = min(rules.max_depth, num_items)
    depth = min(k * FIRST if rules.at_most or rules.at_least or rules.diversity else k, most)
    found = [depth]
    while found[-1] < most:
        found.append(min(found[-1] * GROWTH, most))
    return tuple(found) if depth > k or depth == most else (depth,)


def _search_rounds(runner: Runner, search: Search, units: Sequence[int]) -> tuple[Round, ...]:
    """Choose the list of every query of the units, and return the rounds that were needed."""
    num_items = open_corpus(search.night.storage, search.night.corpus).counts["num_items"]
    k, rounds = search.settings.search.k, []
    planned = depths(search.settings.rules, k, num_items)
    source, open_units = search.source, list(units)
    for depth in planned:
        deeper = replace(
            search, settings=_deeper(search.settings, depth), source=source, scratch=f"{search.scratch}/depth-{depth}"
        )
        this = Round(deeper, k, depth, is_last=depth == planned[-1])
        rounds.append(this)
        chooser = Stage(ListChooser, {"round_": this}, memory=_memory_of_rules(search))
        search_shards(runner, deeper, this.claims().missing(open_units), chooser)
        open_units = [unit for unit in open_units if this.claims().require(unit, AGAIN).num_open]
        if not open_units:
            break
        source = OpenUsers(search.source, this)
    return tuple(rounds)


def _deeper(settings: Settings, depth: int) -> Settings:
    """The settings of a search for `depth` items, whose first stage keeps as many more than tonight's."""
    search = settings.search
    times = -(-depth // search.k)
    more = {"num_preselected": search.num_preselected * times, "num_per_embd": search.num_per_embd * times}
    return settings.with_search({"k": depth} | more)


def _memory_of_rules(search: Search) -> int:
    """About the bytes of the vectors that variety compares."""
    counts = open_corpus(search.night.storage, search.night.corpus).counts
    width = search.settings.model.mol.component_dim
    return 4 * width * counts["num_items"] if search.settings.rules.diversity else 0


@dataclass(frozen=True)
class OpenUsers:
    """The users of `source` whose lists the round before could not choose."""

    source: QuerySource
    before: Round

    @property
    def part(self) -> str:
        return self.source.part

    def select(self, unit: int, bucket: Bucket) -> Requested:
        requested = self.source.select(unit, bucket)
        lists = _read_lists(self.before, unit)
        still_open = lists["user_id"].filter(lists["is_open"])
        is_chosen = pc.is_in(requested.user_ids, still_open.combine_chunks())
        return Requested(requested.user_ids.filter(is_chosen), requested.bucket_rows[mask_of(is_chosen)])


class ListChooser:
    """Ends a round: chooses each query's list from its ranking and keeps it in the store."""

    def __init__(self, round_: Round) -> None:
        self._round = round_
        self._rules = read_list_rules(round_.search.night, round_.search.settings)
        self._num_items = open_corpus(round_.search.night.storage, round_.search.night.corpus).counts["num_items"]

    def __call__(self, unit: int, payload: Payload) -> bytes:
        batch, ranking = decode_batch(payload)
        rows_BM, scores_BM = ranking.rows_BK.numpy(), ranking.scores_BK.numpy()
        k, depth, is_last = self._round.k, self._round.depth, self._round.is_last
        chosen = self._rules.choose(scores_BM, rows_BM, k, is_last)
        is_open_B = chosen.is_open_B & batch.is_sound
        bounds_B = ranking.bounds_B.numpy()
        is_proven_B = (bounds_B < chosen.needed_B) | np.isneginf(bounds_B)
        is_whole_B = (rows_BM[:, -1] == NO_ITEM) | (depth == self._num_items)
        if self._rules.min_score is not None:
            is_whole_B |= scores_BM[:, -1] < self._rules.min_score  # what comes after it scores less
        lists = TopK(
            torch.from_numpy(chosen.scores_of(scores_BM)),
            torch.from_numpy(chosen.rows_of(rows_BM)),
            torch.from_numpy(np.where(is_proven_B, -np.inf, np.inf).astype(np.float32)),
        )
        table = pa.table(
            {
                "user_id": batch.searched_user_ids,
                "is_second": _is_second(batch, self._round.search),
                "is_open": is_open_B,
                "failure": batch.failures if batch.failures is not None else pa.repeat("", len(is_open_B)),
                "note": pa.array(in_words(self._rules, chosen, is_whole_B, depth), pa.string()),
                **topk_columns(lists),
            }
        )
        claims = self._round.claims()
        data = write_parquet_bytes(table, backends_metadata(batch.backends))
        entry = write_file(claims.storage, claims.prefix, f"unit-{unit:05d}.parquet", data, table.num_rows)
        claims.claim(unit, UnitLists(file=entry, num_open=int(is_open_B.sum())))
        return b""


class ListWriter:
    """Ends a search in rounds: hands each unit, with the lists that the rounds have chosen, to the sink."""

    def __init__(self, night: Night, settings: Settings, sink: SinkMaker, rounds: Sequence[Round]) -> None:
        self._sink, self._rounds = sink(night, settings), rounds

    def __call__(self, unit: int, payload: Payload) -> bytes:
        batch, result = decode_batch(payload)
        user_ids, is_second = batch.searched_user_ids, _is_second(batch, self._rounds[0].search)
        notes, failures = (np.full(len(user_ids), "", dtype=object) for _ in range(2))
        missing = np.ones(len(user_ids), dtype=bool)
        backends = batch.backends
        for round_ in self._rounds:
            if not missing.any():
                break
            lists = _read_lists(round_, unit)
            backends |= backends_in(lists.schema)
            settled = np.flatnonzero(~mask_of(lists["is_open"]))
            places = _places(lists.take(pa.array(settled)), user_ids, is_second)
            result = result.put(torch.from_numpy(places), topk_from_columns(lists).take(torch.from_numpy(settled)))
            notes[places], failures[places] = (
                lists[name].take(pa.array(settled)).to_numpy() for name in ("note", "failure")
            )
            missing[places] = False
        if missing.any():
            raise InfrastructureError(f"{self._rounds[0].search.scratch}: {missing.sum()} lists of unit {unit} {AGAIN}")
        batch = replace(batch, backends=backends, notes=pa.array(notes, pa.string()))
        batch = batch.failing({place: failures[place] for place in np.flatnonzero(failures != "").tolist()})
        sound = torch.from_numpy(np.flatnonzero(batch.is_sound))
        self._sink.write(unit, batch.without_failures(), result.take(sound))
        return b""


def _is_second(batch: QueryBatch, search: Search) -> Mask:
    """(B,) which queries are the second ones of their users, in a search that compares bonuses."""
    num_users = len(batch.user_ids) // 2 if search.compares_bonuses else len(batch.user_ids)
    return np.asarray(batch.searched >= num_users)


def _places(lists: pa.Table, user_ids: pa.Array, is_second: Mask) -> Int64:
    """The place of each list among the queries of these users."""
    places = np.empty(lists.num_rows, dtype=np.int64)
    of_lists = mask_of(lists["is_second"])
    for second in (False, True):
        own = np.flatnonzero(is_second == second)
        wanted = lists["user_id"].filter(pa.array(of_lists == second)).combine_chunks()
        places[of_lists == second] = own[numpy_of(pc.index_in(wanted, user_ids.take(pa.array(own))))]
    return places


def _read_lists(round_: Round, unit: int) -> pa.Table:
    """The lists that a round has chosen for a unit. Raises InfrastructureError when they are gone or damaged."""
    claims = round_.claims()
    entry = claims.require(unit, AGAIN).file
    data = read_file(claims.storage, claims.prefix, entry, AGAIN)
    return read_parquet_bytes(data, f"{claims.storage.uri}/{claims.prefix}/{entry.key}")
