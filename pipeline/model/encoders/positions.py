"""The input of an attention encoder, and what its attention knows of the distance between two events.

Shapes: B sequences, L positions, E embedding, H heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.model.dropout import dropout
from pipeline.settings import ModelSettings

SPREAD = 0.02  # standard deviation of the first weights


class EventEmbedding(nn.Module):
    """√E · item + learned vector of the position, counted from the first event that is read.

    The vector of the position is left out unless `model.positions` is start or both.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.settings = settings
        has_places = settings.positions in ("start", "both")
        self.places = nn.Embedding(settings.max_length, settings.dim) if has_places else None
        if self.places is not None:
            nn.init.trunc_normal_(self.places.weight, std=SPREAD, a=-2 * SPREAD, b=2 * SPREAD)

    def forward(self, items_BLE: Tensor) -> Tensor:
        hidden_BLE = items_BLE * self.settings.dim**0.5
        if self.places is not None:
            hidden_BLE = hidden_BLE + self.places.weight[: items_BLE.shape[1]]
        return dropout(hidden_BLE, self.settings.dropout, self.training)


class DistanceBias(nn.Module):
    """A learned number for each distance i - j ≥ 0 between the reading event i and the event j, per head."""

    def __init__(self, num_heads: int, max_length: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(max_length, num_heads))
        nn.init.normal_(self.table, std=SPREAD)

    def forward(self, length: int) -> Tensor:
        """(H, L, L) numbers. Where j is after i they have no meaning, and attention leaves them out."""
        place_L = torch.arange(length, device=self.table.device)
        distance_LL = (place_L.unsqueeze(1) - place_L).clamp_min(0)
        return F.embedding(distance_LL, self.table).permute(2, 0, 1)


def distance_bias(settings: ModelSettings, num_heads: int) -> DistanceBias | None:
    """A new bias of one block, or None unless `model.positions` is relative or both."""
    return DistanceBias(num_heads, settings.max_length) if settings.positions in ("relative", "both") else None


def later_events(length: int, device: torch.device) -> Tensor:
    """(L, L): whether event j comes after event i, which must not see it. The padding at the right is later too."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
