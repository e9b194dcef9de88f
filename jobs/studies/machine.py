"""The machine under a study: its processor, and the memory of processes on it (Linux)."""

import platform
from pathlib import Path

from pipeline.native.loader import cpu_flags


def processor() -> str:
    """The name that the machine gives its CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def has_amx() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in tiles (AMX)."""
    return "amx_bf16" in cpu_flags()


def family(root: int) -> list[int]:
    """The process `root` and all its descendants."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        text = _read(path)
        if text:
            parents[int(path.parent.name)] = int(text.rpartition(")")[2].split()[1])
    members = [root]
    for member in members:  # grows while it is walked
        members += [process for process, parent in parents.items() if parent == member]
    return members


def memory_of(process: int, file: str = "status") -> dict[str, int]:
    """Bytes by the kernel's name for them, from /proc/PID/status or smaps_rollup; empty when the process has ended."""
    lines = (line.split() for line in _read(Path(f"/proc/{process}/{file}")).splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""
