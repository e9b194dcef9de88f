"""Resident memory of a process that holds one shard and searches it.

The shard is written to a file, and another process reads the file as a searcher does, searches some queries by TopKAvg
and prints one JSON object: python -m jobs.studies.search.memory FILE
"""

import ctypes
import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from jobs.studies.machine import memory_of
from jobs.studies.search.prepared import Prepared
from jobs.studies.searches import lay_out, search
from jobs.studies.timing import Row, row
from pipeline.model.mol import ItemSide, MixtureOfLogits, QuerySide
from pipeline.settings import MolSettings, SearchSettings

log = logging.getLogger("nightrails")

NUM_QUERIES = 1_024
FIXED_MB = 300  # Python, torch and the queries: not counted against the tables


def compare_memory(prepared: Prepared) -> Row:
    """Resident set of a searching process, less what every process takes, as a multiple of the shard's tables."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.safetensors"
        write_shard(prepared, path)
        command = [sys.executable, "-m", "jobs.studies.search.memory", str(path)]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    seen = json.loads(answer.stdout.splitlines()[-1])
    resident, tables = seen["resident"] / 2**20, seen["tables"] / 2**20
    per_item = seen["tables"] / seen["items"]
    log.info("  resident %d MB, tables %d MB, %.0f bytes an item", resident, tables, per_item)
    proud = (1.1 * tables + 200 - FIXED_MB) / tables
    figure = f"(resident set - {FIXED_MB} MB) over shard tables"
    return row(figure, (resident - FIXED_MB) / tables, 1.25, proud, "lower", "×")


def write_shard(prepared: Prepared, path: Path) -> None:
    """Write the model, the item side, the low-rank table and some queries into one file."""
    world = prepared.world
    queries = world.queries.take(slice(0, NUM_QUERIES))
    tensors = {f"mol.{name}": value for name, value in world.mol.state_dict().items()}
    tensors |= {
        "components": world.items.components_NXD,
        "gate": world.items.gate_NP,
        "query_components": queries.components_BQD,
        "query_gate": queries.gate_BP,
        "low_rank": prepared.shard.low_rank_NR,
        "dim": torch.tensor(world.item_rows_NE.shape[1]),
        "settings": torch.tensor(list(world.mol.settings.model_dump_json().encode()), dtype=torch.uint8),
    }
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def main(path: str) -> None:
    """Read the shard, search it and print the resident bytes, the tables' bytes and the number of items."""
    tensors = load_file(path)
    settings = MolSettings.model_validate_json(bytes(tensors.pop("settings").tolist()))
    mol = MixtureOfLogits(int(tensors.pop("dim")), settings).eval().requires_grad_(False)
    mol.load_state_dict({n.removeprefix("mol."): t for n, t in tensors.items() if n.startswith("mol.")})
    queries = QuerySide(tensors["query_components"].clone(), tensors["query_gate"].clone())
    index = lay_out(mol, ItemSide(tensors["components"], tensors["gate"]), tensors["low_rank"])
    del tensors
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with torch.inference_mode():
        search(index, queries, SearchSettings(k=100, method="topk_avg", num_preselected=1_000))
    resident = memory_of(os.getpid())["VmRSS"]
    print(json.dumps({"resident": resident, "tables": sum(index.bytes_of.values()), "items": len(index)}))


if __name__ == "__main__":
    main(sys.argv[1])
