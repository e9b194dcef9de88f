"""Memory in a night: choosing its weight with validation users, and the bonuses of a search's queries."""

import numpy as np

from pipeline.data.batches import ValidationUsers, validation_users
from pipeline.data.histories import Bucket
from pipeline.errors import InputError
from pipeline.evaluation.metrics import Floats, MeanSum
from pipeline.evaluation.targets import sampling_keys
from pipeline.io.checkpoint import load_model, model_bytes
from pipeline.io.histories import read_bucket
from pipeline.io.memory import MemoryRecord, Trial, UnitGains, gains_claims, memory_claims, require_memory
from pipeline.io.neighbours import open_neighbours, read_neighbours
from pipeline.io.night import Night
from pipeline.model.encoders import columns_read
from pipeline.retrieval.all_items import memory_of_indexes
from pipeline.retrieval.index import NotFiniteError
from pipeline.retrieval.memory import Memory, MemoryBonuses, best_counts, choose, grid, ndcg_with_each
from pipeline.settings import Settings
from pipeline.stages.devices import device_for, memory_to_hold
from pipeline.stages.encode import encode_sequences
from pipeline.stages.rules import needs_bonus
from pipeline.stages.runner import Actors, Payload, Runner, Stage

CUTOFF = 10  # of the NDCG, as in the training's validation
USERS_AT_ONCE = 4_096  # whose items with a count are held at once, some kilobytes per user
SEED = 0  # of the sample of users
NEIGHBOUR_BYTES = 4  # in memory for each byte of the compressed files, which are read one after the other
REMEDY = "run jobs/choose_memory.py again"


def memory_of_neighbours(night: Night) -> int:
    """About the bytes that a process takes to read and hold the neighbours. Raises InputError without them."""
    return NEIGHBOUR_BYTES * sum(file.bytes for file in open_neighbours(night).files)


def bonus_source(night: Night, settings: Settings) -> MemoryBonuses | None:
    """The source of the bonuses of queries; None when counts have no part in the score.

    Raises InputError when nothing was chosen yet, or when the neighbours are not there.
    """
    if not uses_memory(night, settings):
        return None
    record = require_memory(night)
    return MemoryBonuses(Memory(record.weight, record.scale), read_neighbours(night), settings.memory.max_items)


def uses_memory(night: Night, settings: Settings) -> bool:
    """Whether counts have a part in the score. Raises InputError when that was not chosen yet."""
    return settings.memory.enabled and require_memory(night).weight > 0


def memory_of_bonuses(night: Night, settings: Settings) -> int:
    """About the bytes that a process takes to hold the source of the bonuses."""
    return memory_of_neighbours(night) if uses_memory(night, settings) else 0


def choose_memory(runner: Runner, night: Night, settings: Settings) -> MemoryRecord:
    """Measure every weight and scale of the grid on validation users and choose, unless the choice exists.

    The model is the selected one and the counts are of the training events, as in the evaluation. Raises InputError
    when either is not there, and the errors of `Runner.run_chain`.
    """
    selection = night.selection
    existing = memory_claims(night).read(0)
    if existing is not None:
        return existing
    units = range(settings.output.num_buckets)
    memory = memory_to_hold(model_bytes(selection)) + memory_of_neighbours(selection)
    memory += memory_of_indexes(settings.model.mol)
    arguments = {"night": selection, "settings": settings}
    gpus = settings.cluster.gpus_per_actor
    stage = Stage(MemoryTrials, arguments, Actors.AS_MANY_AS_FIT, gpus=gpus, memory=memory, searches=True)
    missing = gains_claims(night).missing(units)
    if missing:
        runner.run_chain("choose the weight of counts", missing, [stage])
    parts = [gains_claims(night).require(unit, REMEDY) for unit in units]
    return memory_claims(night).claim(0, _record(selection, settings, parts))


def _record(selection: Night, settings: Settings, parts: list[UnitGains]) -> MemoryRecord:
    memories = list(grid(settings.memory.weights, settings.memory.scales))
    without = sum((part.without for part in parts), start=MeanSum())
    gains = [sum((part.gains[number] for part in parts), start=MeanSum()) for number in range(len(memories))]
    number = choose(memories, gains)
    chosen = Memory(0.0, min(settings.memory.scales)) if number is None else memories[number]
    return MemoryRecord(
        weight=chosen.weight,
        scale=chosen.scale,
        num_users=without.count,
        ndcg=without.mean + (0.0 if number is None else gains[number].mean),
        ndcg_without=without.mean,
        selected=selection.checkpoint.id,
        neighbours=selection.neighbours.id,
        trials=[
            Trial(weight=memory.weight, scale=memory.scale, ndcg=without.mean + gain.mean)
            for memory, gain in zip(memories, gains, strict=True)
        ],
    )


class MemoryTrials:
    """Ranks the held-out items of a unit's validation users with every memory of the grid."""

    def __init__(self, night: Night, settings: Settings) -> None:
        self._night, self._settings = night, settings
        self._memories = [Memory(0.0, 1.0), *grid(settings.memory.weights, settings.memory.scales)]
        self._device = device_for(settings.cluster.gpus_per_actor)
        self._model = load_model(night.storage, night.checkpoint).to(self._device)
        self._neighbours = read_neighbours(night)
        self._needs_count_N = needs_bonus(night)

    def __call__(self, unit: int, payload: Payload) -> bytes:
        """Claim what was measured. Raises InputError when a vector of an item, or a score, is not a number."""
        memory, storage = self._settings.memory, self._night.storage
        num_users = -(-memory.num_users // self._settings.output.num_buckets)
        users = users_to_choose_with(read_bucket(storage, self._night.histories, unit), num_users, self._settings)
        without, gains = MeanSum(), [MeanSum() for _ in self._memories[1:]]
        for tile in users.tiles(USERS_AT_ONCE):
            plain_B, *others = self._ndcgs(tile)
            without += MeanSum.of(plain_B)
            gains = [gain + MeanSum.of(ndcg_B - plain_B) for gain, ndcg_B in zip(gains, others, strict=True)]
        gains_claims(self._night).claim(unit, UnitGains(without=without, gains=gains))
        return b""

    def _ndcgs(self, users: ValidationUsers) -> Floats:
        """(T, B) for T memories; a user whose query is not finite finds nothing."""
        queries = encode_sequences(self._model, users.histories, users.user_keys)
        sound = queries.is_finite_B.nonzero()[:, 0]
        asking = users.take(sound.numpy())
        counts = best_counts(self._neighbours, asking.histories, asking.seen, self._settings.memory.max_items)
        ndcg_TB = np.zeros((len(self._memories), len(users)))
        try:
            ndcg_TB[:, sound.numpy()] = ndcg_with_each(
                *(self._memories, self._model, queries.take(sound).to(self._device), asking, counts, CUTOFF),
                self._settings.search.backend,
                self._needs_count_N,
            )
        except NotFiniteError as error:
            model = self._night.checkpoint.id
            raise InputError(f"model {model}: {error}; train again with a lower train.learning_rate") from None
        return ndcg_TB


def users_to_choose_with(bucket: Bucket, num_users: int, settings: Settings) -> ValidationUsers:
    """Up to `num_users` users of a bucket, a seeded sample of those with a validation event on an item that may be
    shown to them."""
    histories = bucket.cut("train", columns_read(settings.model))
    users = validation_users(histories, bucket.held_out("validation"), bucket.user_keys, bucket.seen("train"))
    smallest = np.argsort(sampling_keys(users.user_keys, SEED), kind="stable")[:num_users]
    return users.take(np.sort(smallest))
