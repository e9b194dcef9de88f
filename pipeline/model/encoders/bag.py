"""A bag of items: the weighted mean of the history's items, for logs whose order means nothing.

    m = Σ w_j x_j / Σ w_j        query = norm(m + W₂ relu(W₁ norm(m) + b₁) + b₂)

The mean of embeddings is the query of YouTube's candidate generator (Covington et al., RecSys 2016, section 3.2); the
weights are those that the log's source gives to types of events (`event_weights`), 1 without any. Reads the items and
the weights. A query after each event is the mean up to there. In training it is the mean of all the others: of those
that are not of the item to predict. So each item is found from all that it stands together with, as an autoencoder
finds it, and a training query is as rich as one that is served.

Shapes: B sequences, L positions, E embedding.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.lists import NO_ITEM, EventColumn
from pipeline.model.dropout import dropout
from pipeline.model.inputs import Events
from pipeline.settings import ModelSettings

NORM_EPS = 1e-6


class Bag(nn.Module):
    """An `Encoder` that reads the items and the weights of the events, and not their order."""

    reads: frozenset[EventColumn] = frozenset({"weights"})

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.settings = settings
        # Without affine parameters: the similarity reads a query of fixed norm.
        self.norm = nn.LayerNorm(settings.dim, eps=NORM_EPS, elementwise_affine=False)
        self.ffn_in = nn.Linear(settings.dim, settings.ffn_dim)
        self.ffn_out = nn.Linear(settings.ffn_dim, settings.dim)
        for linear in (self.ffn_in, self.ffn_out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, items_BLE: Tensor, events: Events) -> Tensor:
        """(B, L, E) queries. Events without weight count as if they were not there."""
        rate = self.settings.dropout
        dropped_BLE = dropout(items_BLE * self.settings.dim**0.5, rate, self.training)
        if self.training:
            mean_BLE = mean_of_others(dropped_BLE, events.columns["weights"], events.item_rows_BL)
        else:
            mean_BLE = running_mean(dropped_BLE, events.columns["weights"])
        raised = dropout(F.relu(self.ffn_in(self.norm(mean_BLE))), rate, self.training)
        queries_BLE: Tensor = self.norm(mean_BLE + dropout(self.ffn_out(raised), rate, self.training))
        return queries_BLE


def running_mean(values_BLE: Tensor, weights_BL: Tensor) -> Tensor:
    """(B, L, E) weighted means of the values up to each position; 0 where all weights so far are 0."""
    weights_BL1 = weights_BL.unsqueeze(-1).to(values_BLE.dtype)
    total_BL1 = weights_BL1.cumsum(dim=1)
    return (values_BLE * weights_BL1).cumsum(dim=1) / torch.where(total_BL1 > 0, total_BL1, 1.0)


def mean_of_others(values_BLE: Tensor, weights_BL: Tensor, item_rows_BL: Tensor) -> Tensor:
    """(B, L, E) for each position the weighted mean of the whole sequence without the item that stands one place later;
    0 where all its weights are 0. After the last event, whose next item is not in the sequence, nothing is left out."""
    next_BL = torch.cat([item_rows_BL[:, 1:], item_rows_BL.new_full((len(item_rows_BL), 1), NO_ITEM)], dim=1)
    is_read_BLL = (item_rows_BL != NO_ITEM).unsqueeze(1) & (item_rows_BL.unsqueeze(1) != next_BL.unsqueeze(2))
    parts_BLL = is_read_BLL * weights_BL.unsqueeze(1).to(values_BLE.dtype)
    total_BL1 = parts_BLL.sum(dim=2, keepdim=True)
    return torch.bmm(parts_BLL, values_BLE) / torch.where(total_BL1 > 0, total_BL1, 1.0)
