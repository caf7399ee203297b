"""Tensors that may lie in files: accumulators of the size of the model, which memory need not hold.

A mapped file's pages are the system's to write out and to forget: they bound no memory but the disk's.
"""

import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from ..errors import ConfigError
from ..hardware import available_memory

MEMORY_SHARE = 4  # a quarter of what is free may be accumulators; more goes to files


class Store:
    """A context manager. ``folder`` None: tensors lie in memory; else in files of a new folder in it."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = None if folder is None else tempfile.TemporaryDirectory(prefix=".store-", dir=folder)
        self._count = 0

    @staticmethod
    def for_bytes(folder: Path, num_bytes: int) -> "Store":
        """In memory where there is room enough for ``num_bytes``, else in ``folder``, made if need be."""
        if held_bytes(num_bytes):
            return Store()
        folder.mkdir(parents=True, exist_ok=True)
        return Store(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def zeros(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of zeros. ConfigError where the disk is full."""
        if self._folder is None:
            return torch.zeros(tuple(shape), dtype=dtype)
        path = Path(self._folder.name, f"{self._count}.bin")
        self._count += 1
        size = prod(shape)
        remaining = size * dtype.itemsize
        try:
            with path.open("wb") as file:  # written, not sparse: a full disk is an error here, later a signal
                chunk = bytes(min(remaining, 1 << 20))
                while remaining > 0:
                    remaining -= file.write(chunk[:remaining])
        except OSError as error:
            raise ConfigError(
                f"{path.parent}: no room for {size * dtype.itemsize / 1e9:.1f} GB of gradients "
                f"({error.strerror}); free some space"
            ) from error
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(tuple(shape))


def held_bytes(num_bytes: int) -> int:
    """What of ``num_bytes`` of accumulators a store holds in memory: all, or nothing."""
    return num_bytes if num_bytes <= available_memory() // MEMORY_SHARE else 0
