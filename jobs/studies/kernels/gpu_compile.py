"""What the GPU kernels compile to for Hopper, without a GPU: python -m jobs.studies.kernels.gpu_compile

Launches are recorded instead of run, and each kernel is compiled for sm_90 by the assembler that Triton brings along.
A line gives registers of a thread, bytes spilt to local memory, shared memory, and how many instructions of some kinds
stand in the machine code: HGMMA/IGMMA are Hopper's matrix products, HMMA/IMMA the older ones, FFMA plain arithmetic.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipeline.model.mol import ItemSide, QuerySide
from pipeline.retrieval.backends.triton import launch as triton_launch
from pipeline.retrieval.backends.triton import mol_kernel as triton_mol
from pipeline.retrieval.backends.triton import product_kernels as triton_kernels
from pipeline.retrieval.backends.triton.layout import MolShape, MolWeights, lay_out_items, lay_out_queries, pad_columns
from pipeline.retrieval.filters import ShardMask

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
NUM_QUERIES, NUM_ITEMS, NUM_CANDIDATES = 1_024, 4_096, 2_048
OPTIONS = ("num_warps", "num_stages", "maxnreg")
KERNELS = ("bin_maxima_kernel", "mark_kernel", "clear_kernel", "list_kernel", "gathered_products_kernel")


class Recorder:
    """Stands for a kernel; keeps the arguments of its launch."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((args, kwargs))

    def compile_all(self):
        for args, kwargs in self.launches:
            yield compile_launch(self.kernel, args, kwargs)
        self.launches.clear()


def compile_launch(kernel, args, kwargs):
    names = list(kernel.arg_names)
    signature = dict.fromkeys(names, "constexpr")
    aligned = {}
    for at, (name, value) in enumerate(zip(names, args, strict=False)):
        signature[name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:  # what the launch would find and specialise on
            aligned[(at,)] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in kwargs.items() if name not in OPTIONS}
    for name, value in zip(names, args, strict=False):
        if isinstance(value, int) and value == 1:
            signature[name], constants[name] = "constexpr", 1
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {name: kwargs[name] for name in OPTIONS if name in kwargs}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def describe(compiled):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = run("cuobjdump", "-res-usage", path)
        code = run("cuobjdump", "-sass", path)
    if folder := os.environ.get("SASS"):
        (Path(folder) / f"{compiled.metadata.name}-{compiled.hash[:8]}.sass").write_text(code)
    found = Counter(re.findall(r"\b(HGMMA|IGMMA|HMMA|IMMA|FFMA|MUFU|ATOMG?|LDGSTS|LDG|STL|LDL)\b", code))
    registers = re.search(r"REG:(\d+)", usage)[1]
    lines = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", code, re.M))
    kinds = " ".join(f"{kind} {count}" for kind, count in sorted(found.items()))
    return f"registers {registers} shared {compiled.metadata.shared // 1024} KB instructions {lines}: {kinds}"


def run(tool, *args):
    done = subprocess.run([TOOLS / tool, *args], capture_output=True, text=True)
    return done.stdout + done.stderr


def record_products(dtype, dim, num_components=1, num_item_components=1):
    items = torch.zeros(NUM_ITEMS, num_item_components, dim, dtype=dtype)
    least = 32 if dtype == torch.int8 else 16
    queries = pad_columns(torch.zeros(NUM_QUERIES, num_components, dim, dtype=dtype), least)
    offsets, at = np.arange(NUM_QUERIES + 1), np.zeros(NUM_QUERIES, dtype=np.int32)
    allowed = triton_launch.allow(ShardMask(torch.ones(NUM_ITEMS, dtype=torch.bool), offsets, at))
    floor = torch.zeros(NUM_QUERIES)
    if num_components > 1:
        triton_launch.collect_bounded(queries, items, allowed, floor, 0, NUM_ITEMS)
        return
    triton_launch.bin_maxima(queries[:, 0], items[:, 0], 1)
    found = triton_launch.collect(queries, items, allowed, floor, NUM_CANDIDATES)
    triton_launch.gathered_products(queries, items, found)


def record_mol(shape, dtype, has_floor):
    num_pairs = shape.num_query_components * shape.num_item_components
    items = lay_out_items(
        shape, ItemSide(torch.zeros(64, shape.num_item_components, shape.dim), torch.zeros(64, num_pairs))
    )
    sizes = (NUM_QUERIES, shape.num_query_components, shape.dim)
    queries = lay_out_queries(shape, QuerySide(torch.zeros(sizes), torch.zeros(NUM_QUERIES, num_pairs)), 0.05, dtype)
    hidden, pairs = shape.padded_hidden_dim, shape.num_padded_pairs
    weights = MolWeights(
        shape,
        torch.zeros(hidden, pairs, dtype=dtype),
        torch.zeros(hidden),
        torch.zeros(pairs, hidden, dtype=dtype),
        torch.zeros(pairs),
    )
    at = torch.zeros(NUM_QUERIES, NUM_CANDIDATES, dtype=torch.int32)
    if has_floor:
        candidates = triton_launch.Found(at, at[:, 0].contiguous())
        triton_launch.score_above(items, weights, queries, candidates, torch.zeros(NUM_QUERIES))
    else:
        triton_launch.score_pairs(items, weights, queries, at)


def main():
    products = {name: Recorder(getattr(triton_kernels, name)) for name in KERNELS}
    mol = {"mol_kernel": Recorder(triton_mol.mol_kernel)}
    triton_launch.triton_kernels, triton_launch.triton_mol = SimpleNamespace(**products), SimpleNamespace(**mol)
    cases = [
        (f"products {str(dtype)[6:]} × {dim}", lambda dtype=dtype, dim=dim: record_products(dtype, dim))
        for dtype, dims in ((torch.bfloat16, (32, 64, 128, 256, 512)), (torch.int8, (64, 256)), (torch.float32, (64,)))
        for dim in dims
    ]
    shapes = [MolShape(8, 8, 32, 128), MolShape(8, 4, 64, 128), MolShape(4, 4, 24, 48), MolShape(3, 5, 7, 10)]
    shapes.append(MolShape(16, 16, 64, 256))
    for shape in shapes:
        q, x, d, h = shape.num_query_components, shape.num_item_components, shape.dim, shape.hidden_dim
        cases.append((f"bounds {q}×{x}×{d}", lambda q=q, x=x, d=d: record_products(torch.bfloat16, d, q, x)))
        for dtype in (torch.bfloat16, torch.float32):
            name = f"mol {q}×{x}×{d} H {h} {str(dtype)[6:]}"
            cases.append((name, lambda s=shape, t=dtype: record_mol(s, t, t == torch.float32)))
    wanted = os.environ.get("ONLY", "")
    for name, record in cases:
        if wanted not in name:
            continue
        record()
        for kernel, recorder in (products | mol).items():
            for compiled in recorder.compile_all():
                print(f"{name} {kernel}: {describe(compiled)}", flush=True)


if __name__ == "__main__":
    main()
