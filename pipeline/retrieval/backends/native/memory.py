"""Memory for tables whose rows are read at random."""

import ctypes

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes
MADV_HUGEPAGE = 14


def huge_pages(num: int, dtype: torch.dtype) -> Tensor:
    """Make `num` zeros at a 2 MiB boundary, on huge pages where Linux gives them: fewer address look-ups per row."""
    size = num * dtype.itemsize
    buffer = torch.empty(size + HUGE_PAGE, dtype=torch.uint8)
    start = -buffer.data_ptr() % HUGE_PAGE
    part = buffer[start : start + size]
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "madvise") and size >= HUGE_PAGE:
        libc.madvise(ctypes.c_void_p(part.data_ptr()), ctypes.c_size_t(size), ctypes.c_int(MADV_HUGEPAGE))
    return part.zero_().view(dtype)
