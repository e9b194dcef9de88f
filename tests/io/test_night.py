"""What the name of each artifact covers: all keys of the configuration and all inputs that shape it, and no other."""

from collections.abc import Iterator
from dataclasses import astuple, replace
from datetime import date
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pytest

from pipeline.artifacts import Artifact
from pipeline.config import apply_overrides
from pipeline.data.sources import SourceSpec
from pipeline.errors import InputError
from pipeline.io.earlier import Earlier
from pipeline.io.inputs import Files, Inputs, Log, list_queries, read_user_ids
from pipeline.io.night import Night, name_night, open_night
from pipeline.io.storage import open_storage
from pipeline.io.storage.base import ObjectInfo
from pipeline.settings import Settings
from tests.io.inputs_on_disk import events, settings_for, write

DS = date(2026, 11, 20)
ARTIFACTS = (
    *("histories", "selected_neighbours", "measured_neighbours", "neighbours"),
    *("training", "selected", "measured", "checkpoint", "memory", "measured_corpus", "corpus"),
    *("tuning", "evaluation", "run"),
)
NOTHING, FROM_SEARCH, FROM_CORPUS, FROM_MODEL, EVERYTHING = (set(ARTIFACTS[first:]) for first in (14, 11, 9, 4, 0))
FROM_END = FROM_MODEL - {"training"}
FROM_REFIT = FROM_END - {"selected", "memory"}
FROM_COUNTS = FROM_SEARCH | {"selected_neighbours", "measured_neighbours", "neighbours", "memory"}
INPUTS = Inputs(DS, Log("place", (ObjectInfo("ds=2026-11-20/a", 7, "e1"), ObjectInfo("ds=2026-11-20/b", 8, "e2"))))
GIVEN = {"log": {"uri": "/log", "source": "default"}, "search": {"method": "exact"}}
# Which names the keys of a section are in; the keys that are in others, or in none, by themselves.
SECTIONS = {
    "prepare": EVERYTHING,
    "split": EVERYTHING,
    "counts": FROM_COUNTS,
    "memory": FROM_SEARCH | {"memory"},
    "model": FROM_MODEL,
    "train": FROM_MODEL,
    "corpus": FROM_CORPUS,
    "search": FROM_SEARCH,
    "evaluate": {"evaluation"},
    "output": {"run"},
    "name": {"run"},
}
KEYS = {
    "prepare.rows_per_task": NOTHING,
    "prepare.keep_partitions": NOTHING,
    "output.num_buckets": EVERYTHING,
    "search.target_recall": NOTHING,
    "items.live_statuses": EVERYTHING,
    "items.hidden_statuses": EVERYTHING,
    "train.refit": FROM_REFIT,
    "train.max_epochs": FROM_END,
    "train.max_minutes": FROM_END,
    "train.patience": FROM_END,
    "train.steps_between_states": NOTHING,
    "train.start_from": NOTHING,  # nothing is published that a night could start from or take over
    "train.every_days": NOTHING,
    "queries.cold_users": {"run"},
    "rules.max_groups": NOTHING,
    "rules.diversity": FROM_SEARCH,
    "rules.max_depth": NOTHING,  # without a rule for lists
    "cluster.gpus_per_actor": FROM_CORPUS | {"memory"},
    "cluster.gpus_per_encoder": FROM_SEARCH,
}
# With an exact search there is no low-rank table, and nothing is chosen.
PREFIXES = {"corpus.low_rank": NOTHING, "search.tuning": NOTHING}
# Keys that mean something to one encoder alone.
OF_ENCODER = {"model.positions": {"model": {"encoder": "ligr"}}, "model.reads_times": {"model": {"encoder": "hstu"}}}
OTHER_WORDS = {
    "split.method": "leave_one_out",
    "mol.query_activation": "geglu",
    "train.precision": "bfloat16",
    "model.positions": "relative",
    "train.backend": "torch",
    "train.start_from": "previous",
    "search.method": "exact_two_stage",
    "search.backend": "torch",
    "search.table_dtype": "int8",
    "output.layout": "nested",
    "queries.cold_users": "fallback",
    "prepare.odd_days": "error",
    "cluster.mode": "local",
}


def settings_of(*overrides: str) -> Settings:
    return Settings.model_validate(apply_overrides(GIVEN, overrides))


def night_of(settings: Settings, inputs: Inputs = INPUTS) -> Night:
    return name_night(open_storage("memory://names"), settings, inputs)


def names_of(night: Night) -> dict[str, str]:
    """The id of each artifact, and the fingerprint in that of the run."""
    return {name: getattr(night, name).id for name in ARTIFACTS[:-1]} | {"run": night.run.fp}


