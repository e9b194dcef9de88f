"""A training step as one writes it first: sequences padded to the longest, negatives for each position alone, the pair
network and its gradient by PyTorch, and AdamW over the whole table of items."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.batches import SequenceBatch
from pipeline.model.inputs import Events
from pipeline.model.model import RetrievalModel
from pipeline.settings import TrainSettings


class StraightforwardStep:
    """Makes training steps of one model with one batch."""

    def __init__(self, model: RetrievalModel, batch: SequenceBatch, settings: TrainSettings) -> None:
        self._model, self._batch, self._settings = model.train(), batch, settings
        self._optimiser = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=0.0)

    @property
    def num_positions(self) -> int:
        return int((self._batch.targets_BL >= 0).sum())

    def __call__(self) -> None:
        self._optimiser.zero_grad()
        self.loss().backward()
        table = self._model.item_embedding.weight
        assert table.grad is not None
        table.grad = table.grad.to_dense()  # of every item, as an embedding of PyTorch's has it
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._settings.max_gradient_norm)
        self._optimiser.step()

    def loss(self) -> Tensor:
        """The mean sampled softmax loss of the batch's targets, over as many uniform negatives for each cell, padding
        and all."""
        model, batch = self._model, self._batch
        targets_C = torch.from_numpy(batch.targets_BL).long().flatten()
        queries_CE = model.encode_positions(Events.of(batch.item_rows_BL, batch.columns, model.device)).flatten(0, 1)
        keys_C = torch.from_numpy(batch.user_keys_B).repeat_interleave(batch.targets_BL.shape[1])
        query = model.mol.query_side(queries_CE, model.user_rows(keys_C))
        negatives_CN = torch.randint(model.num_items, (len(targets_C), self._settings.num_negatives))
        rows_CM = torch.cat([targets_C.clamp_min(0).unsqueeze(1), negatives_CN], dim=1)
        scores_CM = model.mol(query.alone(), model.item_side(rows_CM)).squeeze(1)
        losses_C = F.cross_entropy(scores_CM, torch.zeros_like(targets_C), reduction="none")
        return losses_C[targets_C >= 0].mean()
