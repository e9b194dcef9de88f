"""The choice of a search, as an artifact: made once a night, so that a rerun searches in the same way."""

from dataclasses import asdict
from typing import Any

from pydantic import ValidationError

from pipeline.artifacts import Night
from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.io.artifacts import versions
from pipeline.io.storage.base import ObjectNotFoundError, Storage
from pipeline.retrieval.tuning import Tuning
from pipeline.settings import SearchMethod, Settings, TableDtype


class TuningRecord(Config):
    """`tuning.json`: what was chosen, why, and all that was tried."""

    corpus: str
    method: SearchMethod
    num_preselected: int
    num_per_embd: int
    table_dtype: TableDtype
    reason: str
    measured: dict[str, Any]
    versions: dict[str, str]


def write_tuning(storage: Storage, night: Night, tuning: Tuning) -> None:
    """Keep the choice; that of an earlier attempt stands."""
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
    storage.create(night.tuning.key, record.model_dump_json(indent=1).encode())


def read_tuning(storage: Storage, night: Night) -> TuningRecord | None:
    """The choice, None when none was made yet. Raises InputError when it is damaged."""
    try:
        return TuningRecord.model_validate_json(storage.read(night.tuning.key))
    except ObjectNotFoundError:
        return None
    except ValidationError as error:
        raise InputError(
            f"{storage.uri}/{night.tuning.key}: not a tuning of ours ({error.error_count()} faults); remove it"
        ) from None


def tuned(storage: Storage, night: Night, settings: Settings) -> Settings:
    """The settings with the chosen search, when the search is to be chosen; else as they are."""
    if settings.search.method != "tuned":
        return settings
    record = read_tuning(storage, night)
    if record is None:
        raise InputError("search.method is tuned, but nothing was chosen yet; run jobs/tune.py first")
    chosen = record.model_dump(include={"method", "num_preselected", "num_per_embd", "table_dtype"})
    search = settings.search.model_copy(update=chosen)
    return settings.model_copy(update={"search": search})
