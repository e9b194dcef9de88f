"""The parts of an evaluation that run inside a search: the users that ask, the metrics of a unit, the recall check."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from pipeline.data.columns import Mask, numpy_of
from pipeline.data.histories import Bucket
from pipeline.data.lists import NO_ITEM, Int64, Lists
from pipeline.errors import MismatchError
from pipeline.evaluation.counts import rank_by_counts
from pipeline.evaluation.lists import intra_list_distance, novelty
from pipeline.evaluation.metrics import MeanSum, Rows, measured_cutoffs, overlap_at_k, ranking_sums, target_ranks
from pipeline.evaluation.popularity import rank_by_popularity
from pipeline.evaluation.results import RANKINGS
from pipeline.evaluation.segments import by_age, by_history, by_popularity, segment_sums
from pipeline.evaluation.targets import evaluable_users, held_out_targets, sampling_keys
from pipeline.io.checkpoint import load_model
from pipeline.io.corpus import open_corpus, read_shard, shard_entries
from pipeline.io.evaluation import (
    REMEDY,
    CheckedLists,
    Exposure,
    GateSums,
    Sample,
    SegmentSums,
    UnitOverlap,
    UnitScores,
    checked_claims,
    overlap_claims,
    sample_claims,
    score_claims,
    write_users,
)
from pipeline.io.histories import read_bucket, read_items, read_num_events
from pipeline.io.neighbours import read_neighbours
from pipeline.io.night import Night
from pipeline.model.model import RetrievalModel
from pipeline.retrieval.brute_force import brute_force
from pipeline.retrieval.topk import TopK
from pipeline.schema import EVALUATED, evaluated_users
from pipeline.settings import Settings
from pipeline.stages.queries import Requested
from pipeline.stages.query_batch import QueryBatch
from pipeline.stages.rules import TonightsRules

GATED_QUERIES = 64  # of each unit: the mean of the gate's weights needs no more


@dataclass(frozen=True)
class HeldOutUsers:
    """The sampled users that have test events; visible is each history before its test events."""

    sample: Sample
    seed: int
    part: str = "before_test"

    def select(self, unit: int, bucket: Bucket) -> Requested:
        return _users_up_to(bucket, self.sample.query_threshold, self.seed)


@dataclass(frozen=True)
class CheckedUsers:
    """The few of the sampled users whose lists are compared with exact search."""

    sample: Sample
    seed: int
    part: str = "before_test"

    def select(self, unit: int, bucket: Bucket) -> Requested:
        if unit not in self.sample.checked_units:
            return Requested(bucket.user_ids.slice(0, 0), np.empty(0, dtype=np.int64))
        return _users_up_to(bucket, self.sample.checked_threshold, self.seed)


def _users_up_to(bucket: Bucket, threshold: int, seed: int) -> Requested:
    users = evaluable_users(bucket)
    sampled = users[sampling_keys(bucket.user_keys[users], seed) <= np.uint64(threshold)]
    return Requested(bucket.user_ids.take(sampled), sampled)


class EvaluationSink:
    """Compares a unit's lists, and those of popularity and of item-to-item counts, with the held-out events and claims
    the sums."""

    def __init__(self, night: Night, settings: Settings) -> None:
        self._night, self._settings = night, settings
        sample = sample_claims(night).require(0, REMEDY)
        self._users = HeldOutUsers(sample, settings.evaluate.seed)
        self._rules = TonightsRules(night, settings)
        items = read_items(night.storage, night.histories, ["item_id", "first_event_ts"])
        self._item_ids = items["item_id"].combine_chunks()
        self._first_event_N = numpy_of(items["first_event_ts"].cast(pa.int64()).fill_null(0))
        self._popularity_N = read_num_events(night.storage, night.histories, "before_test")
        self._neighbours = read_neighbours(night)
        self._model = load_model(night.storage, night.checkpoint)

    def write(self, unit: int, batch: QueryBatch, result: TopK) -> None:
        """Claim the unit's sums. Where the batch has its users twice, the second lists are by MoL alone."""
        k, cutoffs = self._settings.search.k, self._settings.evaluate.cutoffs
        bucket = read_bucket(self._night.storage, self._night.histories, unit)
        requested = self._users.select(unit, bucket)
        num_users = len(requested.bucket_rows)
        # A user without a query (it was not finite) stays in the averages, as a miss.
        lists_RK = _lists_of(batch, result, k)
        model_BK, mol_BK = lists_RK[:num_users], lists_RK[num_users:]
        seen = bucket.seen(self._users.part).take(requested.bucket_rows)
        histories = bucket.cut(self._users.part).take(requested.bucket_rows)
        popularity_N = self._popularity_N

        def by_popularity_alone(_: Int64, hidden: Lists, is_shown_N: Mask) -> Int64:
            return rank_by_popularity(popularity_N, hidden, k, is_shown_N)

        def by_item_counts(users: Int64, hidden: Lists, is_shown_N: Mask) -> Int64:
            return rank_by_counts(self._neighbours, histories.take(users), hidden, k, is_shown_N, popularity_N)

        of_users = None if batch.rules is None else batch.rules.take(np.arange(num_users))
        ranked = {
            "model": model_BK,
            "popularity": self._rules.rank(seen, of_users, k, by_popularity_alone),
            "counts": self._rules.rank(seen, of_users, k, by_item_counts),
        }
        with_mol = ranked | ({"mol": mol_BK} if len(mol_BK) else {})
        targets = held_out_targets(bucket).take(requested.bucket_rows)
        measured = measured_cutoffs(cutoffs, k)
        sums = {name: ranking_sums(lists_BK, targets, measured) for name, lists_BK in with_mol.items()}
        first_places = {name: lists_BK[:, : measured[0]] for name, lists_BK in ranked.items()}
        vectors_NE = self._model.item_embedding(torch.arange(len(self._item_ids))).numpy()
        divisions = (
            by_history(histories.lengths, targets),
            by_popularity(popularity_N, targets),
            by_age(self._first_event_N, bucket.first_test_event()[requested.bucket_rows], targets),
        )
        scores = UnitScores(
            queries=num_users,
            num_proven=int(result.is_proven_B.numpy()[batch.searched < num_users].sum()),
            **{name: sums[name] for name in RANKINGS},
            mol=sums.get("mol", {}),
            exposure=expose(ranked),
            novelty={name: MeanSum.of(novelty(rows, popularity_N)) for name, rows in first_places.items()},
            distance={name: MeanSum.of(intra_list_distance(rows, vectors_NE)) for name, rows in first_places.items()},
            gates=gate_sums(self._model, batch, first_places["model"]),
            segments=[
                SegmentSums(by=division.by, name=name, rankings=rankings)
                for division in divisions
                for name, rankings in segment_sums(division, with_mol, targets, measured[:1])
            ],
            users=write_users(
                self._night, unit, users_table(requested.user_ids, histories, targets, self._item_ids, with_mol)
            ),
        )
        score_claims(self._night).claim(unit, scores)


