"""The choice of the backend that trains the pair network."""

import ctypes

import torch

from pipeline.errors import InputError
from pipeline.model.mol import MixtureOfLogits
from pipeline.native.backend import Backend
from pipeline.native.loader import native_kernels
from pipeline.settings import TrainSettings


def training_backend(mol: MixtureOfLogits, settings: TrainSettings) -> Backend:
    """The backend that trains this model on this machine.

    Raises InputError when `train.backend` asks for the native kernels and they cannot run.
    """
    is_on_cpu = mol.cross_hidden.weight.device.type == "cpu"
    if settings.backend == "torch" or (settings.backend == "auto" and not is_on_cpu):
        return Backend("torch")
    reason = _obstacle(mol)
    if not reason:
        kernels = native_kernels()
        return Backend(f"native {kernels.instruction_set}", origin=kernels.origin)
    if settings.backend == "native":
        raise InputError(f"train.backend=native: {reason}; set train.backend=auto")
    return Backend("torch", reason)


def native_library(mol: MixtureOfLogits, settings: TrainSettings) -> ctypes.CDLL | None:
    """The kernels that train this model, or None when PyTorch does. Raises as `training_backend`."""
    return native_kernels().functions if training_backend(mol, settings).name.startswith("native") else None


def _obstacle(mol: MixtureOfLogits) -> str:
    """Why the native kernels cannot train this model on this machine; empty when they can."""
    weight = mol.cross_hidden.weight
    if weight.device.type != "cpu":
        return "the model is on a GPU (train.use_gpu)"
    if weight.dtype != torch.float32:
        return f"its parameters are {weight.dtype}, not float32"
    if mol.settings.cross_dropout:
        return f"the kernels have no dropout of logits (model.mol.cross_dropout is {mol.settings.cross_dropout:g})"
    return native_kernels().reason
