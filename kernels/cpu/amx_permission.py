"""Linux gives AMX's tile registers (8 KiB a thread) only to processes that ask."""

import ctypes
import os
import platform
from functools import cache

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # x86-64's numbers


@cache
def amx_refusal() -> str | None:
    """Ask for this process, its threads and its children: why they may not use AMX, or None."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "AMX is used on x86-64 Linux only"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0:
        return None
    return f"the operating system refuses AMX's registers: {os.strerror(ctypes.get_errno())}"
