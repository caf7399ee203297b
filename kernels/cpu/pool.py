"""Persistent threads that replay tapes: flat lists of kernel calls, with barriers of our own.

A worker is a Python thread inside one compiled call that never takes the interpreter lock. Between runs it
spins briefly and then sleeps in the kernel (no CPU when idle). Within a run every thread makes every call
(each does its share) and they meet at a barrier where the tape says so.

Under contention runs go on one thread for a while (``contention``), so that a foreign process costs its
share of the speed, not a factor of ten.
"""

import os
import threading
import time
import weakref
from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .abi import call_kernel, compile_function, word
from .atomics import atomic_add, atomic_load, atomic_store, wait_while_equal, wake
from .contention import Contention

RECORD_WORDS = 4  # kernel, args, barrier after (0 or 1), unused: 32 bytes
_LINE = 64
(
    _COUNT,
    _GENERATION,
    _BARRIER_SLEEPERS,
    _GO,
    _GO_SLEEPERS,
    _STOP,
    _SPIN,
    _THREADS,
    _TAPE,
    _LENGTH,
) = (i * _LINE for i in range(10))


@njit(nogil=True)
def _barrier(control, num_threads):
    generation = atomic_load(control + _GENERATION)
    if atomic_add(control + _COUNT, 1) == num_threads - 1:
        atomic_store(control + _COUNT, 0)
        atomic_add(control + _GENERATION, 1)
        wake(control + _GENERATION, control + _BARRIER_SLEEPERS)
    else:
        spin = atomic_load(control + _SPIN)
        wait_while_equal(control + _GENERATION, generation, spin, control + _BARRIER_SLEEPERS)


@njit(nogil=True)
def _replay(control, thread, num_threads, tape, length):
    for i in range(length):
        record = tape + i * RECORD_WORDS * 8
        call_kernel(word(record, 0), word(record, 1), thread, num_threads)
        if num_threads > 1 and (word(record, 2) != 0 or i == length - 1):
            _barrier(control, num_threads)


def _worker_loop(control, thread):
    """Serve runs until told to stop."""
    generation = 0
    while True:
        spin = atomic_load(control + _SPIN)
        wait_while_equal(control + _GO, generation, spin, control + _GO_SLEEPERS)
        generation += 1
        if atomic_load(control + _STOP) != 0:
            return
        num_threads = atomic_load(control + _THREADS)
        _replay(control, thread, num_threads, atomic_load(control + _TAPE), atomic_load(control + _LENGTH))


def _run_tape(control, tape, length, num_threads):
    """Replay on the caller and num_threads - 1 workers."""
    if num_threads > 1:
        atomic_store(control + _THREADS, num_threads)
        atomic_store(control + _TAPE, tape)
        atomic_store(control + _LENGTH, length)
        atomic_add(control + _GO, 1)
        wake(control + _GO, control + _GO_SLEEPERS)
    _replay(control, 0, num_threads, tape, length)


def _stop_workers(control):
    atomic_store(control + _STOP, 1)
    atomic_add(control + _GO, 1)
    wake(control + _GO, control + _GO_SLEEPERS)


@lru_cache(maxsize=1)
def _functions() -> tuple[Any, Any, Any]:
    """The worker's loop, a run, and the end of all workers, compiled when the first pool is made."""
    return compile_function(_worker_loop), compile_function(_run_tape), compile_function(_stop_workers)


@lru_cache(maxsize=1)
def _told_of_forks() -> "weakref.WeakSet[_Workers]":
    """Whose ``forked`` every child of this process calls first."""
    living: weakref.WeakSet[_Workers] = weakref.WeakSet()

    def forked() -> None:
        for workers in list(living):
            workers.forked()

    os.register_at_fork(after_in_child=forked)
    return living


class _Workers:
    """The threads of a pool, and the control block that they watch; in a fork the first run starts others."""

    def __init__(self, count: int, spin: int) -> None:
        self._count = count
        self._spin = spin
        self._closed = False
        self._lock = threading.Lock()  # held by a run, its start of threads too, and by the end
        self._start()
        _told_of_forks().add(self)

    def _start(self) -> None:
        memory = np.zeros(11 * _LINE // 8, np.int64)
        self._control = (memory.ctypes.data + _LINE - 1) // _LINE * _LINE
        memory[(self._control - memory.ctypes.data + _SPIN) // 8] = self._spin
        worker_loop, self._run_tape, self._stop = _functions()
        self._threads = [
            threading.Thread(target=worker_loop, args=(self._control, i), daemon=True, name=f"nybble-cpu-{i}")
            for i in range(1, self._count + 1)
        ]
        for thread in self._threads:
            thread.start()
        self._contention = Contention([thread.native_id or 0 for thread in self._threads])
        self._memory: NDArray[np.int64] | None = memory

    def forked(self) -> None:
        """In a child: the threads live in the parent, and one of them may have held the lock."""
        self._lock = threading.Lock()
        self._threads = []
        self._memory = None  # to be started

    def run(self, tape: int, length: int) -> None:
        """See Pool."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool is closed")
            if self._memory is None:
                self._start()
            began = time.monotonic()
            if self._count == 0 or self._contention.alone(began):
                self._run_tape(self._control, tape, length, 1)
                return
            self._run_tape(self._control, tape, length, self._count + 1)
            self._contention.ran(time.monotonic() - began)

    def close(self) -> None:
        """Wait for a run in progress, stop the threads, and wait until none reads the control block."""
        self._closed = True
        with self._lock:
            if self._threads:
                self._stop(self._control)
                for thread in self._threads:
                    thread.join()


class Pool:
    """``num_threads`` counts the caller. ``close()`` ends the workers, after the run that may be in progress;
    so does the pool's own end.

    Threads do not survive a fork: in the child, the first run starts workers of its own.
    """

    def __init__(self, num_threads: int, spin: int = 2000) -> None:
        self.num_threads = num_threads
        self._workers = _Workers(num_threads - 1, spin)
        self.close = weakref.finalize(self, self._workers.close)

    def run(self, tape: int, length: int) -> None:
        """Replay ``length`` records at an address; returns when all are done. Callers take turns.

        RuntimeError: the pool is closed.
        """
        self._workers.run(tape, length)
