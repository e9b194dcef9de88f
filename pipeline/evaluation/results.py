"""Results of an evaluation: the schema of `evaluations/<id>/metrics.json`."""

from pydantic import Field

from pipeline.config import Config
from pipeline.settings import SearchMethod

RANKINGS = ("model", "popularity", "counts")  # whose lists an evaluation measures: the model's and those of two floors


class Estimate(Config):
    """A mean over queries with its 95 % interval."""

    mean: float
    low: float
    high: float


class Overlap(Config):
    """Share of a perfect search's k items that the search returned too."""

    k: int
    queries: int  # number of queries whose lists were compared
    mean: float
    low: float
    high: float
    against: str  # the perfect search: "exact search", or "brute force in float64" where the search is exact itself


class Comparison(Config):
    """One figure of the model's lists, and the same of the lists of both floors."""

    model: float
    popularity: float
    counts: float


class Difference(Config):
    """How far one ranking is above another in a metric, for the same users."""

    first: float  # mean over the users
    second: float
    mean: float  # second - first
    low: float  # 95 % interval of the mean
    high: float
    p_value: float  # two-sided: how often so large a mean comes about if the two are alike
    num_better: int  # users for whom the second is better
    num_worse: int


class Segment(Config):
    """The metrics for a class of the held-out events, for example those on rare items."""

    by: str  # history (its length), popularity or age (of the item)
    name: str
    queries: int  # users with a target in this class; their targets in others are left out
    rankings: dict[str, dict[str, Estimate]]  # of `model`, `popularity`, `counts` and, where there is one, `mol`


class Metrics(Config):
    """Held-out metrics of the model's lists, beside those of two floors (popularity, item-to-item counts), and how near
    the search comes to a perfect one.

    The model's lists are as they are published: by MoL and, where `memory` chose a weight for them, the counts. Then
    `mol` has the metrics of MoL alone.

    Metrics are named `hr@10`, `ndcg@10`, `recall@10`, …, one each per cutoff, and `mrr`, over all k places of a list.
    """

    queries: int  # users with at least one target that were asked, a seeded sample
    with_test_events: int  # users; those of the next two lines left the metrics
    only_repeats: int  # they had seen all items of their test events before, so they have no target
    without_history: int  # they have a target, but could not be asked: they have no earlier event
    only_unlearned: int  # users who could be asked, but no target of theirs has a training event; they stay, as misses
    protocol: str  # one sentence: who was asked, and what counts as found
    method: SearchMethod
    k: int
    cutoffs: tuple[int, ...]  # the `evaluate.cutoffs` that are at most k; when none is, k
    model: dict[str, Estimate]
    popularity: dict[str, Estimate]  # the same metrics of popularity's lists
    counts: dict[str, Estimate]  # the same metrics of the lists by item-to-item counts
    # The same metrics of the lists by MoL alone; empty where those of the model are no others.
    mol: dict[str, Estimate] = Field(default_factory=dict)
    over_counts: dict[str, Difference]  # the counts first, the model second
    overlap: Overlap
    proven: float  # share of the model's lists that are proven to be the lists of exact search
    coverage: Comparison  # share of the catalogue that is in at least one list
    gini: Comparison  # inequality of how often each item is shown; 0 = all equally often
    # Of the first places of the lists, as many as the smallest cutoff:
    novelty: Comparison  # mean of -log2 of the items' shares of all events, in bits
    distance: Comparison  # mean of (1 - cosine) / 2 between two items of a list, by the selected model's vectors
    # Mean weight that the gate gives to each pair of components, for the items of the model's lists; they sum to one.
    gates: tuple[float, ...]
    segments: tuple[Segment, ...]  # at the smallest cutoff
    seconds: float
