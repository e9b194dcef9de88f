from pipeline.model.results import TrainingMetrics, training_metrics
from tests.model.planted import report


def test_the_chosen_epoch_is_the_earliest_of_the_best():
    metrics = training_metrics([report(1, 0.2), report(2, 0.4), report(3, 0.4), report(4, 0.1)], 0.1)
    assert (metrics.best_epoch, metrics.validation_hit_rate) == (2, 0.4)
    assert metrics.positions_per_second == 500


def test_the_metrics_of_a_training_come_back_from_json_as_they_were():
    metrics = training_metrics([report(1, 0.2), report(2, 0.4)], 0.1)
    assert TrainingMetrics.model_validate_json(metrics.model_dump_json()) == metrics