def renamed(one: Night, other: Night) -> set[str]:
    """The artifacts that have another name in the other night."""
    before, after = names_of(one), names_of(other)
    return {name for name in ARTIFACTS if before[name] != after[name]}


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def another(key: str, value: Any) -> Any:
    """Another value that the key may have."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 2
    if isinstance(value, float):
        return value / 2 or 0.25
    if isinstance(value, list):
        return value[:-1] or ["x"]
    return next((word for name, word in OTHER_WORDS.items() if key.endswith(name)), f"{value}x")


LEAVES = [
    (key, value)
    for key, value in leaves(settings_of().model_dump(mode="json"))
    if not key.startswith(("log.", "simulate.")) and value is not None and key not in ("model.encoder", "root")
]


@pytest.mark.parametrize(("key", "value"), LEAVES, ids=[key for key, _ in LEAVES])
def test_a_key_renames_what_it_shapes_and_what_is_made_from_that_and_nothing_else(key, value):
    by_prefix = next((names for prefix, names in PREFIXES.items() if key.startswith(prefix)), None)
    expected = KEYS.get(key, SECTIONS.get(key.partition(".")[0], NOTHING) if by_prefix is None else by_prefix)
    others = GIVEN | OF_ENCODER.get(key, {})
    before, changed = (
        Settings.model_validate(apply_overrides(others, more)) for more in ([], [f"{key}={another(key, value)}"])
    )
    assert changed != before
    assert renamed(night_of(before), night_of(changed)) == expected


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("search.num_preselected=999", NOTHING),  # what is chosen tonight is no setting
        ("search.num_per_embd=99", NOTHING),
        ("search.target_recall=0.5", FROM_SEARCH),
        ("search.tuning.num_queries=9", FROM_SEARCH),
        ("search.tuning.min_pairs=9", FROM_CORPUS),  # with fewer there is no low-rank table
        ("search.method=topk_low_rank", FROM_CORPUS),  # with any number there is one
        ("corpus.low_rank.num_queries=9", FROM_CORPUS),
        ("search.backend=torch", FROM_CORPUS),  # the low-rank table is made of its quick scores
    ],
)
def test_a_tuned_search_is_named_by_how_it_is_chosen(key, expected):
    tuned = "search.method=tuned"
    assert renamed(night_of(settings_of(tuned)), night_of(settings_of(tuned, key))) == expected


EARLIER = Earlier(date(2026, 11, 19), *(Artifact("models", name) for name in "abc"), is_reused=False)


@pytest.mark.parametrize(
    "change", [{}, {"selected": Artifact("models", "c")}, {"is_reused": True}, {"ds": date(2026, 11, 18)}]
)
def test_the_models_that_a_night_starts_from_or_takes_over_are_in_the_names_of_its_own(change):
    scratch, started = night_of(settings_of()), night_of(settings_of(), replace(INPUTS, earlier=EARLIER))
    assert renamed(scratch, started) == FROM_MODEL
    other = night_of(settings_of(), replace(INPUTS, earlier=replace(EARLIER, **change)))
    assert renamed(started, other) == (NOTHING if change.keys() <= {"ds"} else FROM_MODEL)


def test_a_training_that_starts_is_not_named_by_the_model_that_served():
    served = replace(EARLIER, served=Artifact("models", "d"))
    nights = [night_of(settings_of(), replace(INPUTS, earlier=each)) for each in (EARLIER, served)]
    assert renamed(*nights) == NOTHING
    nights = [night_of(settings_of(), replace(INPUTS, earlier=replace(e, is_reused=True))) for e in (EARLIER, served)]
    assert renamed(*nights) == FROM_MODEL


def changed_file(**change: Any) -> Log:
    return replace(INPUTS.log, files=(INPUTS.log.files[0], replace(INPUTS.log.files[1], **change)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"ds": date(2026, 11, 19)}, EVERYTHING),
        ({"log": changed_file(etag="e3")}, EVERYTHING),
        ({"log": changed_file(size=9)}, EVERYTHING),
        ({"log": changed_file(key="ds=2026-11-20/c")}, EVERYTHING),
        ({"log": replace(INPUTS.log, files=INPUTS.log.files[:1])}, EVERYTHING),
        ({"log": replace(INPUTS.log, source=SourceSpec(time_unit="ms"))}, EVERYTHING),
        ({"log": replace(INPUTS.log, uri="elsewhere", source_file="moved.yaml")}, NOTHING),
        ({"items": Files("place", (ObjectInfo("items", 1, "e"),))}, EVERYTHING),
        ({"queries": Files("place", (ObjectInfo("users", 1, "e"),))}, {"run"}),
    ],
)
def test_an_input_renames_all_that_is_made_from_it_wherever_it_lies(change, expected):
    assert renamed(night_of(settings_of()), night_of(settings_of(), replace(INPUTS, **change))) == expected


def test_the_kinds_of_artifacts_never_share_a_name():
    night = night_of(settings_of())
    assert len(set(names_of(night).values())) == len(ARTIFACTS)
    assert astuple(night.run) == ("candidates", DS, night.run.fp)


def test_partitions_after_the_day_are_no_part_of_its_night(tmp_path: Path) -> None:
    for day in ("2026-11-18", "2026-11-19"):
        write(tmp_path / "lake" / f"ds={day}" / "a.parquet", events())
    settings = settings_for(tmp_path, tmp_path / "lake")
    before = open_night(settings, date(2026, 11, 19))
    write(tmp_path / "lake" / "ds=2026-11-20" / "a.parquet", events())
    assert open_night(settings, date(2026, 11, 19)).run == before.run
    assert open_night(settings).ds == DS
    assert renamed(before, open_night(settings)) == EVERYTHING


def users_in(tmp_path: Path, *files: pa.Array) -> Files:
    for number, ids in enumerate(files):
        write(tmp_path / "users" / f"{number}.parquet", pa.table({"user_id": ids}))
    listed = list_queries(settings_for(tmp_path, tmp_path, queries={"uri": str(tmp_path / "users")}), DS)
    assert listed is not None
    return listed


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([pa.array(["b", "a"]), pa.array(["c", "b"]).dictionary_encode()], pa.array(["a", "b", "c"])),
        ([pa.array(["b", "a"], pa.large_string())], pa.array(["a", "b"])),
        ([pa.array(["b", "a"], pa.string_view())], pa.array(["a", "b"])),
        ([pa.array([b"a"], pa.binary())], pa.array(["a"])),
        ([pa.array([bytes(16)], pa.uuid())], pa.array([str(UUID(int=0))])),
        ([pa.array([3, 1], pa.int16()), pa.array([2**40])], pa.array([1, 3, 2**40])),
        ([pa.array([7], pa.uint64())], pa.array([7])),
        ([pa.array([], pa.string()), pa.array(["a"])], pa.array(["a"])),
        ([pa.array([], pa.int64())], pa.array([], pa.int64())),
        ([pa.nulls(0)], pa.array([], pa.string())),
    ],
)
def test_the_users_of_all_files_are_asked_once_in_order(tmp_path, files, expected):
    assert read_user_ids(users_in(tmp_path, *files), expected.type, "as_is").equals(expected)


def test_users_of_another_type_than_the_logs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"users/1\.parquet: user_id is int64 there, but string in the log"):
        read_user_ids(users_in(tmp_path, pa.array(["a"]), pa.array([1])), pa.string(), "as_is")


def test_users_are_read_as_the_source_declares(tmp_path: Path) -> None:
    found = read_user_ids(users_in(tmp_path, pa.array(["a"]), pa.array([1])), pa.string(), "string")
    assert found.to_pylist() == ["1", "a"]


def test_rules_and_the_tables_that_they_read_are_in_the_names_of_what_is_searched():
    queries, blocked = (Files("place", (ObjectInfo(f"{name}.parquet", 7, "e"),)) for name in ("users", "blocked"))
    ruled = settings_of("rules.show_if.live=item.status = 'live'")
    plain, night = night_of(settings_of()), night_of(ruled)
    assert renamed(plain, night) == FROM_SEARCH
    assert renamed(night, night_of(settings_of("rules.show_if.live=item.status = 'new'"))) == FROM_SEARCH
    # Conditions may read the queries table: without one it decides about the run alone.
    assert renamed(night, night_of(ruled, replace(INPUTS, queries=queries))) == FROM_SEARCH
    assert renamed(plain, night_of(settings_of(), replace(INPUTS, queries=queries))) == {"run"}
    for settings in (settings_of(), ruled):
        with_blocks = replace(INPUTS, blocks=(("legal", blocked),))
        assert renamed(night_of(settings), night_of(settings, with_blocks)) == FROM_SEARCH
        changed = replace(INPUTS, blocks=(("legal", replace(blocked, files=(ObjectInfo("blocked.parquet", 8, "f"),))),))
        assert renamed(night_of(settings, with_blocks), night_of(settings, changed)) == FROM_SEARCH
