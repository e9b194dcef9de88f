"""The Memory artifact: the weight of item-to-item counts in the score, chosen once a night."""

from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.evaluation.metrics import MeanSum
from pipeline.io.artifacts import Claims, no_objects
from pipeline.io.night import Night


class UnitGains(Config):
    """NDCG@10 of one unit's validation users: without memory, and by how much each memory of the grid changes it."""

    without: MeanSum
    gains: list[MeanSum]


class Trial(Config):
    """A memory of the grid and its NDCG@10."""

    weight: float
    scale: float
    ndcg: float


class MemoryRecord(Config):
    """The chosen memory, and all trials."""

    weight: float  # 0: the counts have no part in the score
    scale: float
    num_users: int  # validation users that it was chosen with
    ndcg: float  # NDCG@10 with the chosen weight
    ndcg_without: float
    selected: str  # id of the model
    neighbours: str
    trials: list[Trial]


def memory_claims(night: Night) -> Claims[MemoryRecord]:
    """The claim of the night's choice: part 0 is the only one."""
    return Claims(night.storage, night.memory.prefix, "choice", MemoryRecord, no_objects)


def gains_claims(night: Night) -> Claims[UnitGains]:
    """The claims of what was measured: part n is unit n."""
    return Claims(night.storage, night.memory.prefix, "unit", UnitGains, no_objects)


def read_memory(night: Night) -> MemoryRecord | None:
    """Read the choice; None when it is not made yet."""
    return memory_claims(night).read(0)


def require_memory(night: Night) -> MemoryRecord:
    """Read the choice. Raises InputError when it is not made yet."""
    record = read_memory(night)
    if record is None:
        raise InputError(
            f"{night.storage.uri}/{night.memory.prefix}: not there; run jobs/choose_memory.py first, or set "
            "memory.enabled to false"
        )
    return record
