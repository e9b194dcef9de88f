"""Resident memory of a process that holds one shard and searches it: python -m jobs.studies.search.memory SHARD

Prints one JSON object. The shard is read as a searcher reads it, so what is measured is what a searcher keeps.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from pipeline.model.mol import ItemSide, MixtureOfLogits, QuerySide
from pipeline.retrieval.backends import open_index
from pipeline.retrieval.filters import no_exclusions
from pipeline.retrieval.search import search_shard
from pipeline.retrieval.shard import make_shard
from pipeline.settings import MolSettings, SearchSettings


def resident_bytes() -> int:
    """VmRSS of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmRSS")))


def main(path: str) -> None:
    """Load, search some queries by TopKAvg, say what is resident."""
    tensors = load_file(path)
    settings = MolSettings.model_validate_json(bytes(tensors.pop("settings").tolist()))
    mol = MixtureOfLogits(int(tensors.pop("dim")), settings).eval().requires_grad_(False)
    mol.load_state_dict({n.removeprefix("mol."): t for n, t in tensors.items() if n.startswith("mol.")})
    queries = QuerySide(tensors["query_components"].clone(), tensors["query_gate"].clone())
    shard = make_shard(0, ItemSide(tensors["components"], tensors["gate"]), tensors["low_rank"])
    search = SearchSettings(k=100, method="topk_avg", num_preselected=1_000)
    index = open_index(mol, shard, search)
    del tensors, shard
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with torch.inference_mode():
        search_shard(index, queries, no_exclusions(len(queries.gate_BP)), search)
    print(json.dumps({"resident": resident_bytes(), "tables": sum(index.bytes_of.values()), "items": len(index)}))


if __name__ == "__main__":
    main(sys.argv[1])
