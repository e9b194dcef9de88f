"""The retrieval model: an item tower, a query encoder that reads the items' embeddings, and MoL between the two.

Shapes: B queries, N items, L positions, E embedding.
"""

import torch
from torch import Tensor, nn

from pipeline.model.encoders import Encoder, make_encoder
from pipeline.model.inputs import Events, QueryInput
from pipeline.model.items import ItemTower
from pipeline.model.mol import ItemSide, MixtureOfLogits, QuerySide
from pipeline.settings import ModelSettings


class RetrievalModel(nn.Module):
    """Turns users and items into the two sides of the similarity; both read the same item tower."""

    def __init__(self, settings: ModelSettings, num_items: int) -> None:
        super().__init__()
        self.settings = settings
        self.num_items = num_items
        self.item_embedding = ItemTower(num_items, settings.dim, settings.content)
        self.encoder: Encoder = make_encoder(settings)
        self.mol = MixtureOfLogits(settings.dim, settings.mol)
        self.item_embedding.reset_parameters()  # last: what a seed draws depends on the order

    @property
    def device(self) -> torch.device:
        return self.item_embedding.weight.device

    def encode_positions(self, events: Events) -> Tensor:
        """(B, L, E) queries after each event."""
        assert self.encoder.reads <= events.columns.keys(), f"the encoder reads {set(self.encoder.reads)}"
        return self.encoder(self.item_embedding(events.item_rows_BL), events)

    def encode(self, events: Events) -> Tensor:
        """(B, E) queries after the last event of each sequence; all sequences without events get the same query."""
        queries_BLE = self.encode_positions(events)
        last_B = (events.lengths_B - 1).clamp_min(0)
        return queries_BLE[torch.arange(len(last_B), device=last_B.device), last_B]

    def query_side(self, inputs: QueryInput) -> QuerySide:
        """The query side of the similarity, after each user's last event."""
        return self.mol.query_side(self.encode(inputs.events), self.user_rows(inputs.user_keys_B))

    def user_rows(self, user_keys_B: Tensor) -> Tensor | None:
        """Rows of the user table, or None when the model has none."""
        return self.mol.user_rows(user_keys_B) if self.mol.user_table is not None else None

    def item_side(self, item_rows_N: Tensor) -> ItemSide:
        """The item side of the similarity."""
        return self.mol.item_side(self.item_embedding(item_rows_N))

    @torch.no_grad()
    def copy_from(self, earlier: "RetrievalModel", rows_N: Tensor) -> None:
        """Copy all weights of a model with the same settings that numbers its items in another way.

        Item i gets the row `rows_N[i]` of the earlier table, and keeps its own where that is -1. What was said of the
        items' features stays.
        """
        table, own_rows = earlier.item_embedding.weight, (rows_N >= 0).nonzero()[:, 0]
        weights = self.item_embedding.weight.clone()
        weights[own_rows] = table[rows_N[own_rows]].to(weights)
        weights[-1] = table[-1]  # padding
        own = {f"item_embedding.{name}": value for name, value in self.item_embedding.description().items()}
        self.load_state_dict(earlier.state_dict() | {"item_embedding.weight": weights} | own)
