"""The device that a stage computes on, and the memory that its process takes."""

import os
import socket

import torch

from pipeline.errors import InputError

PROCESS_BYTES = 400_000_000  # of a process that has loaded torch and Ray, and of its batches


def device_for(num_gpus: float) -> torch.device:
    """The first visible GPU for a stage that has GPUs, else the CPU.

    Raises InputError when PyTorch can use no GPU: the CPU would do the work unasked, many times slower.
    """
    if not num_gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        build = f"PyTorch {torch.__version__} " + ("is built for CUDA" if torch.version.cuda else "is a CPU build")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise InputError(
            f"the settings ask for {num_gpus:g} GPUs, but PyTorch can use none on {socket.gethostname()} ({build}; "
            f"CUDA_VISIBLE_DEVICES: {visible}). Install a CUDA build and a driver there, or work on the CPU: "
            "cluster.gpus_per_actor 0, cluster.gpus_per_encoder 0, train.use_gpu false"
        )
    return torch.device("cuda")


def memory_to_hold(model: int, shard: int = 0) -> int:
    """The most memory, in bytes beside PROCESS_BYTES, of a process that loads a model and perhaps a shard, given the
    sizes of their files.

    Each is in memory as a file and as tensors for a moment. Measured on 300,000 items of 1,024 and 1,504 bytes
    (`model.dim` 64): 0.56 to 0.85 GB, where this bound says 0.69 to 0.98 GB.
    """
    return 3 * model + 2 * shard
