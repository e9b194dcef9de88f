"""The streaming top-k against a plain sort."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.lists import NO_ITEM
from pipeline.retrieval.streaming import Best


def sorted_best(scores_N: list[float], k: int) -> list[tuple[float, int]]:
    return [(-s, at) for s, at in sorted((-s, at) for at, s in enumerate(scores_N) if s > -np.inf)][:k]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 300),
    st.integers(1, 40),
    st.integers(1, 90),
    st.sampled_from([1, 3, 1_000]),
    st.sampled_from(["random", "rising", "falling"]),
)
def test_a_stream_of_tiles_gives_the_sorted_best(seed, num_items, num_kept, tile, num_values, order):
    """With few distinct scores most are ties, which go to the first item; some scores are missing."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, num_values, (4, num_items)).astype(np.float32)
    if order != "random":
        scores = np.sort(scores, axis=1)[:, :: -1 if order == "falling" else 1].copy()
    scores[rng.random(scores.shape) < 0.2] = -np.inf
    best = Best(4, num_kept)
    for low in range(0, num_items, tile):
        best.add(torch.from_numpy(scores[:, low : low + tile].copy()), low)
    found = best.result()
    for query in range(4):
        pairs = zip(found.scores_BM[query].tolist(), found.at_BM[query].tolist(), strict=True)
        kept = sorted([(s, at) for s, at in pairs if at != NO_ITEM], key=lambda pair: (-pair[0], pair[1]))
        assert kept == sorted_best(scores[query].tolist(), num_kept)