def users_table(
    user_ids: pa.Array, histories: Lists, targets: Lists, item_ids: pa.Array, ranked: Mapping[str, Rows]
) -> pa.Table:
    """The users of a unit, and where their targets stand in each ranking (`schema.evaluated_users`)."""
    schema = evaluated_users(user_ids.type, item_ids.type)
    offsets = targets.offsets.astype(np.int32)

    def per_target(name: str, values: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, values, type=schema.field(name).type)

    columns = [
        user_ids,
        pa.array(histories.lengths.astype(np.int32)),
        per_target("item_ids", item_ids.take(pa.array(targets.values))),
    ]
    for name in EVALUATED:
        column = f"{name}_ranks"
        if name in ranked:
            columns.append(per_target(column, pa.array(target_ranks(ranked[name], targets))))
        else:
            columns.append(pa.nulls(len(user_ids), schema.field(column).type))
    return pa.Table.from_arrays(columns, schema=schema)


@torch.inference_mode()
def gate_sums(model: RetrievalModel, batch: QueryBatch, first_places_BK: Rows) -> GateSums:
    """Add up the gate's weights for the first `GATED_QUERIES` queries with the items of these users' lists (B, K)."""
    is_first = batch.searched < len(first_places_BK)
    rows_BK = torch.from_numpy(first_places_BK[batch.searched[is_first]][:GATED_QUERIES])
    queries = batch.queries.take(slice(0, len(rows_BK)))
    gates_BKP = model.mol.pairs(queries.alone(), model.item_side(rows_BK.clamp_min(0))).gates_BNP.squeeze(1)
    is_item_BK = rows_BK != NO_ITEM
    return GateSums(weights=gates_BKP[is_item_BK].double().sum(dim=0).tolist(), num_items=int(is_item_BK.sum()))


