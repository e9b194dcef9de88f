"""The choice of the backend that trains the pair network."""

import ctypes

import torch
from torch import nn

from pipeline.errors import InputError
from pipeline.model.mol import MixtureOfLogits
from pipeline.native.backend import Backend
from pipeline.native.loader import native_kernels
from pipeline.settings import TrainSettings


def training_backend(similarity: nn.Module, settings: TrainSettings) -> Backend:
    """The backend that trains a model with this similarity on this machine.

    Raises InputError when `train.backend` asks for the native kernels and they cannot run.
    """
    is_on_gpu = any(parameter.device.type != "cpu" for parameter in similarity.parameters())
    if settings.backend == "torch" or (settings.backend == "auto" and is_on_gpu):
        return Backend("torch")
    reason = "the model is on a GPU (train.use_gpu)" if is_on_gpu else _obstacle(similarity)
    if not reason:
        kernels = native_kernels()
        return Backend(f"native {kernels.instruction_set}", origin=kernels.origin)
    if settings.backend == "native":
        raise InputError(f"train.backend=native: {reason}; set train.backend=auto")
    return Backend("torch", reason)


def native_library(similarity: nn.Module, settings: TrainSettings) -> ctypes.CDLL | None:
    """The kernels that train this similarity, or None when PyTorch does. Raises as `training_backend`."""
    return native_kernels().functions if training_backend(similarity, settings).name.startswith("native") else None


def _obstacle(similarity: nn.Module) -> str:
    """Why the native kernels cannot train this similarity on this CPU; empty when they can."""
    if not isinstance(similarity, MixtureOfLogits):
        return f"the kernels train Mixture-of-Logits, not {type(similarity).__name__}"
    weight, settings = similarity.cross_hidden.weight, similarity.settings
    if weight.dtype != torch.float32:
        return f"its parameters are {weight.dtype}, not float32"
    if settings.cross_dropout:
        return f"the kernels have no dropout of logits (model.mol.cross_dropout is {settings.cross_dropout:g})"
    return native_kernels().reason
