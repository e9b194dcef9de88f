"""Metrics of a made-up evaluation."""

from pipeline.evaluation.results import Comparison, Estimate, Metrics, Overlap


def make_metrics(model: float, popularity: float, overlap: float, k: int = 50) -> Metrics:
    """Hit rates at the first cutoff as given; at the second, popularity is far ahead."""
    return Metrics(
        queries=100,
        without_history=0,
        protocol="100 users",
        method="exact",
        k=k,
        cutoffs=(10, 50),
        model={"hr@10": estimate(model), "hr@50": estimate(0.0)},
        popularity={"hr@10": estimate(popularity), "hr@50": estimate(1.0)},
        overlap=Overlap(k=k, queries=5, mean=overlap, low=0.0, high=1.0, against="exact search"),
        proven=1.0,
        coverage=Comparison(model=0.5, popularity=0.1),
        gini=Comparison(model=0.5, popularity=0.9),
        seconds=1.0,
    )


def estimate(mean: float) -> Estimate:
    return Estimate(mean=mean, low=0.0, high=1.0)
