"""Threads, barriers and the fall-back to one thread."""

import time

import numpy as np
import pytest
from nybble.kernels.cpu.abi import compile_kernel, word
from nybble.kernels.cpu.atomics import atomic_add, atomic_load, atomic_store
from nybble.kernels.cpu.pool import RECORD_WORDS, Pool


def append_stage(args, thread, num_threads):  # type: ignore[no-untyped-def]
    """args: counters [threads], stage, errors: every thread must find all others at this stage's start."""
    counters = word(args, 0)
    stage = word(args, 1)
    for other in range(num_threads):
        seen = atomic_load(counters + 64 * other)
        if seen < stage or seen > stage + 1:
            atomic_add(word(args, 2), 1)
    atomic_store(counters + 64 * thread, stage + 1)


@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_no_thread_runs_ahead_of_a_barrier(num_threads: int) -> None:
    kernel = compile_kernel(append_stage)
    stages = 50
    counters = np.zeros(8 * num_threads, np.int64)
    errors = np.zeros(1, np.int64)
    args = [np.array([counters.ctypes.data, s, errors.ctypes.data], np.int64) for s in range(stages)]
    records = np.zeros((stages, RECORD_WORDS), np.int64)
    for stage in range(stages):
        records[stage, :3] = kernel.address, args[stage].ctypes.data, 1
    pool = Pool(num_threads)
    try:
        for _ in range(200):
            counters[:] = 0
            pool.run(records, stages)
            assert errors[0] == 0
    finally:
        pool.close()


def test_idle_threads_use_no_cpu() -> None:
    pool = Pool(2)
    kernel = compile_kernel(append_stage)
    counters, errors = np.zeros(16, np.int64), np.zeros(1, np.int64)
    args = np.array([counters.ctypes.data, 0, errors.ctypes.data], np.int64)
    records = np.array([[kernel.address, args.ctypes.data, 1, 0]], np.int64)
    pool.run(records, 1)
    time.sleep(0.2)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05
    pool.close()
