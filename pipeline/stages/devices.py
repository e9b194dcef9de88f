"""The device that a stage computes on."""

import torch

from pipeline.settings import ClusterSettings


def device_for(settings: ClusterSettings) -> torch.device:
    """The GPU that Ray gave this actor, if it asked for one."""
    return torch.device("cuda" if settings.gpus_per_actor and torch.cuda.is_available() else "cpu")
