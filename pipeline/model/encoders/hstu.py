"""HSTU (Zhai et al., arXiv 2402.17152, section 3), the encoder of the MoL papers: causal attention without softmax,
with biases for the distance and, if `model.reads_times`, for the time between two events.

    u, v, q, k = split(silu(W₁ norm(h)))
    a_ij       = silu(q_i · k_j + distance_bias(i - j) + time_bias(t_i - t_j)) / n_i    for j ≤ i, else 0
    h_i        ← h_i + W₂ (norm(concat over heads of Σ_j a_ij v_j) ⊙ u_i) + b

Both norms have no affine parameters; the biases are shared by the heads, and each block has its own.

The normaliser n_i = i + 1 is the number of events that the query after event i has read: the true length of that
history. Public code divides by the longest length instead. The norm after the sum would cancel any other number, but
for its epsilon, which the small sums of a short history over a long maximum fall below. The length of the whole
sequence would tell an early position how many events come later, and serving could not repeat it.

The time of the query after event i is the time of event i. Public code takes the time of event i + 1, the one to
predict, which no nightly job knows. The end of the day, which it does know, is no time that a position of training has.
So training, validation and serving compute the same query from the same events, and none reads the time of a target.

Shapes: B sequences, L positions, E embedding, H heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.lists import EventColumn
from pipeline.model.dropout import dropout
from pipeline.model.encoders.positions import SPREAD, EventEmbedding, distance_bias, later_events
from pipeline.model.inputs import Events
from pipeline.settings import ModelSettings

NORM_EPS = 1e-6
BUCKET_WIDTH = 0.301  # of the natural logarithm of seconds: each bucket is 35 % longer than the one before
NUM_BUCKETS = 72  # the last begins at 60 years


class Hstu(nn.Module):
    """An `Encoder` that reads the items, their order and, if `model.reads_times`, the times of the events."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.reads: frozenset[EventColumn] = frozenset({"times"} if settings.reads_times else ())
        self.embedding = EventEmbedding(settings)
        self.blocks = nn.ModuleList(HstuBlock(settings) for _ in range(settings.num_blocks))
        # Without affine parameters: the similarity reads a query of fixed norm.
        self.norm = nn.LayerNorm(settings.dim, eps=NORM_EPS, elementwise_affine=False)

    def forward(self, items_BLE: Tensor, events: Events) -> Tensor:
        """(B, L, E) queries. Padding is at the right, so that the causal mask alone hides it from every event."""
        buckets_BLL = time_buckets(events.columns["times"]) if self.reads else None
        hidden_BLE = self.embedding(items_BLE)
        for block in self.blocks:
            hidden_BLE = block(hidden_BLE, buckets_BLL)
        queries_BLE: Tensor = self.norm(hidden_BLE)
        return queries_BLE


class HstuBlock(nn.Module):
    """One layer of pointwise attention; adds to the raw input."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.settings = settings
        dim = settings.dim
        self.norm_in = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.attention_in = nn.Linear(dim, 4 * dim, bias=False)
        self.distances = distance_bias(settings, num_heads=1)
        self.times = nn.Parameter(torch.empty(NUM_BUCKETS, 1)) if settings.reads_times else None
        self.norm_attended = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.attention_out = nn.Linear(dim, dim)
        nn.init.normal_(self.attention_in.weight, std=SPREAD)
        nn.init.xavier_uniform_(self.attention_out.weight)
        nn.init.zeros_(self.attention_out.bias)
        if self.times is not None:
            nn.init.normal_(self.times, std=SPREAD)

    def forward(self, hidden_BLE: Tensor, buckets_BLL: Tensor | None) -> Tensor:
        """(B, L, E) outputs; `buckets_BLL` are the times between two events, if the block reads them."""
        gate_BLE, values_BLE, queries_BLE, keys_BLE = F.silu(self.attention_in(self.norm_in(hidden_BLE))).chunk(4, -1)
        queries, keys, values = (
            part.unflatten(-1, (self.settings.num_heads, -1)).transpose(1, 2)
            for part in (queries_BLE, keys_BLE, values_BLE)
        )
        shares_BHLL = F.silu(queries @ keys.mT + self._bias(hidden_BLE, buckets_BLL)) * _over_length(hidden_BLE)
        attended_BLE = (shares_BHLL.to(values.dtype) @ values).transpose(1, 2).flatten(-2)
        gated_BLE = dropout(self.norm_attended(attended_BLE) * gate_BLE, self.settings.dropout, self.training)
        outputs_BLE: Tensor = hidden_BLE + self.attention_out(gated_BLE)
        return outputs_BLE

    def _bias(self, hidden_BLE: Tensor, buckets_BLL: Tensor | None) -> Tensor:
        """The biases of distance and time, (B, 1, L, L) or a shape that broadcasts to it."""
        bias = hidden_BLE.new_zeros(1)
        if self.distances is not None:
            bias = bias + self.distances(hidden_BLE.shape[1])
        if self.times is not None:
            assert buckets_BLL is not None
            bias = bias + F.embedding(buckets_BLL, self.times).movedim(-1, 1)
        return bias


def time_buckets(times_BL: Tensor) -> Tensor:
    """(B, L, L) bucket, from 0 to NUM_BUCKETS - 1, of the time from event j to the reading event i."""
    seconds_BLL = (times_BL.unsqueeze(2) - times_BL.unsqueeze(1)).float() / 1e6
    return (seconds_BLL.clamp_min(1.0).log() / BUCKET_WIDTH).int().clamp_max(NUM_BUCKETS - 1)


def _over_length(hidden_BLE: Tensor) -> Tensor:
    """(L, L): 1 / (i + 1) for the events j ≤ i that event i reads, 0 for the others."""
    length, device = hidden_BLE.shape[1], hidden_BLE.device
    num_read_L = torch.arange(1, length + 1, device=device, dtype=hidden_BLE.dtype)
    return num_read_L.reciprocal().unsqueeze(1).masked_fill(later_events(length, device), 0.0)
