"""Prepare gives what the slow way gives, or refuses in a sentence, for hundreds of generated logs.

A failure prints the recipe; `check(recipe, folder)` with it repeats the failure.
"""

import json
import time
import warnings
from collections import Counter
from datetime import date, timedelta
from pathlib import Path
from random import Random

import pyarrow as pa
import pytest
import yaml

from pipeline.data.histories import Bucket
from pipeline.data.seen import PARTS
from pipeline.errors import InfrastructureError, InputError
from pipeline.io.histories import read_bucket, read_items
from pipeline.io.inputs import read_user_ids
from pipeline.io.night import Night, open_night
from pipeline.settings import Settings
from pipeline.stages.local import LocalRunner
from pipeline.stages.prepare.passes import open_job, prepare
from tests.io.inputs_on_disk import settings_for, write
from tests.stages.generated_damage import BOTH, PARQUET, TEXT, Case
from tests.stages.generated_files import ids_as, lay_out, source_of, write_files
from tests.stages.generated_logs import Recipe, make_rows
from tests.stages.generated_recipes import draw
from tests.stages.slow_prepare import Expected, Id, RefusedError, expect, id_of

SEEDS, INPUTS = 20, 28
MOST_SECONDS = 10


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Sources are looked up in the working directory. Nothing here is worth waiting for the disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_prepare_gives_what_the_slow_way_gives_or_refuses_in_a_sentence(seed, tmp_path):
    for number in range(INPUTS):
        recipe = draw(1_000 * seed + number)
        try:
            check(recipe, tmp_path / str(number))
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}\n{recipe}") from error


def check(recipe: Recipe, folder: Path) -> str:
    """Run prepare on the log of a recipe. Returns the refusal, or nothing."""
    files = lay_out(make_rows(recipe), recipe)
    write_files(files, recipe, folder / "log")
    write_source(source_of(recipe))
    items = catalogue_of(recipe)
    try:
        expected, words = expect(files, recipe, items), ""
    except RefusedError as refused:
        expected, words = None, str(refused)
    prepared, refusal = outcome(settings_of(recipe, folder, items), recipe)
    if prepared is None:
        assert words, f"refused, but it is a good log: {refusal}"
        assert words in refusal
        check_sentence(refusal)
        return words
    assert expected is not None, f"not refused: {words}"
    night, buckets = prepared
    compare(expected, night, buckets)
    queries = read_user_ids(night.inputs.queries, buckets[0].user_ids.type, recipe["declared"])
    assert queries.to_pylist() == sorted({id_of(user, recipe) for user in users_of(recipe)})
    return ""


def write_source(source: dict) -> None:
    path = Path("conf/sources/x.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(source, allow_unicode=True))


def catalogue_of(recipe: Recipe) -> list[Id] | None:
    if recipe["catalogue"] is None:
        return None
    ids = sorted({id_of(row.item, recipe) for row in make_rows(recipe) if row.item and "item" not in row.raw})
    return ids if recipe["catalogue"] == "all" else [item for at, item in enumerate(ids) if at % 4]


def users_of(recipe: Recipe) -> list[str]:
    return sorted({row.user for row in make_rows(recipe) if row.user and "user" not in row.raw})


def settings_of(recipe: Recipe, folder: Path, items: list[Id] | None) -> Settings:
    sections: dict = {
        "prepare": {
            "lookback_days": recipe["lookback"],
            "seen_lookback_days": recipe["seen_lookback"],
            "seen_event_types": recipe["seen_types"],
            "max_user_events_per_day": recipe["most_per_day"],
            "max_bad_share": recipe["bad_share"],
            "max_orphan_share": recipe["orphan_share"],
            "rows_per_task": recipe["rows_per_task"],
        },
        "output": {"num_buckets": recipe["buckets"]},
    }
    if items is not None:
        ids = ids_as(recipe.get("item_as", "string"), [str(item) for item in items[::-1]], 1)
        sections["items"] = {"uri": str(write(folder / "items.parquet", pa.table({"item_id": ids, "title": ids})))}
    users = users_of(recipe)
    ids = ids_as(recipe.get("user_as", "string"), [*users, *users[::-1]], 2)
    sections["queries"] = {"uri": str(write(folder / "queries.parquet", pa.table({"user_id": ids})))}
    settings = settings_for(folder / "root", folder / "log", "x", **sections)
    return settings.model_copy(update={"log": settings.log.model_copy(update={"time_zone": recipe["log_zone"]})})


def run(settings: Settings, recipe: Recipe) -> tuple[Night, list[Bucket]]:
    last = date.fromisoformat(recipe["last_day"])
    ds = {"newest": None, "last": last, "day before": last - timedelta(days=1)}[recipe["ds"]]
    begin = time.monotonic()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", ResourceWarning)
        night = open_night(settings, ds)
        prepare(LocalRunner(settings), open_job(night, settings))
    assert time.monotonic() - begin < MOST_SECONDS
    assert not warned, [str(warning.message) for warning in warned]
    return night, [read_bucket(night.storage, night.histories, b) for b in range(settings.output.num_buckets)]


def outcome(settings: Settings, recipe: Recipe) -> tuple[tuple[Night, list[Bucket]] | None, str]:
    """What prepare makes of the log, or why it refuses it."""
    try:
        return run(settings, recipe), ""
    except (InputError, InfrastructureError) as error:
        return None, str(error)


def check_sentence(text: str) -> None:
    assert len(text) < 1_200, text
    assert text.replace("\n  ", " ").isprintable(), text  # faults of a configuration have a line each


def compare(expected: Expected, night: Night, buckets: list[Bucket]) -> None:
    items = read_items(night.storage, night.histories)["item_id"].to_pylist()
    assert items == sorted(expected.items)
    histories, seen = {}, {}
    for bucket in buckets:
        ends = bucket.offsets.tolist()
        for at, user in enumerate(bucket.user_ids.to_pylist()):
            events_at = slice(ends[at], ends[at + 1])
            ids = [items[row] for row in bucket.item_rows[events_at].tolist()]
            times, weights = bucket.event_ts[events_at].tolist(), bucket.weights[events_at].tolist()
            events = list(zip(ids, times, weights, strict=True))
            held_out = int(bucket.num_train[at]), int(bucket.num_validation[at])
            histories[user] = None if bucket.left_out[at].as_py() else (events, *held_out)
            seen[user] = tuple({items[row] for row in bucket.seen(part)[at].tolist()} for part in PARTS)
    assert histories == expected.histories
    assert seen == expected.seen
    validation = validation_of(night)
    rows = Counter(validation["rows"] | validation["quarantined"])
    names = ("kept", "duplicates", "bot_events", "after_ds", "out_of_lookback", "ignored_event_type", "nobody")
    assert {name: rows[name] for name in names} == {name: expected.counts[name] for name in names}
    assert validation["rows_read"] == expected.counts["rows_read"] == sum(validation["rows"].values())


def validation_of(night: Night) -> dict:
    (info,) = (i for i in night.storage.list(f"{night.histories.prefix}/") if "/validation-" in i.key)
    return json.loads(night.storage.read(info.key))


DAMAGES = {"parquet": PARQUET | BOTH, "csv": TEXT | BOTH}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_damaged_files_are_refused_with_their_name(form, seed, tmp_path):
    for number, name in enumerate(DAMAGES[form]):
        recipe = sound_recipe(1_000 * seed + 50 * number, form)
        try:
            check_damage(recipe, name, tmp_path / str(number))
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}\n{recipe}") from error


