"""The choice of a search, as an artifact: made once a night, so that a rerun searches in the same way."""

from dataclasses import asdict
from typing import Any

from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.io.artifacts import Claims, no_files, versions
from pipeline.io.night import Night
from pipeline.retrieval.tuning import Tuning
from pipeline.settings import SearchMethod, Settings, TableDtype

CHOSEN = {"method", "num_preselected", "num_per_embd", "table_dtype"}


class TuningRecord(Config):
    """What was chosen, why, and all that was tried."""

    corpus: str
    method: SearchMethod
    num_preselected: int
    num_per_embd: int
    table_dtype: TableDtype
    reason: str
    measured: dict[str, Any]
    versions: dict[str, str]


def tuning_claims(night: Night) -> Claims[TuningRecord]:
    """The one choice of the night is part 0."""
    return Claims(night.storage, night.tuning.prefix, "tuning", TuningRecord, no_files)


def write_tuning(night: Night, tuning: Tuning) -> TuningRecord:
    """Keep the choice; that of an earlier attempt stands and is returned."""
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
    """The choice, or None when none was made yet."""
    return tuning_claims(night).read(0)


def as_chosen(night: Night, settings: Settings) -> Settings:
    """The settings with the search that was chosen tonight, where `search.method` is `tuned`; else as they are.

    Raises InputError when nothing was chosen yet.
    """
    if settings.search.method != "tuned":
        return settings
    record = read_tuning(night)
    if record is None:
        raise InputError("search.method is tuned, but nothing was chosen yet; run jobs/tune.py first")
    return settings.with_search(record.model_dump(include=CHOSEN))
