"""How Python calls the C++ side, by ctypes. Each user of the kernels declares its own structures and functions."""

import ctypes
from collections.abc import Mapping
from ctypes import c_char_p, c_int
from typing import Any

from torch import Tensor

# Each function's result and arguments.
Functions = Mapping[str, tuple[Any, tuple[Any, ...]]]
FUNCTIONS: Functions = {"nr_instruction_set": (c_char_p, ()), "nr_is_usable": (c_int, ())}


class Struct(ctypes.Structure):
    """A structure that takes tensors for its pointers and keeps them alive as long as itself."""

    def __init__(self, *values: Any) -> None:
        self._tensors = [value for value in values if isinstance(value, Tensor)]
        super().__init__(*(value.data_ptr() if isinstance(value, Tensor) else value for value in values))


def declare(library: ctypes.CDLL, functions: Functions) -> None:
    """Tell ctypes the functions' types, so that it converts arguments and refuses wrong ones."""
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
