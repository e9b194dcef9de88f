"""The model card, from made-up artifacts."""

from dataclasses import replace

import pytest

from pipeline.artifacts import Manifest
from pipeline.evaluation.results import Estimate, Segment
from pipeline.io.memory import MemoryRecord
from pipeline.model.results import refit_metrics, training_metrics
from pipeline.quality.card import Facts, model_card
from pipeline.settings import Settings
from tests.model.planted import report
from tests.quality.test_report import METRICS

SETTINGS = Settings.model_validate({"log": {"uri": "unused", "source": "default"}})
ROUNDS = [report(1, 0.1), report(2, 0.15)]
TRAINED = training_metrics(ROUNDS, 0.05, SETTINGS.train)
MEMORY = MemoryRecord(
    weight=0.5, scale=0.1, num_users=900, ndcg=0.17, ndcg_without=0.15, selected="s", neighbours="n", trials=[]
)


def manifest(kind: str, identity: str, counts: dict[str, int], **lineage: str) -> Manifest:
    return Manifest(
        kind=kind, id=identity, lineage=lineage, settings={}, files=(), counts=counts, created_at="2026-11-20T01:00:00"
    )


SELECTED = manifest("checkpoint", "selected1", {"num_parameters": 5_000, "num_items": 40}, histories="h1")
FACTS = Facts(
    title="candidates, ds=2026-11-20",
    histories=manifest("histories", "h1", {"users": 1_300, "events": 20_000, "late_rows": 3}),
    selected=SELECTED,
    measured=SELECTED,
    served=SELECTED,
    measured_training=TRAINED,
    training=TRAINED,
    memory=None,
    settings=SETTINGS,
)


def estimates(mean: float) -> dict[str, Estimate]:
    return {name: Estimate(mean=mean, low=mean / 2, high=2 * mean) for name in ("hr@10", "ndcg@10")}


def segment(by: str, name: str, queries: int, **means: float) -> Segment:
    return Segment(by=by, name=name, queries=queries, rankings={key: estimates(mean) for key, mean in means.items()})


def lines_of(facts: Facts, **changes: object) -> list[str]:
    return model_card(facts, METRICS.model_copy(update=changes)).splitlines()


def test_it_says_what_was_trained_on_what_and_how_it_was_measured():
    lines = lines_of(FACTS)
    assert lines[0] == "# Model card: candidates, ds=2026-11-20"
    for line in (
        "| selected model | `selected1`, made 2026-11-20T01:00:00 |",
        "| measured model | `selected1`, the same |",
        "| served model | `selected1`, the same |",
        "| parameters | 5,000, for 40 items |",
        "| best of the training | epoch 2 of 2 |",
        "| validation | HR@10 0.3000, NDCG@10 0.1500 (50 users; without the counts) |",
        "| time | 0.1 minutes, 500 positions per second (torch) |",
        "| counts in the score | none: `memory.enabled` is false |",
        "| users | 1,300 |",
        "| events | 20,000 |",
        "| novelty: bits of the first 10 items | 9.5000 | 6.0000 | 9.0000 |",
        "| distance between two of the first 10 items, 0 to 1 | 0.2500 | 0.5000 | 0.3750 |",
        "hr@10  0.2500  0.3125     +0.0625  +0.0500 to +0.0750  1.5e-12      90     12",
        "hr@10        0.3125  0.3000 to 0.3250      0.0392  0.2500          1.25 ×",
        "  learning_rate: 0.002",
    ):
        assert line in lines
    text = "\n".join(lines)
    assert "1234 queries: up to 20000 of 1234 users. Of 1300 users with test events" in text
    assert "late rows" not in text
    assert "the test has one day, the validation one day before that" in text
    # Half of the weight on one pair of four and none on another: exp of the entropy of (1/2, 1/4, 1/4).
    assert "Of 4 pairs of components" in text
    assert "as if 2.8 were in use alike" in text
    assert "Pair 0 has most, 50.0%; pair 1 has least, 0.0%" in text


def test_a_refitted_model_and_a_part_of_counts_are_told():
    served = manifest("checkpoint", "served1", {}, histories="h1", selected="selected1")
    refitted = refit_metrics(TRAINED, report(0.5, 0.0), is_sound=True)
    measured = manifest("checkpoint", "measured1", {}, histories="h1", selected="selected1")
    models = {"measured": measured, "served": served, "measured_training": refitted, "training": refitted}
    facts = replace(FACTS, **models, memory=MEMORY)
    lines = lines_of(facts)
    assert "| served model | `served1`, which has learned from all events for 0.5 epochs more |" in lines
    told = "| measured model | `measured1`, which has learned from the events before the test for 0.5 epochs more |"
    assert told in lines
    assert "| counts in the score | weight 0.5, scale 0.1: NDCG@10 of 900 validation users 0.1500 → 0.1700 |" in lines
    unsound = replace(facts, training=refit_metrics(TRAINED, report(0.5, 0.0), is_sound=False))
    assert "| served model | `served1`, with the same weights |" in lines_of(unsound)
    without = replace(facts, memory=MEMORY.model_copy(update={"weight": 0.0}))
    assert "| counts in the score | none: no weight was better for 900 validation users |" in lines_of(without)


def test_a_model_of_an_earlier_night_is_told():
    carried = manifest(
        "checkpoint", "s2", {"num_parameters": 1, "num_items": 1}, carried_from="s1", trained_on="2026-11-17"
    )
    lines = lines_of(replace(FACTS, selected=carried))
    assert "| selected: carried from | `s1` |" in lines
    assert "| selected: trained on | `2026-11-17` |" in lines


@pytest.mark.parametrize("by", ["history", "popularity", "age"])
def test_a_division_with_two_classes_has_a_table_with_all_rankings(by):
    segments = (segment(by, "one", 800, model=0.4, mol=0.3, counts=0.2, popularity=0.1),)
    assert not any(line.startswith("### ") for line in lines_of(FACTS, segments=segments))
    segments += (segment(by, "two", 34, model=0.02, mol=0.03, counts=0.01, popularity=0.0),)
    lines = lines_of(FACTS, segments=segments)
    (heading,) = [number for number, line in enumerate(lines) if line.startswith("### ")]
    assert lines[heading + 2 : heading + 6] == [
        "|  | users | model hr@10, 95 % | model ndcg@10 | MoL alone hr@10 | popularity hr@10 | counts hr@10 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| one | 800 | 0.4000 (0.2000 to 0.8000) | 0.4000 | 0.3000 | 0.1000 | 0.2000 |",
        "| two | 34 | 0.0200 (0.0100 to 0.0400) | 0.0200 | 0.0300 | 0.0000 | 0.0100 |",
    ]
