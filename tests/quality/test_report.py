"""What a person reads at the end of a night."""

from pathlib import Path

import pytest

from pipeline.evaluation.results import Comparison, Difference, Estimate, Metrics, Overlap
from pipeline.io.histories import read_items
from pipeline.quality.report import (
    Event,
    Suggestion,
    UserStory,
    choose_users,
    differences_table,
    how_to_read,
    item_name,
    metrics_table,
    three_users,
    warnings_of,
)
from pipeline.quality.stories import read_stories
from pipeline.stages.local import LocalRunner
from tests.stages.worlds import World, make_world, read_table, replace_items, run_search

METRICS = Metrics(
    queries=1234,
    with_test_events=1300,
    only_repeats=60,
    without_history=6,
    only_unlearned=17,
    protocol="up to 20000 of 1234 users",
    method="topk_avg",
    k=50,
    cutoffs=(10,),
    model={"hr@10": Estimate(mean=0.31254, low=0.3, high=0.325), "mrr": Estimate(mean=0.1, low=0.09, high=0.11)},
    popularity={"hr@10": Estimate(mean=0.0392, low=0.03, high=0.05), "mrr": Estimate(mean=0.0, low=0.0, high=0.01)},
    counts={"hr@10": Estimate(mean=0.25, low=0.2, high=0.3), "mrr": Estimate(mean=0.0, low=0.0, high=0.01)},
    overlap=Overlap(k=50, queries=500, mean=0.993, low=0.99, high=0.996, against="exact search"),
    proven=0.125,
    coverage=Comparison(model=0.63, popularity=0.04, counts=0.5),
    gini=Comparison(model=0.7, popularity=0.98, counts=0.8),
    over_counts={
        "hr@10": Difference(
            first=0.25, second=0.31254, mean=0.06254, low=0.05, high=0.075, p_value=1.5e-12, num_better=90, num_worse=12
        )
    },
    novelty=Comparison(model=9.5, popularity=6.0, counts=9.0),
    distance=Comparison(model=0.25, popularity=0.5, counts=0.375),
    gates=(0.5, 0.0, 0.25, 0.25),
    segments=(),
    seconds=3.0,
)


def test_metrics_are_told_as_an_aligned_table_beside_both_floors():
    assert metrics_table(METRICS).splitlines() == [
        "1234 queries: up to 20000 of 1234 users",
        "of 1300 users with test events, 60 left the metrics because they had seen all these items before, and 6 "
        "because they have no earlier event; 17 stay though none of their items has a training event",
        "              model              95 %  popularity  counts  model / counts",
        "hr@10        0.3125  0.3000 to 0.3250      0.0392  0.2500          1.25 ×",
        "mrr          0.1000  0.0900 to 0.1100      0.0000  0.0000               -",
        "coverage@50  0.6300                        0.0400  0.5000",
        "gini@50      0.7000                        0.9800  0.8000",
        "search is topk_avg: overlap@50 with exact search 0.9930 (0.9900 to 0.9960, 500 queries); "
        "12.5% of the lists are proven to be those of exact search",
    ]


def test_mol_alone_has_a_column_where_the_counts_have_a_part_in_the_score():
    mol = {"hr@10": Estimate(mean=0.2, low=0.1, high=0.3), "mrr": Estimate(mean=0.05, low=0.0, high=0.1)}
    lines = metrics_table(METRICS.model_copy(update={"mol": mol})).splitlines()
    assert lines[2:6] == [
        "              model              95 %  MoL alone  popularity  counts  model / counts",
        "hr@10        0.3125  0.3000 to 0.3250     0.2000      0.0392  0.2500          1.25 ×",
        "mrr          0.1000  0.0900 to 0.1100     0.0500      0.0000  0.0000               -",
        "coverage@50  0.6300                                   0.0400  0.5000",
    ]


def test_differences_are_told_with_their_interval_and_the_users_on_each_side():
    assert differences_table("counts", "model", METRICS.over_counts).splitlines() == [
        "       counts   model  difference                95 %        p  better  worse",
        "hr@10  0.2500  0.3125     +0.0625  +0.0500 to +0.0750  1.5e-12      90     12",
    ]


