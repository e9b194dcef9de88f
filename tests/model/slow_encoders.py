"""The encoders again, one history, position and head after the other in float64, from the equations of the papers."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline.model.model import RetrievalModel
from pipeline.settings import ModelSettings

Array = NDArray[np.float64]


class Weights:
    """The encoder's weights by name."""

    def __init__(self, model: RetrievalModel, prefix: str = "") -> None:
        self._state = {name: value.double().numpy() for name, value in model.state_dict().items()}
        self._prefix = prefix

    def below(self, prefix: str) -> "Weights":
        weights = Weights.__new__(Weights)
        weights._state, weights._prefix = self._state, f"{self._prefix}{prefix}."
        return weights

    def __getitem__(self, name: str) -> Array:
        return self._state[self._prefix + name]

    def linear(self, name: str, vector: Array) -> Array:
        bias = self._state.get(f"{self._prefix}{name}.bias", 0.0)
        return self[f"{name}.weight"] @ vector + bias

    def norm(self, name: str, vector: Array) -> Array:
        return normalised(vector, 1e-5) * self[f"{name}.weight"] + self[f"{name}.bias"]


def normalised(vector: Array, eps: float = 1e-6) -> Array:
    return (vector - vector.mean()) / np.sqrt(vector.var() + eps)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def embedded(model: RetrievalModel, item_rows: list[int]) -> list[Array]:
    """√E · item, and the vector of the place where the encoder has one."""
    weights, settings = Weights(model), model.settings
    vectors = [np.sqrt(settings.dim) * weights["item_embedding.weight"][row] for row in item_rows]
    if settings.positions in ("start", "both"):
        places = weights["encoder.embedding.places.weight"]
        vectors = [vector + places[place] for place, vector in enumerate(vectors)]
    return vectors


def has_distances(settings: ModelSettings) -> bool:
    return settings.positions in ("relative", "both")


def slow_ligr(model: RetrievalModel, item_rows: list[int], times: list[int], weights: list[float]) -> list[Array]:
    settings = model.settings
    width = settings.dim // settings.num_heads
    hidden = embedded(model, item_rows)
    for number in range(settings.num_blocks):
        block = Weights(model).below(f"encoder.blocks.{number}")
        triples = [
            block.linear("attention_in", block.norm("attention_norm", each)).reshape(3, settings.num_heads, width)
            for each in hidden
        ]
        after = []
        for i, here in enumerate(hidden):
            heads = []
            for head in range(settings.num_heads):
                logits = []
                for j in range(i + 1):
                    logit = triples[i][0, head] @ triples[j][1, head] / np.sqrt(width)
                    if has_distances(settings):
                        logit += block["distances.table"][i - j, head]
                    logits.append(logit)
                shares = np.exp(logits) / np.exp(logits).sum()
                heads.append(sum(share * triples[j][2, head] for j, share in enumerate(shares)))
            attended = block.linear("attention_out", np.concatenate(heads))
            middle = here + sigmoid(block.linear("attention_gate", here)) * attended
            left, right = np.split(block.linear("ffn_hidden.linear", block.norm("ffn_norm", middle)), 2)
            lowered = block.linear("ffn_out", silu(left) * right)
            after.append(middle + sigmoid(block.linear("ffn_gate", middle)) * lowered)
        hidden = after
    return [normalised(each) for each in hidden]


def slow_hstu(model: RetrievalModel, item_rows: list[int], times: list[int], weights: list[float]) -> list[Array]:
    settings = model.settings
    width = settings.dim // settings.num_heads
    hidden = embedded(model, item_rows)
    for number in range(settings.num_blocks):
        block = Weights(model).below(f"encoder.blocks.{number}")
        parts = [np.split(silu(block.linear("attention_in", normalised(each))), 4) for each in hidden]
        after = []
        for i, here in enumerate(hidden):
            heads = []
            for head in range(settings.num_heads):
                own = slice(head * width, (head + 1) * width)
                total = np.zeros(width)
                for j in range(i + 1):
                    logit = parts[i][2][own] @ parts[j][3][own]
                    if has_distances(settings):
                        logit += block["distances.table"][i - j, 0]
                    if settings.reads_times:
                        seconds = (times[i] - times[j]) / 1e6
                        bucket = min(71, int(np.log(max(1.0, seconds)) / 0.301))
                        logit += block["times"][bucket, 0]
                    total += silu(logit) / (i + 1) * parts[j][1][own]
                heads.append(total)
            after.append(here + block.linear("attention_out", normalised(np.concatenate(heads)) * parts[i][0]))
        hidden = after
    return [normalised(each) for each in hidden]


def slow_bag(model: RetrievalModel, item_rows: list[int], times: list[int], weights: list[float]) -> list[Array]:
    vectors = embedded(model, item_rows)
    encoder = Weights(model).below("encoder")
    queries = []
    for length in range(1, len(vectors) + 1):
        total = sum(weights[:length])
        mean = sum(weight * vector for weight, vector in zip(weights[:length], vectors, strict=False)) / (total or 1.0)
        raised = np.maximum(encoder.linear("ffn_in", normalised(mean)), 0.0)
        queries.append(normalised(mean + encoder.linear("ffn_out", raised)))
    return queries


SLOW = {"ligr": slow_ligr, "hstu": slow_hstu, "bag": slow_bag}


def moments_apart(rng: np.random.Generator, num_events: int) -> list[int]:
    """Ascending times in µs, with gaps from none to years, of which none is near the border of two buckets."""
    gaps = [0, 500_000, 2_000_000, 61_000_000, 3_700_000_000, 90_000_000_000, 4 * 10**15]
    times = np.cumsum(rng.choice(gaps, size=num_events)) + 10**15
    assert all(later >= earlier for earlier, later in pairwise(times))
    return times.tolist()
