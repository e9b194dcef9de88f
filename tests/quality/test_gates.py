import pytest

from pipeline.errors import GateError
from pipeline.evaluation.results import Comparison, Estimate, Metrics, Overlap
from pipeline.quality.gates import check_gates
from pipeline.settings import GateSettings

GATES = GateSettings(min_overlap=0.75, min_lift_over_popularity=2.0)


def metrics(model: float, popularity: float, overlap: float) -> Metrics:
    """At the second cutoff popularity is far ahead."""
    return Metrics(
        queries=100,
        without_history=0,
        protocol="100 users",
        method="exact",
        k=50,
        cutoffs=(10, 50),
        model={"hr@10": estimate(model), "hr@50": estimate(0.0)},
        popularity={"hr@10": estimate(popularity), "hr@50": estimate(1.0)},
        overlap=Overlap(k=50, queries=5, mean=overlap, low=0.0, high=1.0, against="exact search"),
        proven=1.0,
        coverage=Comparison(model=0.5, popularity=0.1),
        gini=Comparison(model=0.5, popularity=0.9),
        seconds=1.0,
    )


def estimate(mean: float) -> Estimate:
    return Estimate(mean=mean, low=0.0, high=1.0)


def test_a_run_that_measures_exactly_what_is_required_passes() -> None:
    verdicts = check_gates(metrics(model=0.5, popularity=0.25, overlap=0.75), GATES)
    assert [(v.gate, v.measured, v.passed) for v in verdicts] == [
        ("overlap", 0.75, True),
        ("lift_over_popularity", 2.0, True),
    ]


def test_a_run_just_below_a_gate_fails_and_the_gate_is_named() -> None:
    with pytest.raises(GateError, match=r"overlap is 0\.7499, at least 0\.7500 is required.*gates\.min_overlap"):
        check_gates(metrics(model=0.5, popularity=0.25, overlap=0.7499), GATES)


@pytest.mark.parametrize(("model", "lift"), [(0.0, 1.0), (0.01, 1e9)])
def test_where_popularity_hits_nothing_any_hit_is_a_lift_beyond_every_gate(model: float, lift: float) -> None:
    (_, verdict) = check_gates(metrics(model, 0.0, 1.0), GateSettings(min_overlap=0.0, min_lift_over_popularity=0.0))
    assert verdict.measured == lift


def test_open_gates_ask_for_no_measurement() -> None:
    assert check_gates(None, GateSettings(min_overlap=0.0, min_lift_over_popularity=0.0)) == []
