import numpy as np
import pytest

from pipeline.errors import GateError
from pipeline.evaluation.paired import paired_difference
from pipeline.evaluation.results import Comparison, Estimate, Metrics, Overlap
from pipeline.quality.gates import check_errors, check_fallback, check_gates
from pipeline.settings import GateSettings

GATES = GateSettings(min_overlap=0.75, min_lift_over_popularity=2.0)


def metrics(model: float, popularity: float, overlap: float, counts: float = 0.0) -> Metrics:
    """At the second cutoff both floors are far ahead."""
    return Metrics(
        queries=100,
        with_test_events=110,
        only_repeats=8,
        without_history=2,
        only_unlearned=5,
        protocol="100 users",
        method="exact",
        k=50,
        cutoffs=(10, 50),
        model={"hr@10": estimate(model), "hr@50": estimate(0.0)},
        popularity={"hr@10": estimate(popularity), "hr@50": estimate(1.0)},
        counts={"hr@10": estimate(counts), "hr@50": estimate(1.0)},
        overlap=Overlap(k=50, queries=5, mean=overlap, low=0.0, high=1.0, against="exact search"),
        proven=1.0,
        coverage=Comparison(model=0.5, popularity=0.1, counts=0.4),
        gini=Comparison(model=0.5, popularity=0.9, counts=0.6),
        over_counts={"hr@10": paired_difference(np.full(2, counts), np.full(2, model))},
        novelty=Comparison(model=9.0, popularity=5.0, counts=8.0),
        distance=Comparison(model=0.5, popularity=0.5, counts=0.5),
        gates=(1.0,),
        segments=(),
        seconds=1.0,
    )


def estimate(mean: float) -> Estimate:
    return Estimate(mean=mean, low=0.0, high=1.0)


def test_a_run_that_measures_exactly_what_is_required_passes() -> None:
    verdicts = check_gates(metrics(model=0.5, popularity=0.25, overlap=0.75, counts=0.625), GATES)
    assert [(v.gate, v.measured, v.passed) for v in verdicts] == [
        ("overlap", 0.75, True),
        ("lift_over_popularity", 2.0, True),
        ("lift_over_counts", 0.8, True),  # this gate is not set
    ]
    assert verdicts[2].hit_rates == {"model": 0.5, "counts": 0.625}


def test_a_run_just_below_a_gate_fails_and_the_gate_is_named() -> None:
    with pytest.raises(GateError, match=r"overlap is 0\.7499, at least 0\.7500 is required.*gates\.min_overlap"):
        check_gates(metrics(model=0.5, popularity=0.25, overlap=0.7499), GATES)


def test_users_without_a_history_may_be_so_many_and_no_more() -> None:
    gates = GateSettings(max_fallback_share=0.25)
    assert check_fallback({"users": 8, "fallback": 2, "ok": 6}, gates).measured == 0.25
    assert check_fallback({"users": 8, "ok": 8}, gates).measured == 0.0
    assert check_fallback({"users": 0}, gates).passed
    with pytest.raises(GateError, match=r"3 of 8 requested users have no history.*at most 0\.2500 is allowed"):
        check_fallback({"users": 8, "fallback": 3, "ok": 5}, gates)


def test_the_computation_may_fail_for_so_many_users_and_no_more() -> None:
    gates = GateSettings(max_error_share=0.25)
    assert check_errors({"users": 8, "error": 2, "ok": 6}, gates).measured == 0.25
    assert check_errors({"users": 0}, gates).passed
    with pytest.raises(GateError, match=r"3 of 8 requested users have no list.*at most 0\.2500 is allowed"):
        check_errors({"users": 8, "error": 3, "ok": 5}, gates)


@pytest.mark.parametrize(("gate", "floor"), [("popularity", {"counts": 0.1}), ("counts", {"popularity": 0.1})])
def test_over_a_floor_that_hits_nothing_no_lift_is_computed_and_any_hit_is_enough(
    gate: str, floor: dict[str, float]
) -> None:
    gates = GateSettings.model_validate({"min_overlap": 0.0, f"min_lift_over_{gate}": 3.0})
    rates = {"popularity": 0.0, "counts": 0.0} | floor
    verdicts = {verdict.gate: verdict for verdict in check_gates(metrics(0.01, overlap=1.0, **rates), gates)}
    assert (verdicts[f"lift_over_{gate}"].measured, verdicts[f"lift_over_{gate}"].passed) == (None, True)
    assert verdicts[f"lift_over_{gate}"].plain()["measured"] is None
    with pytest.raises(GateError, match=rf"lift_over_{gate} cannot be computed: neither the model nor {gate} hits"):
        check_gates(metrics(0.0, overlap=1.0, **rates), gates)


def test_a_model_below_item_to_item_counts_is_refused_where_the_gate_is_set() -> None:
    gates = GateSettings(min_overlap=0.0, min_lift_over_counts=1.0)
    assert check_gates(metrics(0.5, 0.1, 1.0, counts=0.5), gates)
    with pytest.raises(GateError, match=r"lift_over_counts is 0\.9800, at least 1\.0000 .*gates\.min_lift_over_counts"):
        check_gates(metrics(0.49, 0.1, 1.0, counts=0.5), gates)


def test_gates_that_are_set_need_a_measurement_and_open_ones_none() -> None:
    with pytest.raises(GateError, match=r"or open them with --set gates\.min_lift_over_counts=0$"):
        check_gates(None, GateSettings(min_overlap=0.0, min_lift_over_counts=1.0))
    assert check_gates(None, GateSettings(min_overlap=0.0)) == []
