"""The machine code of the GPU kernels for Hopper, compiled without a GPU.

Launches are recorded instead of run, and each kernel is compiled for sm_90 by the assembler that Triton brings along.
A line gives registers of a thread, shared memory, and the number of instructions of some kinds in the machine code:
HGMMA/IGMMA are Hopper's matrix products, HMMA/IMMA the older ones, FFMA plain arithmetic, STL/LDL spills.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import JITFunction

from pipeline.data.lists import Lists
from pipeline.model.mol import ItemSide, QuerySide
from pipeline.retrieval.backends.triton import launch, mol_kernel, product_kernels
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
KERNELS = {
    "bin_maxima_kernel": product_kernels,
    "mark_kernel": product_kernels,
    "clear_kernel": product_kernels,
    "list_kernel": product_kernels,
    "gathered_products_kernel": product_kernels,
    "mol_kernel": mol_kernel,
}
Value = Tensor | int | float | None


@dataclass(frozen=True)
class Recorder:
    """A stand-in for a kernel that keeps the arguments of its launches."""

    kernel: JITFunction
    launches: list[tuple[tuple[Value, ...], dict[str, Value]]] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **constants: self.launches.append((args, constants))

    def compile_all(self) -> Iterator[CompiledKernel]:
        """Compile each launch and forget it."""
        for args, constants in self.launches:
            yield compile_launch(self.kernel, args, constants)
        self.launches.clear()


def compile_launch(kernel: JITFunction, args: tuple[Value, ...], constants: Mapping[str, Value]) -> CompiledKernel:
    """Compile for sm_90, specialised as the launch would be to its arguments: types, multiples of 16, ones."""
    signature: dict[str, str] = dict.fromkeys(kernel.arg_names, "constexpr")
    constexprs = {name: value for name, value in constants.items() if name not in OPTIONS}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for position, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif value == 1:
            constexprs[name] = value
        else:
            assert isinstance(value, int)
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {name: value for name, value in constants.items() if name in OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def describe(compiled: CompiledKernel) -> str:
    """Count the registers, memory and instructions of the machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage, code = (_dump(path, option) for option in ("-res-usage", "-sass"))
    counts = Counter(re.findall(r"\b(HGMMA|IGMMA|HMMA|IMMA|FFMA|MUFU|ATOMG?|LDGSTS|LDG|STL|LDL)\b", code))
    registers = re.search(r"REG:(\d+)", usage)
    lines = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", code, re.MULTILINE))
    kinds = " ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))
    shared = compiled.metadata.shared // 1024
    return f"registers {registers and registers[1]} shared {shared} KB instructions {lines}: {kinds}"


def _dump(path: Path, option: str) -> str:
    done = subprocess.run([TOOLS / "cuobjdump", option, path], capture_output=True, text=True)
    return done.stdout + done.stderr


def record_products(dtype: torch.dtype, dim: int, num_components: int = 1, num_item_components: int = 1) -> None:
    """Launch the kernels of stage 1, or with several components the kernels of the bounds."""
    items = torch.zeros(NUM_ITEMS, num_item_components, dim, dtype=dtype)
    least = 32 if dtype == torch.int8 else 16
    queries = pad_columns(torch.zeros(NUM_QUERIES, num_components, dim, dtype=dtype), least)
    offsets, excluded = np.arange(NUM_QUERIES + 1), np.zeros(NUM_QUERIES, dtype=np.int32)
    allowed = launch.allow(ShardMask(NUM_ITEMS, Lists(offsets, excluded)), torch.device("cpu"))
    floor_B = torch.zeros(NUM_QUERIES)
    if num_components > 1:
        launch.collect_bounded(queries, items, allowed, floor_B, 0, NUM_ITEMS)
        return
    launch.bin_maxima(queries[:, 0], items[:, 0], 1)
    lists = launch.collect(queries, items, allowed, floor_B, NUM_CANDIDATES)
    launch.gathered_products(queries, items, lists)


def record_mol(shape: MolShape, dtype: torch.dtype) -> None:
    """Launch the kernel of stage 2; in float32 as the scan does, with a floor."""
    num_pairs = shape.num_query_components * shape.num_item_components
    sides = torch.zeros(64, shape.num_item_components, shape.dim), torch.zeros(64, num_pairs)
    items = lay_out_items(shape, ItemSide(*sides))
    sizes = (NUM_QUERIES, shape.num_query_components, shape.dim)
    queries = lay_out_queries(shape, QuerySide(torch.zeros(sizes), torch.zeros(NUM_QUERIES, num_pairs)), 0.05, dtype)
    hidden, pairs = shape.padded_hidden_dim, shape.num_padded_pairs
    first, second = torch.zeros(hidden, pairs, dtype=dtype), torch.zeros(pairs, hidden, dtype=dtype)
    weights = MolWeights(shape, first, torch.zeros(hidden), second, torch.zeros(pairs))
    rows_BM = torch.zeros(NUM_QUERIES, NUM_CANDIDATES, dtype=torch.int32)
    if dtype == torch.float32:
        candidates = launch.ItemLists(rows_BM, rows_BM[:, 0].contiguous())
        launch.score_above(items, weights, queries, candidates, torch.zeros(NUM_QUERIES))
    else:
        launch.score_pairs(items, weights, queries, rows_BM)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Name each launch that is worth a look."""
    for dtype, dims in ((torch.bfloat16, (32, 64, 128, 256, 512)), (torch.int8, (64, 256)), (torch.float32, (64,))):
        for dim in dims:
            yield f"products {str(dtype)[6:]} × {dim}", partial(record_products, dtype, dim)
    for q, x, d, h in ((8, 8, 32, 128), (8, 4, 64, 128), (4, 4, 24, 48), (3, 5, 7, 10), (16, 16, 64, 256)):
        yield f"bounds {q}×{x}×{d}", partial(record_products, torch.bfloat16, d, q, x)
        for dtype in (torch.bfloat16, torch.float32):
            yield f"mol {q}×{x}×{d} H {h} {str(dtype)[6:]}", partial(record_mol, MolShape(q, x, d, h), dtype)


def main(only: str) -> None:
    """Print one line per kernel of each case whose name contains `only`."""
    recorders = {name: Recorder(getattr(module, name)) for name, module in KERNELS.items()}
    for name, module in KERNELS.items():
        setattr(module, name, recorders[name])
    for name, record in cases():
        if only not in name:
            continue
        record()
        for kernel, recorder in recorders.items():
            for compiled in recorder.compile_all():
                print(f"{name} {kernel}: {describe(compiled)}", flush=True)
