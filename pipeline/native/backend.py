"""The backend that does a piece of work on this machine, as it is logged and recorded."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Backend:
    """A backend on this machine: `native <instruction set>`, `torch` or `triton`.

    `reason` says why it is not the backend that was asked for, or not the fastest; `origin` is the kernels' file.
    """

    name: str
    reason: str = ""
    origin: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name
