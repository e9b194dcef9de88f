from dataclasses import replace

from pipeline.model.results import TrainingMetrics, training_metrics
from pipeline.settings import TrainSettings
from tests.model.planted import report


def test_the_chosen_round_is_the_earliest_of_the_best():
    metrics = training_metrics(
        [report(1, 0.1), report(2, 0.2), report(3, 0.2), report(4, 0.1)], 0.1, TrainSettings(max_epochs=4)
    )
    assert (metrics.best_epoch, metrics.validation_hit_rate, metrics.validation_ndcg) == (2, 0.4, 0.2)
    assert metrics.ended_by == "max_epochs"
    assert metrics.positions_per_second == 500


def test_the_metrics_of_a_training_come_back_from_json_as_they_were():
    metrics = training_metrics([report(1, 0.1), report(2, 0.2)], 0.1, TrainSettings())
    assert TrainingMetrics.model_validate_json(metrics.model_dump_json()) == metrics


def test_a_training_that_went_on_elsewhere_names_both_backends():
    reports = [replace(report(n, 0.1), backend=name) for n, name in enumerate(("native avx512", "torch", "torch"))]
    assert training_metrics(reports, 0.1, TrainSettings()).backend == "native avx512, torch"
