"""The choice of the backend that searches a shard."""

from importlib.util import find_spec

from pipeline.errors import InputError
from pipeline.model.mol import MixtureOfLogits
from pipeline.native.backend import Backend
from pipeline.native.loader import native_kernels
from pipeline.retrieval.backends.native.index import NativeIndex
from pipeline.retrieval.backends.torch.index import TorchIndex
from pipeline.retrieval.index import NotFiniteError, ShardIndex
from pipeline.retrieval.shard import Shard
from pipeline.settings import SearchSettings

NO_TRITON = "Triton is missing (pip install 'nightrails[gpu]')"


def describe_backend(settings: SearchSettings, device_type: str) -> Backend:
    """The backend that searches a shard on this machine's `cpu` or `cuda` device."""
    is_cpu = device_type == "cpu"
    if settings.backend == "triton":
        if is_cpu:
            return Backend("torch", "it needs a GPU (cluster.gpus_per_actor)")
        return Backend("triton") if find_spec("triton") else Backend("torch", NO_TRITON)
    if settings.backend == "torch" or (settings.backend == "auto" and not is_cpu):
        return Backend("torch")
    if not is_cpu:
        return Backend("torch", "the shard is on a GPU")
    kernels = native_kernels()
    if kernels.functions is None:
        return Backend("torch", kernels.reason)
    return Backend(f"native {kernels.instruction_set}", origin=kernels.origin)


def require_backend(backend: Backend, settings: SearchSettings, where: str = "") -> None:
    """Raise InputError when the backend that the settings name cannot run; `auto` takes any."""
    if backend.reason and settings.backend != "auto":
        raise InputError(f"search.backend={settings.backend}{where}: {backend.reason}; set search.backend=auto")


def open_index(mol: MixtureOfLogits, shard: Shard, settings: SearchSettings) -> ShardIndex:
    """Lay a shard out for search on the device that holds it.

    Raises NotFiniteError when the shard or the pair network holds a value that is not finite, InputError when
    `search.backend` cannot run here.
    """
    tables = (shard.items.components_NXD, shard.items.gate_NP, shard.mean_ND, shard.low_rank_NR)
    network = (*mol.cross_hidden.parameters(), *mol.cross_out.parameters())  # the native kernels would hide a NaN in it
    if not all(bool(numbers.isfinite().all()) for numbers in (*tables, *network)):
        raise NotFiniteError("the item shard or the model's pair network holds a value that is not a number")
    backend = describe_backend(settings, shard.mean_ND.device.type)
    require_backend(backend, settings)
    if backend.name == "triton":
        from pipeline.retrieval.backends.triton.index import TritonIndex  # imports Triton, which CPUs do without

        return TritonIndex(mol, shard, low_rank_bits=8 if settings.table_dtype == "int8" else 16)
    library = native_kernels().functions if backend.name.startswith("native") else None
    return NativeIndex(library, mol, shard, settings) if library else TorchIndex(mol, shard)
