"""A pool whose threads dawdle: its own code, compiled anew with a random delay before every atomic operation.

So a thread may be late at any point inside a barrier, between a barrier and the next kernel, before it goes
to sleep, before it is woken. The product's code is not touched and pays nothing.
"""

from types import FunctionType
from typing import Any

import numpy as np
from numba import njit, types
from nybble.kernels.cpu import abi, atomics, pool

_usleep = types.ExternalFunction("usleep", types.int32(types.uint32))


class Delays:
    """``functions`` replaces ``pool._functions``; ``count``: how often a thread came by a delay."""

    def __init__(self) -> None:
        self._word = np.zeros(1, np.int64)
        self._compiled = _compile(self._word.ctypes.data)

    @property
    def count(self) -> int:
        return int(self._word[0])

    def functions(self) -> tuple[Any, Any, Any]:
        return self._compiled


def _compile(counter: int) -> tuple[Any, Any, Any]:
    """Of 32 operations one sleeps up to 100 us (and as long as the kernel likes), six spin up to 2 us."""

    @njit(nogil=True)
    def delay():  # type: ignore[no-untyped-def]
        turn = atomics.atomic_add(counter, 1)
        mixed = np.uint64(turn + 1) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        choice = (mixed >> np.uint64(59)) & np.uint64(31)
        length = (mixed >> np.uint64(20)) & np.uint64(0xFFFF)
        if choice == 0:
            _usleep(length % np.uint64(100))
        elif choice < 7:
            for _ in range(length % np.uint64(50)):
                atomics._pause()

    @njit(nogil=True)
    def late_load(address):  # type: ignore[no-untyped-def]
        delay()
        return atomics.atomic_load(address)

    @njit(nogil=True)
    def late_store(address, value):  # type: ignore[no-untyped-def]
        delay()
        atomics.atomic_store(address, value)

    @njit(nogil=True)
    def late_add(address, value):  # type: ignore[no-untyped-def]
        delay()
        return atomics.atomic_add(address, value)

    @njit(nogil=True)
    def late_call(kernel, args, thread, num_threads):  # type: ignore[no-untyped-def]
        delay()
        abi.call_kernel(kernel, args, thread, num_threads)
        delay()

    late = {"atomic_load": late_load, "atomic_store": late_store, "atomic_add": late_add}
    names = vars(atomics) | late
    for name in ("wait_while_equal", "wake"):
        names[name] = _again(vars(atomics)[name].py_func, names)
    names = (
        vars(pool) | late | {"call_kernel": late_call, **{n: names[n] for n in ("wait_while_equal", "wake")}}
    )
    for name in ("_barrier", "_replay"):
        names[name] = _again(vars(pool)[name].py_func, names)
    run = [
        FunctionType(vars(pool)[n].__code__, names) for n in ("_worker_loop", "_run_tape", "_stop_workers")
    ]
    # Never from a cache, nor into it: numba would take these for the product's.
    loop, run_tape, stop = (
        njit(types.void(*[types.intp] * f.__code__.co_argcount), nogil=True)(f) for f in run
    )
    return loop, run_tape, stop


def _again(function: Any, names: dict[str, Any]) -> Any:
    """Compile a function with other globals."""
    return njit(nogil=True)(FunctionType(function.__code__, names, function.__name__))