def test_a_model_that_counting_beats_is_told_plainly():
    worse = METRICS.model_copy(update={"counts": METRICS.counts | {"hr@10": Estimate(mean=0.4, low=0.3, high=0.5)}})
    (warning,) = warnings_of(worse)
    assert warning.startswith(
        "the model is worse than counting which item follows which: hr@10 is 0.3125, that of item-to-item counts "
        "0.4000 (for the same users +0.0625, 95 %: +0.0500 to +0.0750)"
    )
    assert warnings_of(METRICS) == []


def test_an_item_is_told_by_its_title_or_else_its_id():
    assert item_name("i7", {"title": "Night Trains 3", "category": "Travel"}) == "Night Trains 3 (Travel)"
    assert item_name(7, {"category": "Travel"}) == "7 (Travel)"
    assert item_name("i7", {"title": None, "category": None}) == item_name("i7", {}) == "i7"


def test_the_users_told_of_are_a_rich_a_light_and_one_without_a_full_list():
    lengths = {f"u{n}": n for n in range(1, 21)}
    served = dict.fromkeys(lengths, "ok")
    assert choose_users(lengths, served) == ["u19", "u3", "u11"]
    assert choose_users(lengths, served | {"new": "skipped", "few": "short"}) == ["u19", "u3", "few"]
    assert choose_users({"a": 1}, {"a": "ok"}) == ["a"]
    assert choose_users({}, {"x": "error"}) == ["x"]
    assert choose_users({}, {}) == []


def test_a_user_is_told_in_words():
    rich = UserStory(
        "u1",
        "ok",
        "",
        40,
        (Event("2026-11-18", "Jazz Nights 2 (Music)"), Event("2026-11-20", "Jazz Nights 3 (Music)")),
        50,
        (Suggestion("Jazz Nights 9 (Music)", 17.25), Suggestion("Night Trains 1 (Travel)", 3.0)),
    )
    skipped = UserStory("u2", "skipped", "no history", 0, (), 0, ())
    once = UserStory("u3", "short", "only 1 items may be shown", 1, (Event("2026-11-01", "i5"),), 1, ())
    assert three_users([rich, skipped, once]).split("\n\n") == [
        "user u1: 40 events, status ok\n"
        "  did last\n"
        "    2026-11-18  Jazz Nights 2 (Music)\n"
        "    2026-11-20  Jazz Nights 3 (Music)\n"
        "  gets 50 items, first\n"
        "    1. Jazz Nights 9 (Music)  17.250\n"
        "    2. Night Trains 1 (Travel)  3.000",
        "user u2: 0 events, status skipped (no history)\n  gets nothing tonight",
        "user u3: 1 event, status short (only 1 items may be shown)\n"
        "  did last\n    2026-11-01  i5\n  gets nothing tonight",
    ]


def test_the_lines_for_readers_are_python_that_names_the_place():
    text = how_to_read("s3://bucket/pre fix", "books")
    for line in text.splitlines():
        compile(line[len("  polars  ") :], "line", "exec")
    assert text.count("latest_files('s3://bucket/pre fix', 'books')") == 3
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["pandas", "polars", "DuckDB", "Spark"]


@pytest.fixture(scope="module", params=["long", "nested"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_world(tmp_path_factory.mktemp("night"), num_users=30, overrides=[f"output.layout={request.param}"])
    items = read_items(made.storage, made.night.histories)
    titles = [f"Title of {item}" for item in items["item_id"].to_pylist()]
    replace_items(made.night, items.append_column("title", [titles]))
    run_search(made, LocalRunner(made.settings))
    return made


def test_stories_tell_what_the_run_and_the_histories_hold(world: World):
    stories = read_stories(world.night)
    assert len(stories) == 3
    rich, light, _ = stories
    assert rich.num_events > light.num_events
    table = read_table(world, "candidates").to_pylist()
    for story in stories:
        rows = [row for row in table if row["user_id"] == story.user_id]
        if "item_ids" in rows[0]:
            expected = list(zip(rows[0]["item_ids"], rows[0]["scores"], strict=True))
        else:
            expected = [(row["item_id"], row["score"]) for row in rows]
        assert [(item.item, item.score) for item in story.best] == [
            (f"Title of {item}", score) for item, score in expected[:5]
        ]
        assert story.num_returned == len(expected)
        assert len(story.last_events) == min(3, story.num_events)
        assert all(event.day == "1970-01-01" for event in story.last_events)


def test_a_run_that_wrote_nothing_has_no_stories(tmp_path: Path):
    world = make_world(tmp_path, num_users=3)
    assert read_stories(world.night) == []
