"""Every key of the configuration, with its default. `conf/*.yaml` fills these and nothing else.

One tree for all jobs, free of torch and Ray, so that a wrong key is refused before anything heavy is loaded.
"""

import os
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    field_validator,
    model_validator,
)

from pipeline.config import Config, TimeZone

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Dropout = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=0)]
Rank = Annotated[int, Field(ge=2)]
MemoryWeight = Annotated[float, Field(ge=0.0, le=1_000.0)]  # a sum far above all MoL scores
MemoryScale = Annotated[float, Field(ge=1e-6, le=1e6)]
RuleName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
Words = Annotated[
    tuple[Annotated[str, StringConstraints(to_lower=True, strip_whitespace=True)], ...], Field(strict=False)
]


def _ray_can_give(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(f"{gpus:g}: give a share of one GPU, or a whole number of GPUs")
    return gpus


Gpus = Annotated[float, Field(ge=0.0), AfterValidator(_ray_can_give)]  # per actor

TABLE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
SIMULATED = "simulated"


def default_root() -> str:
    """The root when none is configured: `$NIGHTRAILS_ROOT`, else `nightrails-data` in the working directory.

    A job that was submitted to Ray works in a temporary folder, which Ray removes with its session: it takes
    `nightrails-data` in the home directory instead.
    """
    given = os.environ.get("NIGHTRAILS_ROOT")
    if given:
        return given
    here = Path.cwd()
    unpacked_by_ray = any(part.startswith("_ray_pkg_") for part in here.parts)
    return str((Path.home() if unpacked_by_ray else here) / "nightrails-data")


def absolute(location: str) -> str:
    """Make a path absolute, because workers have another working directory; leave a URI as it is."""
    return location if "://" in location else str(Path(location).expanduser().absolute())


Location = Annotated[str, Field(min_length=1), AfterValidator(absolute)]  # a folder, a file or a URI


class SimulateSettings(Config):
    """The simulated log (`jobs/simulate_log.py`)."""

    num_users: PositiveInt = 3_000
    num_items: PositiveInt = 2_000
    num_events: PositiveInt = 120_000
    num_days: PositiveInt = 30
    last_day: date = Field(default=date(2026, 11, 20), strict=False)
    num_tastes: PositiveInt = 24  # hidden clusters: each item belongs to one, users drift between them
    repeated_share: Share = 0.01  # events delivered twice
    late_share: Share = 0.01  # events that arrive one to three partitions after their day
    orphan_share: Share = 0.002  # events on items that are not in the catalogue
    bot_share: Share = 0.002  # users that click thousands of random items
    cold_share: Share = 0.05  # users and items that appear in the last days only
    seed: Count = 0


class LogSettings(Config):
    """Where the log is, and the column map of `conf/sources/` that reads it."""

    uri: Location | None = None  # None for the simulated log, which lies below the root
    source: str = SIMULATED
    time_zone: TimeZone = "UTC"  # in which the log's days begin: those of its ds= partitions and of the split
    # The newest day of the log must not be older than this. None: any; then a late log serves its newest day again.
    max_age_days: Count | None = None

    @model_validator(mode="after")
    def _has_a_location(self) -> Self:
        if (self.uri is None) != (self.source == SIMULATED):
            raise ValueError(f"give log.uri with every log.source but {SIMULATED!r}, and only then")
        return self


class ItemsSettings(Config):
    """The catalogue, an optional Parquet table. Items that its columns `status`, `available_from` and `available_until`
    hide on the day are not shown; every status must be in one of the two lists, in lower case."""

    uri: Location | None = None  # None: the items of the log
    max_gigabytes: PositiveFloat = 4.0  # of the whole catalogue in memory; a larger one is refused
    live_statuses: Words = ("active", "available", "enabled", "in_stock", "live", "online", "published")
    hidden_statuses: Words = (
        *("archived", "deleted", "disabled", "discontinued", "draft", "expired", "hidden", "inactive", "offline"),
        *("out_of_stock", "paused", "removed", "retired", "sold", "sold_out", "unavailable", "unpublished"),
    )


class QueriesSettings(Config):
    """The users to serve tonight, an optional Parquet table."""

    uri: Location | None = None  # None: everybody with a history
    # What a requested user without a history gets. skip: no list; fallback: the most popular items, as `source` and
    # `status` say; raise: the night ends, with the first such users.
    cold_users: Literal["skip", "fallback", "raise"] = "skip"


class BlockSettings(Config):
    """A Parquet table of items that are not shown: `item_id` for nobody, with `user_id` only for this user. A row with
    a date or time in `until` counts up to it."""

    uri: Location


class NeedSettings(Config):
    """A part of each list."""

    items: PositiveInt  # at least so many
    of: str  # SQL condition on the columns of the item: those for which it is TRUE


class RulesSettings(Config):
    """What may be shown to whom tonight, in lists of all sources. The keys below `show_if`, `block` and `at_least` are
    names of your choice, which errors and the audit use."""

    # SQL conditions on the columns of the item and of the query: an item is shown where all of them are TRUE.
    show_if: dict[RuleName, str] = Field(default_factory=dict)
    block: dict[RuleName, BlockSettings] = Field(default_factory=dict)
    # Users with the same values in the query columns that conditions compare are a group; each group needs a mask over
    # all items. A part `item.x <> query.y` needs none.
    max_groups: PositiveInt = 10_000
    # Rules for a list as a whole. It is chosen from a longer ranking, which grows until the rules can be kept, at most
    # to the `max_depth` best items of a user.
    at_most: dict[str, PositiveInt] = Field(default_factory=dict)  # items with the same value, by column of the item
    at_least: dict[RuleName, NeedSettings] = Field(default_factory=dict)
    min_score: float | None = None  # of the model's lists
    # What an item loses of its score, times its cosine to the nearest item that is in the list. Of the model's lists.
    diversity: Annotated[float, Field(ge=0.0, le=1_000.0)] = 0.0
    max_depth: PositiveInt = 2_000

    @property
    def are_there(self) -> bool:
        """Whether any rule is configured."""
        return bool(self.show_if or self.block or self.are_of_lists)

    @property
    def are_of_lists(self) -> bool:
        """Whether a rule is of a list as a whole."""
        return bool(self.at_most or self.at_least or self.min_score is not None or self.diversity)


class SplitSettings(Config):
    """What is held out of training."""

    method: Literal["time", "leave_one_out"] = "time"
    validation_days: PositiveInt = 1
    test_days: PositiveInt = 1


class PrepareSettings(Config):
    """Cleaning of the log (`jobs/prepare.py`)."""

    lookback_days: PositiveInt | None = None  # to learn from; None: the whole log
    # What a user has seen is not shown to them again, unless these two keys let it back: what they did longer ago than
    # so many days (None: never), and what they did only in events of other types (None: events of all types hide their
    # items; []: none does, so that everything may be shown again).
    seen_lookback_days: PositiveInt | None = None
    seen_event_types: tuple[str, ...] | None = Field(default=None, strict=False)
    max_user_events_per_day: PositiveInt = 2_000  # a user with more on any day is taken for a bot and left out
    max_bad_share: Share = 0.01  # of all rows; above it the log is refused
    max_duplicate_share: Share = 0.5  # of all rows, delivered again, or with the event_id of another event
    max_orphan_share: Share = 0.05  # of events, on items that are not in the catalogue; above it the log is refused
    # The events of ds beside the days before (pipeline/data/volume.py): times as many, or as few, as usual; the same of
    # the share of each type of event; and no event on one of the days before. warn: said in the log, in
    # validation-….json and in the published manifest; error: the log is refused.
    odd_days: Literal["ignore", "warn", "error"] = "warn"
    max_day_change: Annotated[float, Field(ge=1.0)] = 2.0
    max_type_change: Annotated[float, Field(ge=1.0)] = 3.0
    rows_per_task: PositiveInt = 1_000_000  # bounds the memory of one task
    # Keep what was read of each ds= partition, below <root>/read, so that the next night reads the new ones only.
    keep_partitions: bool = True

    @property
    def days_read(self) -> int | None:
        """The last days of the log that matter, to learn from or as seen; None: all."""
        if self.lookback_days is None or self.seen_event_types == ():
            return self.lookback_days
        return None if self.seen_lookback_days is None else max(self.lookback_days, self.seen_lookback_days)


class MolSettings(Config):
    """Mixture-of-Logits (arXiv 2407.15462): P_Q × P_X components of width d, gated by three small networks."""

    num_query_components: PositiveInt = 8
    num_item_components: PositiveInt = 4
    # A logit is a cosine over the temperature: in few dimensions too many items are near each other.
    component_dim: PositiveInt = 64
    query_hidden_dim: PositiveInt = 256
    query_activation: Literal["swiglu", "geglu"] = "swiglu"
    gate_hidden_dim: PositiveInt = 128
    temperature: PositiveFloat = 0.05
    # Share of the gate that the first pair of components has before training; 0: as much as each other pair. The
    # dot-product head trains this pair on its own, so that MoL starts as that dot product. Without a head
    # (train.head_weight: 0) it should be 0.
    first_pair_share: Dropout = 0.8
    num_user_hashes: Count = 0  # rows of the user-id table; 0 leaves the user-id component out
    query_dropout: Dropout = 0.0
    user_dropout: Dropout = 0.5
    item_dropout: Dropout = 0.1
    cross_dropout: Dropout = 0.0
    gate_dropout: Dropout = 0.2

    @model_validator(mode="after")
    def _user_component_leaves_others(self) -> Self:
        if self.num_user_hashes and self.num_query_components < 2:
            raise ValueError("mol.num_query_components must be at least 2 when mol.num_user_hashes is set")
        return self


class ContentSettings(Config):
    """What the model learns of an item beside the item itself: features of these columns of the catalogue. So an item
    that nobody has met yet has a place too. Without any column an item is a row of a table, and no more."""

    values: tuple[str, ...] = Field(default=(), strict=False)  # each value is a feature; of a list, each of its values
    words: tuple[str, ...] = Field(default=(), strict=False)  # of texts: each word
    numbers: tuple[str, ...] = Field(default=(), strict=False)  # the interval that a number lies in
    num_hashes: PositiveInt = 16_384  # rows of the table of features; two may share a row
    # Share of an item's uses in training in which it is known by its features alone.
    id_dropout: Dropout = 0.2

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        return tuple(dict.fromkeys([*self.values, *self.words, *self.numbers]))


EncoderName = Literal["sasrec", "ligr", "hstu", "bag"]
Positions = Literal["start", "relative", "both", "none"]

# What each encoder can know of positions; the first is its default.
POSITIONS: Mapping[EncoderName, tuple[Positions, ...]] = {
    "sasrec": ("start",),
    "ligr": ("start", "relative", "both", "none"),
    "hstu": ("both", "relative", "start", "none"),
    "bag": ("none",),
}


class ModelSettings(Config):
    """Query encoder and similarity."""

    encoder: EncoderName = "sasrec"
    # start: each place in the history has a learned vector; relative: each distance between two events a learned number
    # in the attention. A place counted from the end changes with every event, so that training, which asks for a query
    # after each event at once, could not give it; the distance is the same in training and serving.
    positions: Positions = Field(default_factory=lambda others: POSITIONS[others.get("encoder", "sasrec")][0])
    reads_times: bool = False  # hstu only: attention also depends on the time between two events
    dim: PositiveInt = 128
    num_blocks: PositiveInt = 2  # not of bag
    num_heads: PositiveInt = 2  # not of bag
    # Width of the feed-forward networks, which hstu has not. Default: 128; of ligr four times dim.
    ffn_dim: PositiveInt = Field(
        default_factory=lambda others: 4 * others.get("dim", 64) if others.get("encoder") == "ligr" else 128
    )
    dropout: Dropout = 0.2
    max_length: PositiveInt = 50  # most recent events that the encoder reads
    content: ContentSettings = ContentSettings()
    mol: MolSettings = MolSettings()

    @model_validator(mode="after")
    def _encoder_knows_positions_and_times(self) -> Self:
        known = POSITIONS[self.encoder]
        if self.positions not in known:
            raise ValueError(
                f"model.positions ({self.positions}) means nothing to model.encoder {self.encoder}; it takes "
                + " or ".join(known)
            )
        if self.reads_times and self.encoder != "hstu":
            raise ValueError(
                f"model.reads_times (true) means nothing to model.encoder {self.encoder}; set it to false, or take hstu"
            )
        return self

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> Self:
        if self.dim % self.num_heads:
            raise ValueError(f"model.dim ({self.dim}) must be a multiple of model.num_heads ({self.num_heads})")
        return self


class TrainSettings(Config):
    """Training on Ray Train."""

    num_workers: PositiveInt = 1
    threads_per_worker: PositiveInt = 1
    use_gpu: bool = False
    max_epochs: PositiveInt = 100
    # The training ends well when this time is over, with the best weights so far. None: no limit.
    max_minutes: PositiveFloat | None = 180.0
    # A training that is killed goes on from the last state. Each state is written whole.
    steps_between_states: PositiveInt = 500
    steps_between_validations: PositiveInt = 1_000  # at most; a shorter epoch is validated at its end
    patience: PositiveInt = 5  # validations without a better NDCG before training stops
    batch_positions: PositiveInt = 2_048  # events to predict per worker and step, about
    num_negatives: PositiveInt = 128
    popular_negatives: Share = 0.8  # drawn as often as their items have events; the others uniformly
    log_q: bool = True  # correct the scores of negatives for how often they are drawn; false is the paper's way
    # Weight of the loss of the dot-product head: the first pair of components must find the item alone, among many more
    # negatives, or all items where they are no more. 0: none.
    head_weight: Annotated[float, Field(ge=0.0)] = 4.0
    head_negatives: PositiveInt = 4_096
    # Share of the negatives that are hard: items that the head takes for the right one, at the places of the same user
    # or few users. Without a head there are none. popular_negatives is a share of the others.
    hard_negatives: Share = 0.5
    # Positions that share one draw of negatives; 1 is the paper's way. Of fewer users, hard negatives suit each better.
    positions_per_negatives: PositiveInt = 64
    learning_rate: PositiveFloat = 2e-3
    warmup_steps: Count = 100  # the first steps, in which the learning rate rises to its value
    # An event counts half as much in the loss for each such time before the end of ds. None: old and new alike.
    half_life_days: PositiveFloat | None = None
    max_gradient_norm: PositiveFloat = 1.0  # a gradient with a larger norm is scaled down to it
    # The weights that are validated and kept are an average over about 1 / (1 - average_decay) steps. 0: over one.
    average_decay: Dropout = 0.999
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    mutual_information_weight: Annotated[float, Field(ge=0.0)] = 0.001
    user_norm_weight: Annotated[float, Field(ge=0.0)] = 0.1
    # auto: the native kernels train the pair network on CPUs that they support, else PyTorch. The backends round
    # differently, so each gives other weights.
    backend: Literal["auto", "torch", "native"] = "auto"
    # Of PyTorch's matrix products. The native kernels multiply bfloat16 numbers whatever this says (with AVX2 only:
    # float32). All weights, and what is summed natively, are float32.
    precision: Literal["float32", "bfloat16"] = "float32"
    # Users to validate on, a sample. None: as many as cost a fifth of the training's time or less, but at least 1,000.
    validation_queries: PositiveInt | None = None
    # The selected weights train on for this share of the epochs that they took, at least one: on all events, those of
    # the held-out days included, to serve; and on the events before the test days, to be measured. 0: no refits.
    refit: Share = 0.2
    # previous: goes on from the selected model of the last published night, with random rows for new items. Where there
    # is none, or its model or split settings are others, training starts from scratch, and the log says so.
    start_from: Literal["scratch", "previous"] = "scratch"
    # 1 trains every night. More: a night takes over the models of the last training as they are, if it is less than so
    # many days old and had the same settings. Of items that are new since then, only those with counts are shown.
    every_days: PositiveInt = 1
    seed: Count = 0


class LowRankSettings(Config):
    """The table of TopKLowRank, fitted to exact scores of tonight's users. It is made only if the search uses it."""

    # Numbers per item. Of several ranks, the one with the cheapest search for held-out users is kept.
    ranks: tuple[Rank, ...] = Field(default=(32, 64, 128, 256), strict=False, min_length=1)
    num_queries: PositiveInt = 2_048  # users for the fit; all items are scored against some of them
    num_items: PositiveInt = 32_768  # items for the fit


CountedPairs = Literal["following", "together"]


class CountsSettings(Config):
    """Item-to-item counts (`jobs/count_pairs.py`)."""

    # following: items that come soon after an item; together: all items of a history, where its order means nothing.
    # None: together with model.encoder bag, else following.
    pairs: CountedPairs | None = None
    num_neighbours: PositiveInt = 200  # per item: of the items that follow it, those with the highest scores


class MemorySettings(Config):
    """Item-to-item counts as a part of the score: MoL + weight · log(1 + count score / scale), for the items that
    follow a user's last events. `jobs/choose_memory.py` chooses weight and scale on validation users."""

    enabled: bool = True
    # 0 is tried too, and stands unless another weight is better by more than chance.
    weights: tuple[MemoryWeight, ...] = Field(
        default=(0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0), strict=False, min_length=1
    )
    scales: tuple[MemoryScale, ...] = Field(default=(0.001, 0.01, 0.1), strict=False, min_length=1)
    num_users: PositiveInt = 2_000  # to choose with, a sample; all items are searched for each
    max_items: PositiveInt = 300  # per user, that get a part: those with the highest count scores


class CorpusSettings(Config):
    """Item shards. An approximate result depends on their number, so it is set here and never by the machines."""

    num_shards: PositiveInt = 4
    low_rank: LowRankSettings = LowRankSettings()


# README, "How it is searched", explains each; "tuned" measures them and chooses one tonight.
SearchMethod = Literal["tuned", "exact", "exact_two_stage", "topk_avg", "topk_per_embd", "comb_topk", "topk_low_rank"]

SearchBackend = Literal["auto", "torch", "native", "triton"]

# Number types of the tables of stage 1, widest first.
TableDtype = Literal["float32", "bfloat16", "int8"]


class TuningSettings(Config):
    """How the search is chosen when `search.method` is `tuned`."""

    # Users times items. With fewer, exact search takes less than a minute on one core, and nothing is tried.
    min_pairs: Count = 100_000_000
    num_queries: PositiveInt = 256  # a sample of tonight's users
    max_seconds: PositiveInt = 300


class SearchSettings(Config):
    """Top-k search (`jobs/retrieve.py`)."""

    k: PositiveInt = 100
    method: SearchMethod = "tuned"
    num_preselected: PositiveInt = 1_000  # K' of TopKAvg and TopKLowRank, K_avg of CombTopK; per shard
    num_per_embd: PositiveInt = 100  # K' of TopKPerEmbd and CombTopK, per pair of components and shard
    # auto: the native kernels on CPUs that they support, else PyTorch. An exact method gives the same lists on all.
    backend: SearchBackend = "auto"
    # Number type of the tables of stage 1 in the native and Triton kernels. The published scores are exact with any
    # type; `tuned` also tries narrower ones.
    table_dtype: TableDtype = "bfloat16"
    target_recall: Share = 0.99  # recall that `tuned` must reach, against exact search
    tuning: TuningSettings = TuningSettings()
    max_escalated: Count = 0  # items per query and shard scored beyond the candidates to prove a list exact

    @property
    def is_exact(self) -> bool:
        """Whether the method finds the true top-k by construction."""
        return self.method in ("exact", "exact_two_stage")

    @model_validator(mode="after")
    def _preselects_enough(self) -> Self:
        if self.method in ("topk_avg", "topk_low_rank", "comb_topk") and self.num_preselected < self.k:
            raise ValueError(f"search.num_preselected ({self.num_preselected}) must be at least search.k ({self.k})")
        return self


class ClusterSettings(Config):
    """Where and how the stages run. Only GPUs change a result: its last bits."""

    # local: everything runs in this process, without Ray; for small logs, debugging and tests.
    mode: Literal["ray", "local"] = "ray"
    replicas: PositiveInt = 1  # actors per shard; small shards share theirs
    cpus_per_actor: PositiveFloat = 0.25
    gpus_per_actor: Gpus = 0.0  # of what searches and embeds items
    gpus_per_encoder: Gpus = 0.0  # of what encodes queries
    threads_per_actor: PositiveInt = 1
    max_stages_per_wave: PositiveInt = 64
    deadline_minutes: PositiveInt = 720
    wait_minutes: Annotated[float, Field(ge=0.0)] = 10.0  # for a node to join when a step does not fit on the cluster
    # A search fails when no unit moves for this long, or for wait_minutes if that is longer.
    no_progress_minutes: PositiveInt = 5


class OutputSettings(Config):
    """The published table."""

    num_buckets: PositiveInt = 8  # user buckets: the unit of work from prepare to the output file
    layout: Literal["long", "nested"] = "long"
    surface: str = "default"
    # Columns of the catalogue that are published beside each item, such as available_until: a cache can then drop what
    # has expired. In the nested layout they are lists, as item_ids is.
    item_columns: tuple[str, ...] = Field(default=(), strict=False)


class EvaluateSettings(Config):
    """Held-out metrics, and the recall check of an approximate search."""

    cutoffs: tuple[PositiveInt, ...] = Field(default=(10, 50, 100), strict=False, min_length=1)
    max_queries: PositiveInt = 20_000  # a seeded sample of the users that have held-out events
    num_checked: PositiveInt = 500  # queries whose approximate list is compared with exact search
    seed: Count = 0


class GateSettings(Config):
    """The least that a run must reach to be published; below it the job exits with 10 and yesterday's table stays."""

    min_overlap: Share = 0.95  # mean overlap@k of the approximate lists with exact search
    min_lift_over_popularity: Annotated[float, Field(ge=0.0)] = 0.0  # hit rate at the smallest cutoff / popularity's
    # The same over item-to-item counts. A night below 1 is published with a warning, unless this gate refuses it.
    min_lift_over_counts: Annotated[float, Field(ge=0.0)] = 0.0
    max_fallback_share: Share = 1.0  # of the requested users, with queries.cold_users: fallback
    max_error_share: Share = 0.01  # of the requested users: no list, because the computation failed for them alone


class Settings(Config):
    """The whole configuration of a night."""

    root: Location = Field(default_factory=default_root, validate_default=True)
    root_is_shared: bool = False  # a local root that every node of the cluster mounts
    name: str = "candidates"
    log: LogSettings = LogSettings()
    items: ItemsSettings = ItemsSettings()
    queries: QueriesSettings = QueriesSettings()
    rules: RulesSettings = RulesSettings()
    simulate: SimulateSettings = SimulateSettings()
    prepare: PrepareSettings = PrepareSettings()
    split: SplitSettings = SplitSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    counts: CountsSettings = CountsSettings()
    memory: MemorySettings = MemorySettings()
    corpus: CorpusSettings = CorpusSettings()
    search: SearchSettings = SearchSettings()
    cluster: ClusterSettings = ClusterSettings()
    output: OutputSettings = OutputSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    gates: GateSettings = GateSettings()

    @property
    def has_low_rank(self) -> bool:
        """Whether the corpus may need the low-rank table."""
        return self.search.method in ("topk_low_rank", "tuned")

    @property
    def counted_pairs(self) -> CountedPairs:
        """Which items of a history are counted as pairs."""
        return self.counts.pairs or ("together" if self.model.encoder == "bag" else "following")

    def with_search(self, changes: Mapping[str, object]) -> "Settings":
        """Copy the settings with some keys of `search` changed."""
        return self.model_copy(update={"search": self.search.model_copy(update=dict(changes))})

    @field_validator("name")
    @classmethod
    def _is_a_table_name(cls, name: str) -> str:
        if not TABLE_NAME.fullmatch(name):
            raise ValueError(
                f"{name!r}: lower-case letters, digits, - and _, at most 63, starting with a letter or digit"
            )
        return name

    @model_validator(mode="after")
    def _every_worker_has_a_bucket(self) -> Self:
        if self.train.num_workers > self.output.num_buckets:
            raise ValueError(
                f"train.num_workers ({self.train.num_workers}) must be at most output.num_buckets "
                f"({self.output.num_buckets}): each worker trains on buckets of its own"
            )
        return self

    @model_validator(mode="after")
    def _lists_can_keep_to_their_rules(self) -> Self:
        owed, k = sum(need.items for need in self.rules.at_least.values()), self.search.k
        if owed > k:
            raise ValueError(f"rules.at_least asks for {owed} items together, but a list has {k} (search.k)")
        if self.rules.are_of_lists and self.rules.max_depth < k:
            raise ValueError(f"rules.max_depth ({self.rules.max_depth}) must be at least search.k ({k})")
        return self

    @model_validator(mode="after")
    def _preselects_enough(self) -> Self:
        num_pairs = self.model.mol.num_query_components * self.model.mol.num_item_components
        search, most = self.search, num_pairs * self.search.num_per_embd
        if search.method == "topk_per_embd" and most < search.k:
            raise ValueError(
                f"search.num_per_embd ({search.num_per_embd}) times {num_pairs} pairs of components must be at least "
                f"search.k ({search.k})"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if self.log.source != SIMULATED:
            return self
        faults = self.faults_with(self.simulate.num_items, "simulate.num_items")
        held_out = self.split.validation_days + self.split.test_days
        if self.split.method == "time" and held_out >= self.simulate.num_days:
            faults.append(
                f"split.validation_days + split.test_days ({held_out}) must leave days of simulate.num_days "
                f"({self.simulate.num_days}) to train on"
            )
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def faults_with(self, num_items: int, known_from: str) -> list[str]:
        """List the settings that do not fit a corpus of `num_items` items; `known_from` says who counted the items."""
        faults = []
        if self.train.num_negatives >= num_items:
            faults.append(
                f"train.num_negatives ({self.train.num_negatives}) must be less than the number of items "
                f"({known_from}: {num_items})"
            )
        if self.search.k > num_items:
            faults.append(f"search.k ({self.search.k}) must be at most the number of items ({known_from}: {num_items})")
        return faults
