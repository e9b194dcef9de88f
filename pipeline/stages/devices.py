"""The device that a stage computes on."""

import torch

from pipeline.settings import ClusterSettings


def device_for(settings: ClusterSettings) -> torch.device:
    """The first visible GPU when cluster.gpus_per_actor asks for one, else the CPU."""
    return torch.device("cuda" if settings.gpus_per_actor and torch.cuda.is_available() else "cpu")
