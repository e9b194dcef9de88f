"""Artifacts, which one job leaves for the next, and the manifests that make them exist."""

from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any

from pydantic import Field

from pipeline.config import Config

FORMAT = 2  # of manifests and commits

Count = Annotated[int, Field(strict=False)]  # format 1 wrote a count as 12.0


class FileEntry(Config):
    """One immutable file of an artifact; `key` is relative to the artifact's (or the table's) root."""

    key: str
    bytes: int
    rows: int
    sha256: str


class Manifest(Config):
    """The list of an artifact's files, written last: the artifact exists when its manifest does."""

    format: int = FORMAT
    kind: str
    id: str
    lineage: dict[str, str]  # ids of the artifacts and inputs it was made from
    settings: dict[str, Any]  # the part of the configuration that shaped the artifact
    files: tuple[FileEntry, ...] = Field(strict=False)
    counts: dict[str, Count] = Field(default_factory=dict)
    measures: dict[str, float] = Field(default_factory=dict)
    created_at: str
    versions: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class Artifact:
    """A folder below the root. Its id is a fingerprint of everything that the content depends on."""

    folder: str  # histories, neighbours, trainings, models, memories, corpora, tunings, evaluations
    id: str

    @property
    def prefix(self) -> str:
        return f"{self.folder}/{self.id}"

    def key(self, name: str) -> str:
        """The key of a file of this artifact."""
        return f"{self.prefix}/{name}"


@dataclass(frozen=True)
class CandidateRun:
    """One run of one table and day: `run-<fp16>/` under the day, published by a commit beside it.

    The folder is the bare day: engines make a column of a folder `ds=…`, and the files have a column `ds`.
    """

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
        return f"{self.table_prefix}/{self.ds.isoformat()}/{self.run_id}"
