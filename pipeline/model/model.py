"""The retrieval model: an item table, a query encoder that reads it, and MoL between the two.

Shapes: B queries, N items, L positions, E embedding.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipeline.model.encoders.sasrec import SasRec
from pipeline.model.mol import ItemSide, MixtureOfLogits, QuerySide

if TYPE_CHECKING:
    from pipeline.settings import ModelSettings


class RetrievalModel(nn.Module):
    """One item table serves the encoder's input and the item side of the similarity."""

    def __init__(self, settings: "ModelSettings", num_items: int) -> None:
        super().__init__()
        self.settings = settings
        self.num_items = num_items
        self.item_embedding = nn.Embedding(num_items + 1, settings.dim)  # the last row stands for padding
        self.encoder = SasRec(settings)
        self.mol = MixtureOfLogits(settings.dim, settings.mol)
        nn.init.trunc_normal_(self.item_embedding.weight, std=0.02, a=-0.04, b=0.04)
        with torch.no_grad():
            self.item_embedding.weight[num_items].zero_()

    def encode_positions(self, item_rows_BL: Tensor) -> Tensor:
        """(B, L, E) queries after each event; `item_rows_BL` is padded with -1 at the right."""
        is_event_BL = item_rows_BL >= 0
        rows_BL = torch.where(is_event_BL, item_rows_BL, self.num_items)
        queries_BLE: Tensor = self.encoder(self.item_embedding(rows_BL), is_event_BL)
        return queries_BLE

    def encode(self, item_rows_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """(B, E) queries after each sequence's last event; a sequence without events gets the same query as any other
        such sequence."""
        queries_BLE = self.encode_positions(item_rows_BL)
        last_B = (lengths_B.long() - 1).clamp_min(0)
        return queries_BLE[torch.arange(len(last_B), device=last_B.device), last_B]

    def query_side(self, item_rows_BL: Tensor, lengths_B: Tensor, user_keys_B: Tensor) -> QuerySide:
        """What users with these histories and keys (any int64) bring to the search."""
        return self.mol.query_side(self.encode(item_rows_BL, lengths_B), self.user_rows(user_keys_B))

    def user_rows(self, user_keys_B: Tensor) -> Tensor | None:
        """Rows of the user table, or None when the model has none."""
        return self.mol.user_rows(user_keys_B) if self.mol.user_table is not None else None

    def item_side(self, item_rows_N: Tensor) -> ItemSide:
        return self.mol.item_side(self.item_embedding(item_rows_N))
