"""Encoders: each turns a user's events into queries, in a file of its own, and `model.encoder` names one.

Shapes: B sequences, L positions, E embedding.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from pipeline.data.lists import EventColumn
from pipeline.model.encoders.bag import Bag
from pipeline.model.encoders.hstu import Hstu
from pipeline.model.encoders.ligr import Ligr
from pipeline.model.encoders.sasrec import SasRec
from pipeline.model.inputs import Events
from pipeline.settings import ModelSettings


class Encoder(Protocol):
    """Reads the events of a user in order and gives one query per position. A torch module."""

    @property
    def reads(self) -> frozenset[EventColumn]:
        """The columns of `Events` that must be there."""

    def __call__(self, items_BLE: Tensor, events: Events) -> Tensor:
        """(B, L, E) queries, of which each knows nothing of later positions; those at padding have no meaning.

        `items_BLE` are the embeddings of the events' items. In training, where the item one place later is to be
        predicted, an encoder without order may read all events of other items.
        """


ENCODERS: Mapping[str, Callable[[ModelSettings], Encoder]] = {
    "sasrec": SasRec,
    "ligr": Ligr,
    "hstu": Hstu,
    "bag": Bag,
}


def make_encoder(settings: ModelSettings) -> Encoder:
    """A new encoder of the kind that `model.encoder` names."""
    return ENCODERS[settings.encoder](settings)


def columns_read(settings: ModelSettings) -> frozenset[EventColumn]:
    """The columns of the histories that the encoder of these settings reads besides the items."""
    with torch.device("meta"):  # has no weights, and draws no random numbers
        return make_encoder(settings).reads
