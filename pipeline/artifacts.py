"""What one job leaves for the next: names, places and manifests. An id is a fingerprint of what went in."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from typing import Any

from pydantic import Field

from pipeline.config import Config, fingerprint
from pipeline.settings import Settings

# Raised by hand when the same inputs would give other content.
HISTORIES_VERSION = 1
MODEL_VERSION = 1
CORPUS_VERSION = 5
SEARCH_VERSION = 4

FORMAT = 1


@dataclass(frozen=True, order=True)
class InputObject:
    """One object of tonight's input, as the store lists it. `etag` changes when the content does."""

    key: str
    size: int
    etag: str


class FileEntry(Config):
    """One immutable file of an artifact; `key` is relative to the artifact's (or the table's) root."""

    key: str
    bytes: int
    rows: int
    sha256: str


class Manifest(Config):
    """Written last: its existence makes a Histories, Checkpoint or Corpus artifact exist."""

    format: int = FORMAT
    kind: str
    id: str
    lineage: dict[str, str]  # ids of the artifacts and inputs it was made from
    settings: dict[str, Any]  # resolved configuration of the part
    files: tuple[FileEntry, ...] = Field(strict=False)
    counts: dict[str, float] = Field(default_factory=dict)
    created_at: str
    versions: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class Histories:
    """Clean histories by user bucket: `bucket-00000.parquet` …, `items.parquet`, `validation.json`."""

    id: str

    @property
    def prefix(self) -> str:
        return f"histories/{self.id}"

    def bucket_key(self, bucket: int) -> str:
        return f"{self.prefix}/bucket-{bucket:05d}.parquet"

    @property
    def items_key(self) -> str:
        return f"{self.prefix}/items.parquet"


@dataclass(frozen=True)
class Checkpoint:
    """A trained model: `model.safetensors`, `config.json`, `metrics.json`."""

    id: str

    @property
    def prefix(self) -> str:
        return f"models/{self.id}"


@dataclass(frozen=True)
class Corpus:
    """The embedded items in logical shards: `shard-00000-<sha16>.safetensors` …, each with a sidecar."""

    id: str

    @property
    def prefix(self) -> str:
        return f"corpora/{self.id}"


@dataclass(frozen=True)
class Tuning:
    """How tonight's corpus is searched, when that is measured and chosen: `tuning.json`."""

    id: str

    @property
    def key(self) -> str:
        return f"tunings/{self.id}/tuning.json"


@dataclass(frozen=True)
class Evaluation:
    """Held-out metrics of a corpus searched in one way: `metrics.json`."""

    id: str

    @property
    def prefix(self) -> str:
        return f"evaluations/{self.id}"


@dataclass(frozen=True)
class CandidateRun:
    """One run of one table and day: `run-<fp16>/` under `ds=…/`, published by a commit beside it."""

    table: str
    ds: date
    fp: str

    @property
    def run_id(self) -> str:
        return f"run-{self.fp}"

    @property
    def table_prefix(self) -> str:
        return f"candidates/{self.table}"

    @property
    def prefix(self) -> str:
        return f"{self.table_prefix}/ds={self.ds.isoformat()}/{self.run_id}"


@dataclass(frozen=True)
class Night:
    """The names of everything one night makes; all are known before anything is computed."""

    ds: date
    histories: Histories
    checkpoint: Checkpoint
    corpus: Corpus
    tuning: Tuning
    evaluation: Evaluation
    run: CandidateRun


def name_night(
    settings: Settings,
    ds: date,
    log: Iterable[InputObject],
    source: dict[str, Any],
    items: Iterable[InputObject] = (),
    queries: Iterable[InputObject] = (),
) -> Night:
    """Fingerprint each artifact of a night from its inputs and the settings that shape it.

    `source` is the resolved column map of `conf/sources/`. Settings that cannot change a result (threads, tiles,
    workers' placement) stay out, so that changing them reuses what is done.
    """
    histories = Histories(
        fingerprint(
            "histories",
            HISTORIES_VERSION,
            ds.isoformat(),
            _plain(log),
            source,
            _plain(items),
            settings.prepare.model_dump(mode="json", exclude={"rows_per_task"}),
            settings.split,
            settings.output.num_buckets,
        )
    )
    train = settings.train.model_dump(mode="json", exclude={"threads_per_worker", "use_gpu", "max_failures"})
    checkpoint = Checkpoint(fingerprint("model", MODEL_VERSION, histories.id, settings.model, train))
    left_out = set() if settings.has_low_rank else {"low_rank"}
    shards = settings.corpus.model_dump(mode="json", exclude=left_out)
    corpus = Corpus(fingerprint("corpus", CORPUS_VERSION, checkpoint.id, shards))
    without = {"query_tile", "item_tile"}
    if settings.search.method == "tuned":
        without |= {"num_preselected", "num_per_embd"}
    else:
        without |= {"target_recall", "tuning"}
    search = settings.search.model_dump(mode="json", exclude=without)
    searched = fingerprint("search", SEARCH_VERSION, corpus.id, search)
    evaluation = Evaluation(fingerprint("evaluation", searched, settings.evaluate))
    run = fingerprint("run", searched, settings.output, _plain(queries), settings.name, ds.isoformat())
    candidates = CandidateRun(settings.name, ds, run)
    return Night(ds, histories, checkpoint, corpus, Tuning(searched), evaluation, candidates)


def _plain(objects: Iterable[InputObject]) -> list[list[str | int]]:
    return [[item.key, item.size, item.etag] for item in sorted(objects)]
