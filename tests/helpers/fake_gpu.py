"""A GPU that compiles and cannot run: launches are specialized as on a real one, and compiled for it.

In a process of its own, before kernels are imported: without TRITON_INTERPRET.
"""

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver


class FakeGPU(DriverBase):  # type: ignore[misc]
    """What ``kernel.warmup`` asks a driver for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    @classmethod
    def is_active(cls) -> bool:
        """Never by itself."""
        return False

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return self._target

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where tensors are."""
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        """Of launchers, which are not built."""
        return kind

    def get_benchmarker(self) -> Any:
        """None: nothing runs."""
        raise NotImplementedError


def use(architecture: str) -> None:
    """Make the fake GPU ("sm_90", "gfx942") the active one."""
    if architecture.startswith("sm_"):
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", architecture, 64)
    driver.set_active(FakeGPU(target))