def sound_recipe(seed: int, form: str) -> Recipe:
    """The first recipe of this format from `seed` on, without faults."""
    recipe = next(recipe for recipe in map(draw, range(seed, seed + 50)) if recipe["format"] == form)
    plain = {"faults": [], "ds": "last", "catalogue": None, "log_zone": "UTC"}
    plain |= {"lookback": None, "seen_lookback": None, "seen_types": None}
    return recipe | plain


def check_damage(recipe: Recipe, name: str, folder: Path) -> None:
    write_files(lay_out(make_rows(recipe), recipe), recipe, folder / "log")
    case = Case(Random(recipe["seed"]), recipe, folder / "log", source_of(recipe))
    words = DAMAGES[recipe["format"]][name](case)
    write_source(case.source)
    settings = settings_of(recipe, folder, None)
    if case.sections:
        settings = Settings.model_validate(settings.model_dump(mode="json") | case.sections)
    with pytest.raises(InputError) as refused:
        run(settings, recipe)
    check_sentence(str(refused.value))
    assert [word for word in words if word not in str(refused.value)] == [], str(refused.value)


@pytest.mark.parametrize("seed", range(4))
def test_no_change_of_bytes_ends_in_a_traceback(seed, tmp_path):
    for number in range(20):
        recipe = draw(10_000 + 1_000 * seed + number)
        try:
            check_changed(recipe, tmp_path / str(number))
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}\n{recipe}") from error


def check_changed(recipe: Recipe, folder: Path) -> str:
    """Run prepare on the log of a recipe of which some bytes have changed, in a file or in the column map."""
    rng = Random(recipe["seed"])
    write_files(lay_out(make_rows(recipe), recipe), recipe, folder / "log")
    write_source(source_of(recipe))
    settings = settings_of(recipe, folder, None)
    of_log = sorted(path for path in (folder / "log").rglob("part-*") if path.is_file())
    path = rng.choice([Path("conf/sources/x.yaml"), *of_log[:2]])
    path.write_bytes(changed_bytes(rng, path.read_bytes()))
    _, refusal = outcome(settings, recipe)
    assert len(refusal) < 1_200, refusal
    return refusal


def changed_bytes(rng: Random, data: bytes) -> bytes:
    """The data with some bytes flipped, left out or put in; never empty, which is a marker."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 10))):
        at = rng.randrange(len(changed))
        how = rng.choice(("flip", "cut", "insert"))
        if how == "flip":
            changed[at] ^= 1 << rng.randrange(8)
        elif how == "cut":
            del changed[at : at + rng.choice((1, 8, 100))]
        else:
            changed[at:at] = rng.choice((rng.randbytes(3), b'"', b"\n", b"\x00", b": ", b"'"))
        changed = changed or bytearray(b"?")
    return bytes(changed)
