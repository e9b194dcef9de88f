"""The item tower: one embedding per item row, for the encoder's input and for the item side of the similarity.

Shapes: E embedding; `*` is any number of dimensions.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ItemTower(nn.Module):
    """A table with a row per item, which is all that the model knows of an item, and a last row for padding."""

    def __init__(self, num_items: int, dim: int) -> None:
        super().__init__()
        self.num_items = num_items
        self.weight = nn.Embedding(num_items + 1, dim).weight

    def reset_parameters(self) -> None:
        """Draw the items' rows; padding starts at zero."""
        nn.init.trunc_normal_(self.weight, std=0.02, a=-0.04, b=0.04)
        with torch.no_grad():
            self.weight[self.num_items].zero_()

    def forward(self, item_rows: Tensor) -> Tensor:
        """(*, E) embeddings of (*) item rows, where -1 is padding. The gradient of the table is sparse."""
        return F.embedding(torch.where(item_rows >= 0, item_rows, self.num_items), self.weight, sparse=True)
