"""The item tower: one embedding per item row, for the encoder's input and for the item side of the similarity.

An item is a row of a table, and, with `model.content`, the sum of this row and of what its features say:

    x_i = [met] e_i + Σ_f w_if c_f        w_if = idf_f / (Σ_g idf_g²)^½        idf_f = log((1 + N) / (1 + n_f)) + 1

with a vector c_f for each feature and n_f the number of items that have it. An item that the model has not met in
training has no row: it is its features alone. In training any item is so now and then (`id_dropout`), so that features
alone say enough (Volkovs et al., DropoutNet, NeurIPS 2017, whose dropout this is). Negatives are drawn among items that
were met: the others are not pushed away for want of events.

Shapes: E embedding, N items, M distinct rows of a call; `*` is any number of dimensions.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.lists import Lists
from pipeline.model.dropout import keep_mask
from pipeline.settings import ContentSettings

DESCRIPTION = ("feature_offsets", "features", "feature_weights", "is_met")  # what `describe` sets, buffers of any size


class ItemTower(nn.Module):
    """A table with a row per item and a last row for padding; with content also a table with a row per feature."""

    def __init__(self, num_items: int, dim: int, content: ContentSettings | None = None) -> None:
        super().__init__()
        self.num_items = num_items
        self.content = content if content is not None and content.columns else None
        self.weight = nn.Embedding(num_items + 1, dim).weight
        if self.content is not None:
            self.content_weight = nn.Parameter(torch.empty(self.content.num_hashes, dim))
            self.register_buffer("feature_offsets", torch.zeros(num_items + 2, dtype=torch.int64))
            self.register_buffer("features", torch.empty(0, dtype=torch.int32))
            self.register_buffer("feature_weights", torch.empty(0))
            self.register_buffer("is_met", torch.ones(num_items + 1, dtype=torch.bool))

    def reset_parameters(self) -> None:
        """Draw the items' rows; padding starts at zero."""
        for weight in [self.weight] if self.content is None else [self.weight, self.content_weight]:
            nn.init.trunc_normal_(weight, std=0.02, a=-0.04, b=0.04)
        with torch.no_grad():
            self.weight[self.num_items].zero_()

    def describe(self, features: Lists, is_met_N: Tensor) -> None:
        """Say what features each item has, and which items are met in training: those with a row of their own."""
        assert self.content is not None, "a tower without content reads no features"
        device = self.weight.device
        idf_F = np.log((1 + self.num_items) / (1 + np.bincount(features.values, minlength=self.content.num_hashes))) + 1
        idf = idf_F[features.values]
        norms_N = np.sqrt(np.bincount(features.owners, weights=idf**2, minlength=self.num_items))
        weights = (idf / norms_N[features.owners]).astype(np.float32)
        offsets = np.append(features.offsets, features.offsets[-1])  # padding has none
        self.feature_offsets = torch.from_numpy(offsets.astype(np.int64)).to(device)
        self.features = torch.from_numpy(features.values.astype(np.int32)).to(device)
        self.feature_weights = torch.from_numpy(weights).to(device)
        self.is_met = torch.cat([is_met_N.cpu().bool(), torch.ones(1, dtype=torch.bool)]).to(device)

    def description(self) -> dict[str, Tensor]:
        """What `describe` has set, by its name in the tower's state."""
        return {} if self.content is None else {name: getattr(self, name) for name in DESCRIPTION}

    def forward(self, item_rows: Tensor) -> Tensor:
        """(*, E) embeddings of (*) item rows, where -1 is padding. The gradient of the items' table is sparse."""
        rows = torch.where(item_rows >= 0, item_rows, self.num_items)
        vectors = F.embedding(rows, self.weight, sparse=True)
        if self.content is None:
            return vectors
        has_row = self.is_met[rows].unsqueeze(-1).to(vectors.dtype)
        if self.training:
            has_row = has_row * keep_mask(has_row, self.content.id_dropout)
        distinct_M, places = rows.unique(return_inverse=True)
        return vectors * has_row + self._by_features(distinct_M)[places]

    def _by_features(self, rows_M: Tensor) -> Tensor:
        """(M, E) what the features of these rows say; 0 where there are none."""
        starts_M = self.feature_offsets[rows_M]
        lengths_M = self.feature_offsets[rows_M + 1] - starts_M
        ends_M = lengths_M.cumsum(0)
        first_M = ends_M - lengths_M
        at = torch.arange(int(lengths_M.sum()), device=rows_M.device)
        at = at + (starts_M - first_M).repeat_interleave(lengths_M)
        weights = self.feature_weights[at]
        return F.embedding_bag(
            self.features[at].long(), self.content_weight, first_M, mode="sum", per_sample_weights=weights
        )

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *others: Any) -> None:
        """Take buffers of any size: how many features there are is known by the state alone."""
        for name in DESCRIPTION if self.content is not None else ():
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *others)
