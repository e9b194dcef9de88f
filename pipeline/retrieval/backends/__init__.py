"""Which backend searches a shard."""

from pipeline.errors import InputError
from pipeline.model.mol import MixtureOfLogits
from pipeline.retrieval.backends.native.index import NativeIndex
from pipeline.retrieval.backends.native.library import native_library
from pipeline.retrieval.backends.torch.index import TorchIndex
from pipeline.retrieval.index import ShardIndex
from pipeline.retrieval.shard import Shard
from pipeline.settings import SearchSettings


def open_index(mol: MixtureOfLogits, shard: Shard, settings: SearchSettings) -> ShardIndex:
    """Lay a shard out for search where it is.

    Raises ValueError when it holds a value that is not a number, InputError when `search.backend` cannot run here.
    """
    tables = (shard.items.components_NXD, shard.items.gate_NP, shard.mean_ND, shard.low_rank_NR)
    if not all(bool(table.isfinite().all()) for table in tables):
        raise ValueError("the item shard holds a value that is not a number; embed again")
    device, backend = shard.mean_ND.device.type, settings.backend
    if backend == "triton":
        return _triton_index(mol, shard, settings)
    library = native_library() if device == "cpu" and backend != "torch" else None
    if library is not None:
        return NativeIndex(library, mol, shard, settings)
    if backend == "native":
        found = "the shard is on a GPU" if device != "cpu" else "no kernels were built for this CPU (no C++ compiler?)"
        raise InputError(f"search.backend=native: {found}; set search.backend=auto")
    return TorchIndex(mol, shard, settings)


def _triton_index(mol: MixtureOfLogits, shard: Shard, settings: SearchSettings) -> ShardIndex:
    if shard.mean_ND.device.type != "cuda":
        raise InputError("search.backend=triton needs a GPU: set cluster.gpus_per_actor, or search.backend=auto")
    try:
        from pipeline.retrieval.backends.triton.index import TritonIndex  # imports Triton, which CPUs do without
    except ImportError as error:
        raise InputError("search.backend=triton: Triton is missing, pip install 'nightrails[gpu]'") from error
    return TritonIndex(mol, shard, low_rank_bits=8 if settings.table_dtype == "int8" else 16)
