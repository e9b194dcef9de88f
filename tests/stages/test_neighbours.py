"""The Neighbours artifact: the same lists for any buckets and ranges, resumed after a crash, refused when damaged."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs import count_pairs
from pipeline.data.neighbours import COUNTINGS, Neighbours, ScoredLists
from pipeline.errors import InfrastructureError, InputError
from pipeline.io.histories import read_items
from pipeline.io.neighbours import open_neighbours, range_claims, read_neighbours
from pipeline.stages import neighbours as stage
from pipeline.stages.local import LocalRunner
from pipeline.stages.neighbours import count_neighbours, pair_claims
from tests.stages.worlds import World, make_world, replace_items, write_histories

HISTORIES = {f"u{n}": np.array([n % 3, 3, 4, n % 5, 3 + n % 2, 5, 5, 5]) for n in range(12)}


def world_of(folder: Path, num_buckets: int = 3, *overrides: str) -> World:
    """Twelve short histories, whose last two events are held out, of ten items."""
    made = make_world(folder, 1, 10, [f"output.num_buckets={num_buckets}", *overrides])
    for info in made.storage.list(f"{made.night.histories.prefix}/bucket-"):
        made.storage.delete(info.key)
    write_histories(made.night, num_buckets, HISTORIES)
    items = read_items(made.storage, made.night.histories)
    train = np.concatenate([rows[:-2] for rows in HISTORIES.values()])
    column = items.column_names.index("num_train_events")
    replace_items(made.night, items.set_column(column, items.field(column), [np.bincount(train, minlength=10)]))
    return made


def plain(lists: ScoredLists) -> tuple[list[int], list[int], list[float]]:
    return lists.items.offsets.tolist(), lists.items.values.tolist(), lists.scores.tolist()


def count(world: World, max_pairs: int = 4_000_000) -> Neighbours:
    count_neighbours(LocalRunner(world.settings), world.night, world.settings, max_pairs)
    return read_neighbours(world.night)


def scratch(world: World) -> list[str]:
    return [info.key for info in world.storage.list(f"{world.night.neighbours.prefix}/_scratch")]


def test_buckets_and_ranges_do_not_change_the_neighbours(tmp_path: Path) -> None:
    whole = count(world_of(tmp_path / "a", 1))
    assert whole.items[0].tolist()[0] == 3  # after 0 comes 3
    assert len(whole.scores) > 15
    cut = world_of(tmp_path / "b", 4)
    assert plain(count(cut, max_pairs=20)) == plain(whole)
    assert len(open_neighbours(cut.night).files) > 2
    assert scratch(cut) == []
    few = count(world_of(tmp_path / "c", 3, "counts.num_neighbours=2"))
    assert few.items.lengths.tolist() == np.minimum(whole.items.lengths, 2).tolist()
    assert few.items[3].tolist() == whole.items[3][:2].tolist()


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ((), "following"),
        (("counts.pairs=together",), "together"),
        (("model.encoder=bag",), "together"),
        (("model.encoder=bag", "counts.pairs=following"), "following"),
    ],
)
def test_a_bag_counts_all_items_of_a_history_as_pairs(tmp_path: Path, changes: tuple[str, ...], kind: str) -> None:
    neighbours = count(world_of(tmp_path, 3, *changes))
    assert neighbours.counting == COUNTINGS[kind]
    histories = [rows[:-2] for rows in HISTORIES.values()]
    near = [set() for _ in range(10)]
    for rows in histories:
        for at, row in enumerate(rows):
            near[row] |= set(rows[at + 1 : at + 4] if kind == "following" else np.delete(rows, at))
    assert [set(neighbours.items[row].tolist()) for row in range(10)] == near


class DiesError(Exception):
    """The end of the process that ran a task."""


@pytest.mark.parametrize("name", ["count_bucket", "add_up_range"])
@pytest.mark.parametrize("num_done", [0, 1, 2])
def test_a_count_that_was_killed_between_two_tasks_does_the_others_only(tmp_path, monkeypatch, name, num_done) -> None:
    whole = count(world_of(tmp_path / "whole"))
    world = world_of(tmp_path / "killed")
    task = getattr(stage, name)
    calls = []

    def dying(*arguments):
        if len(calls) == num_done:
            raise DiesError
        calls.append(arguments)
        task(*arguments)

    monkeypatch.setattr(stage, name, dying)
    with pytest.raises(DiesError):
        count(world, max_pairs=40)
    monkeypatch.setattr(stage, name, lambda *arguments: calls.append(arguments) or task(*arguments))
    assert plain(count(world, max_pairs=40)) == plain(whole)
    parts = [arguments[2] for arguments in calls]
    assert parts == sorted(set(parts)), "no task is done twice"
    assert len(parts) > 2


def test_counts_of_a_bucket_that_rotted_are_made_again(tmp_path: Path) -> None:
    """The pass that finds the damage ends with an error that a retry heals."""
    whole = count(world_of(tmp_path / "whole"))
    world = world_of(tmp_path / "rotten")
    stage.count_bucket(world.night, world.settings, 1, [(0, 10)])
    (segment,) = pair_claims(world.night).require(1, "").segments
    data = world.storage.read(segment.key)
    world.storage.delete(segment.key)
    world.storage.create(segment.key, data[:60] + bytes([data[60] ^ 4]) + data[61:])
    with pytest.raises(InfrastructureError, match=r"was damaged and is removed; run again"):
        count(world)
    assert plain(count(world)) == plain(whole)


def test_a_file_that_is_gone_or_damaged_is_named(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    with pytest.raises(InputError, match=r"not there; run jobs/count_pairs\.py first"):
        read_neighbours(world.night)
    count(world)
    (file,) = open_neighbours(world.night).files
    world.storage.delete(world.night.neighbours.key(file.key))
    with pytest.raises(InputError, match=r"gone since it was written; remove the neighbours and run jobs/count_pairs"):
        read_neighbours(world.night)


def test_histories_without_a_pair_give_items_without_neighbours(tmp_path: Path) -> None:
    world = make_world(tmp_path, 1, 10)
    night = replace(world.night, histories=replace(world.night.histories, id="lonely"))
    write_histories(night, 3, {"a": np.array([1]), "b": np.array([2, 3, 4])})
    replace_items(night, read_items(world.storage, world.night.histories))
    lists = count(World(world.settings, night))
    assert (len(lists), len(lists.scores)) == (10, 0)


def test_the_job_runs_once_and_removes_what_a_crash_left(tmp_path: Path) -> None:
    world = world_of(tmp_path, 3, "cluster.mode=local")
    made = count_pairs.run(world.settings, world.night)
    assert (made["status"], made["num_items"], made["num_ranges"]) == ("made", 10, 1)
    assert list(range_claims(world.storage, world.night.neighbours).done()) == [0]
    stage.count_bucket(world.night, world.settings, 0, [(0, 10)])
    assert scratch(world)
    assert count_pairs.run(world.settings, world.night) == made | {"status": "exists"}
    assert scratch(world) == []
