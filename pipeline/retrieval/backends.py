"""Which backend searches a shard."""

from pipeline.model.mol import MixtureOfLogits
from pipeline.retrieval.index import ShardIndex
from pipeline.retrieval.native_index import NativeIndex
from pipeline.retrieval.native_library import native_library
from pipeline.retrieval.shard import Shard
from pipeline.retrieval.torch_index import TorchIndex
from pipeline.settings import SearchSettings


def open_index(mol: MixtureOfLogits, shard: Shard, settings: SearchSettings) -> ShardIndex:
    """Lay a shard out for search where it is. Raises ValueError when it holds a value that is not a number."""
    tables = (shard.items.components_NXD, shard.items.gate_NP, shard.mean_ND, shard.low_rank_NR)
    if not all(bool(table.isfinite().all()) for table in tables):
        raise ValueError("the item shard holds a value that is not a number; embed again")
    library = native_library() if shard.mean_ND.device.type == "cpu" else None
    return TorchIndex(mol, shard, settings) if library is None else NativeIndex(library, mol, shard, settings)