class BruteForceSink:
    """Compares an exact search with brute force, which scores every pair in float64 and sorts them all."""

    def __init__(self, night: Night, settings: Settings) -> None:
        self._night, self._k = night, settings.search.k
        self._rules = TonightsRules(night, settings)

    def write(self, unit: int, batch: QueryBatch, result: TopK) -> None:
        """Claim the unit's overlap."""
        storage, corpus = self._night.storage, self._night.corpus
        shards = (read_shard(storage, corpus, entry) for entry in shard_entries(open_corpus(storage, corpus)))
        mol = load_model(storage, self._night.checkpoint).mol
        rules = self._rules.for_queries(batch.excluded, batch.bonuses, batch.rules_of_queries)
        _, exact_BK = brute_force(mol, batch.queries, shards, rules, self._k)
        overlap = MeanSum.of(overlap_at_k(result.rows_BK.numpy(), exact_BK, self._k))
        overlap_claims(self._night).claim(unit, UnitOverlap(overlap=overlap))


class CheckedListsSink:
    """Keeps a unit's approximate lists for the comparison with exact search."""

    def __init__(self, night: Night, settings: Settings) -> None:
        self._night, self._k = night, settings.search.k

    def write(self, unit: int, batch: QueryBatch, result: TopK) -> None:
        """Claim the lists."""
        lists = CheckedLists(item_rows=_lists_of(batch, result, self._k).tolist())
        checked_claims(self._night).claim(unit, lists)


class RecallCheckSink:
    """Compares a unit's lists, which exact search made, with the kept lists of the approximate search."""

    def __init__(self, night: Night, settings: Settings) -> None:
        self._night, self._k = night, settings.search.k

    def write(self, unit: int, batch: QueryBatch, result: TopK) -> None:
        """Claim the unit's overlap. Raises MismatchError when the kept lists are those of other users."""
        kept = checked_claims(self._night).require(unit, REMEDY).item_rows
        exact_BK = _lists_of(batch, result, self._k)
        if len(kept) != len(exact_BK):
            evaluation = f"{self._night.storage.uri}/{self._night.evaluation.prefix}"
            raise MismatchError(
                f"unit {unit}: {len(kept)} lists were kept for the recall check of {len(exact_BK)} users; "
                f"remove {evaluation} to evaluate again"
            )
        checked_BK = np.array(kept, dtype=np.int64).reshape(exact_BK.shape)
        overlap = MeanSum.of(overlap_at_k(checked_BK, exact_BK, self._k))
        overlap_claims(self._night).claim(unit, UnitOverlap(overlap=overlap))


def _lists_of(batch: QueryBatch, result: TopK, k: int) -> Int64:
    """(R, k) item rows of the lists of all requested users; NO_ITEM where a user has no query."""
    lists_RK = np.full((len(batch.user_ids), k), NO_ITEM, dtype=np.int64)
    lists_RK[batch.searched] = result.rows_BK.numpy()
    return lists_RK


def expose(ranked: Mapping[str, Rows]) -> Exposure:
    """Count for each item the lists of each ranking (B, K) that it is in; items in no list are left out."""
    rows = np.unique(np.concatenate(list(ranked.values())))
    rows = rows[rows != NO_ITEM]
    num_lists = {
        name: np.bincount(np.searchsorted(rows, lists_BK[lists_BK != NO_ITEM]), minlength=len(rows)).tolist()
        for name, lists_BK in ranked.items()
    }
    return Exposure(item_rows=rows.tolist(), **num_lists)
