"""The Tuning artifact: the search is chosen once a night, so that a rerun searches in the same way."""

from dataclasses import asdict
from typing import Any

from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.io.artifacts import Claims, no_objects, require_manifest, versions
from pipeline.io.night import Night
from pipeline.retrieval.tuning import Tuning
from pipeline.settings import SearchMethod, Settings, TableDtype

CHOSEN = {"method", "num_preselected", "num_per_embd", "table_dtype"}  # keys of `search`


class TuningRecord(Config):
    """The chosen search, the reason, and all trials (`measured`)."""

    corpus: str
    method: SearchMethod
    num_preselected: int
    num_per_embd: int
    table_dtype: TableDtype
    reason: str
    measured: dict[str, Any]
    versions: dict[str, str]


def tuning_claims(night: Night) -> Claims[TuningRecord]:
    """The claim of the night's choice: part 0 is the only one."""
    return Claims(night.storage, night.tuning.prefix, "tuning", TuningRecord, no_objects)


def are_searches_tried(night: Night, settings: Settings) -> bool:
    """Whether searches are tried tonight: `search.method` is tuned, and there are enough users and items for it to pay.

    Raises InputError when the histories are not prepared yet.
    """
    if settings.search.method != "tuned":
        return False
    min_pairs = settings.search.tuning.min_pairs
    return not min_pairs or num_pairs(night) >= min_pairs


def num_pairs(night: Night) -> int:
    """Users with a history times items. Raises InputError when the histories are not prepared yet."""
    counts = require_manifest(night.storage, night.histories, "prepare").counts
    return counts["users"] * counts["items"]


def write_exact(night: Night, settings: Settings, reason: str) -> TuningRecord:
    """Choose exact search, untried. Returns the choice of the first attempt, which stands."""
    search = settings.search
    record = TuningRecord(
        corpus=night.corpus.id,
        method="exact",
        num_preselected=search.num_preselected,
        num_per_embd=search.num_per_embd,
        table_dtype=search.table_dtype,
        reason=reason,
        measured={},
        versions=versions(),
    )
    return tuning_claims(night).claim(0, record)


def write_tuning(night: Night, tuning: Tuning) -> TuningRecord:
    """Write the choice. Returns the choice of the first attempt, which stands."""
    record = TuningRecord(
        corpus=night.corpus.id,
        method=tuning.chosen.method,
        num_preselected=tuning.chosen.num_preselected,
        num_per_embd=tuning.chosen.num_per_embd,
        table_dtype=tuning.chosen.table_dtype,
        reason=tuning.reason,
        measured=asdict(tuning),
        versions=versions(),
    )
    return tuning_claims(night).claim(0, record)


def read_tuning(night: Night) -> TuningRecord | None:
    """Read the choice; None when the search is not chosen yet."""
    return tuning_claims(night).read(0)


def as_chosen(night: Night, settings: Settings) -> Settings:
    """Put the search that was chosen tonight in place of `search.method: tuned`; other settings stay as they are.

    Raises InputError when the search is not chosen yet.
    """
    if settings.search.method != "tuned":
        return settings
    record = read_tuning(night)
    if record is None:
        raise InputError("search.method is tuned, but nothing was chosen yet; run jobs/tune.py first")
    return settings.with_search(record.model_dump(include=CHOSEN))
