"""The bench model: a small encoder and a MoL trained on simulated users, in minutes of one core.

Item rows come from the market and are not trained, so all the time goes into the similarity. The similarity starts as
nearness of items (`synthetic.align`): from the usual random start, the same minutes give a model that has hardly
learned the users' tastes, and whose scores are nearly the plain mean of the logits.
"""

import logging
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from jobs.studies.search.market import Market, MarketRecipe, draw_histories
from jobs.studies.search.synthetic import align
from pipeline.data.batches import cut_windows, epoch_batches
from pipeline.model.model import RetrievalModel
from pipeline.model.negatives import Negatives
from pipeline.model.optimiser import BETA1, BETA2
from pipeline.model.step import accumulate_gradients
from pipeline.settings import ModelSettings, MolSettings, TrainSettings

log = logging.getLogger(__name__)

WARM_UP_SHARE = 0.1  # share of the steps
LOG_EVERY = 100
TRAINING_STREAM = 0  # for `draw_histories`; other streams are other users


@dataclass(frozen=True)
class ModelRecipe:
    """The settings of a trained bench model; the same recipe gives the same model on the same kind of processor."""

    market: MarketRecipe
    num_query_components: int
    num_item_components: int
    component_dim: int
    num_steps: int
    start: Literal["random", "aligned"]
    gate_preference: float = 0.0  # how much an aligned start prefers large logits
    users_per_step: int = 256
    num_negatives: int = 256
    learning_rate: float = 0.003
    mutual_information_weight: float = 0.001
    query_hidden_dim: int = 512
    gate_hidden_dim: int = 128
    seed: int = 0

    @property
    def model(self) -> ModelSettings:
        """The model's settings, without dropout: every user is seen once, so nothing can be overfitted."""
        mol = MolSettings(
            num_query_components=self.num_query_components,
            num_item_components=self.num_item_components,
            component_dim=self.component_dim,
            query_hidden_dim=self.query_hidden_dim,
            query_activation="geglu",
            gate_hidden_dim=self.gate_hidden_dim,
            item_dropout=0.0,
            gate_dropout=0.0,
        )
        return ModelSettings(
            dim=self.market.dim,
            num_blocks=1,
            num_heads=2,
            ffn_dim=4 * self.market.dim,
            dropout=0.0,
            max_length=self.market.max_length,
            mol=mol,
        )

    @property
    def train(self) -> TrainSettings:
        """The training's settings; positions of a step share few draws of negatives, and bfloat16 saves a third of
        the time."""
        return TrainSettings(
            num_negatives=self.num_negatives,
            popular_negatives=0.0,
            log_q=False,
            head_weight=0.0,
            positions_per_negatives=512,
            precision="bfloat16",
            mutual_information_weight=self.mutual_information_weight,
        )


def train_model(recipe: ModelRecipe, market: Market) -> RetrievalModel:
    """Train on users that are each seen once; return the model in evaluation mode, without gradients."""
    torch.manual_seed(recipe.seed)
    model = RetrievalModel(recipe.model, market.recipe.num_items)
    with torch.no_grad():
        model.item_embedding.weight[:-1] = torch.from_numpy(market.rows_NE)
    model.item_embedding.weight.requires_grad_(False)
    if recipe.start == "aligned":
        align(model.mol, recipe.gate_preference)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, recipe.learning_rate, (BETA1, BETA2), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, recipe.num_steps))
    histories = draw_histories(market, recipe.num_steps * recipe.users_per_step, TRAINING_STREAM)
    windows = cut_windows(histories, np.arange(len(histories.lengths)), recipe.market.max_length)
    sampler = Negatives.of(torch.ones(market.recipe.num_items), recipe.train)
    loss, count = 0.0, 0
    for step, batch in enumerate(epoch_batches(windows, recipe.num_steps, recipe.seed, 1, 0)):
        optimiser.zero_grad(set_to_none=True)
        sums = accumulate_gradients(model.train(), batch, sampler, recipe.train)
        for parameter in trained:
            if parameter.grad is not None:
                parameter.grad /= max(1, sums.num_targets)
        optimiser.step()
        schedule.step()
        loss, count = loss + float(sums.loss), count + sums.num_targets
        if (step + 1) % LOG_EVERY == 0:
            log.info("step %d of %d: loss %.3f", step + 1, recipe.num_steps, loss / max(1, count))
            loss, count = 0.0, 0
    return model.eval().requires_grad_(False)


def _rate(step: int, num_steps: int) -> float:
    """The learning rate as a share of its peak: up in a straight line, down in half a cosine, never zero."""
    warm_up = max(1.0, WARM_UP_SHARE * num_steps)
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1.0, num_steps - warm_up)))
