"""Threads, barriers, their end, and forks."""

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from delayed_pool import Delays
from numpy.typing import NDArray
from nybble.kernels.cpu import pool as pool_module
from nybble.kernels.cpu.abi import compile_kernel, word
from nybble.kernels.cpu.atomics import atomic_add, atomic_load, atomic_store
from nybble.kernels.cpu.contention import Contention
from nybble.kernels.cpu.pool import RECORD_WORDS, Pool

TIMEOUT = 30.0  # seconds until a test says that threads hang


def append_stage(args, thread, num_threads):  # type: ignore[no-untyped-def]
    """args: counters [threads], stage, errors: every thread must find all others at this stage's start."""
    counters = word(args, 0)
    stage = word(args, 1)
    for other in range(num_threads):
        seen = atomic_load(counters + 64 * other)
        if seen < stage or seen > stage + 1:
            atomic_add(word(args, 2), 1)
    atomic_store(counters + 64 * thread, stage + 1)


class Stages:
    """A tape of ``count`` calls; in each, every thread looks where the others are."""

    def __init__(self, num_threads: int, count: int = 50) -> None:
        kernel = compile_kernel(append_stage)
        self.counters = np.zeros(8 * num_threads, np.int64)
        self.errors = np.zeros(1, np.int64)
        head, tail = self.counters.ctypes.data, self.errors.ctypes.data
        self._args = [np.array([head, stage, tail], np.int64) for stage in range(count)]
        self.records: NDArray[np.int64] = np.zeros((count, RECORD_WORDS), np.int64)
        for stage, args in enumerate(self._args):
            self.records[stage, :3] = kernel.address, args.ctypes.data, 1

    def run(self, pool: Pool) -> None:
        """All of them; every thread reached the end, and none ran ahead."""
        self.counters[:] = 0
        pool.run(self.records.ctypes.data, len(self.records))
        assert self.errors[0] == 0
        assert (self.counters[::8] == len(self.records)).all()


def run_in_time(pool: Pool, stages: Sequence[Stages], count: int) -> None:
    """``count`` runs of each, by threads that may be left behind: a hang is a failure."""
    done: list[Stages] = []

    def run(own: Stages) -> None:
        for _ in range(count):
            own.run(pool)
        done.append(own)

    callers = [threading.Thread(target=run, args=(own,), daemon=True) for own in stages]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(TIMEOUT)
        if caller.is_alive():
            pool.close.detach()  # it would wait for the run
            pytest.fail("threads wait for each other")
    assert len(done) == len(stages)


@pytest.fixture(scope="module")
def delays() -> Delays:
    return Delays()


@pytest.fixture
def never_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool keeps to all its threads, whatever else the machine does."""
    monkeypatch.setattr(Contention, "alone", lambda self, now: False)


@pytest.mark.parametrize("late", [False, True], ids=["prompt", "late"])
@pytest.mark.parametrize("spin", [0, 2000])
@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_no_thread_runs_ahead_of_a_barrier(
    num_threads: int,
    spin: int,
    late: bool,
    delays: Delays,
    never_alone: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``late`` threads dawdle inside the barrier too.

    Tried: with the barrier's two writes swapped (generation before count) late threads failed every time,
    prompt ones never.
    """
    if late:
        monkeypatch.setattr(pool_module, "_functions", delays.functions)
    stages, pool, before = Stages(num_threads), Pool(num_threads, spin), delays.count
    run_in_time(pool, [stages], 100)
    pool.close()
    assert (delays.count - before > 100 * 50) == late


def test_idle_threads_use_no_cpu(never_alone: None) -> None:
    stages, pool = Stages(2), Pool(2)
    stages.run(pool)
    time.sleep(0.2)
    before = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - before < 0.01
    pool.close()


def test_closed_while_it_runs(never_alone: None) -> None:
    """A run in progress ends as ever; the next is refused instead of waiting for threads that are gone."""
    for turn in range(20):
        stages, pool = Stages(2), Pool(2, spin=0)
        refused: list[str] = []

        def keep_running(stages: Stages = stages, pool: Pool = pool, refused: list[str] = refused) -> None:
            while not refused:
                try:
                    stages.run(pool)
                except RuntimeError as error:
                    refused.append(str(error))

        caller = threading.Thread(target=keep_running, daemon=True)
        caller.start()
        time.sleep(0.002 * (turn % 5))
        pool.close()
        caller.join(TIMEOUT)
        assert refused == ["the pool is closed"]
        pool.close()  # again: nothing


def test_callers_take_turns(never_alone: None) -> None:
    pool = Pool(2)
    run_in_time(pool, [Stages(2), Stages(2)], 50)
    pool.close()


FORK_HEAD = """
import os, sys, threading, time, warnings
sys.path[:0] = {path!r}
from test_pool import Contention, Pool, Stages
warnings.simplefilter("ignore", DeprecationWarning)  # Python says that forking beside threads is delicate
Contention.alone = lambda self, now: False
"""
FORK = """
used, unused, closed = Pool(2), Pool(2), Pool(2)
stages = Stages(2)
stages.run(used)
stages.run(closed)
closed.close()
busy = Stages(2)
threading.Thread(target=lambda: [busy.run(used) for _ in range(10**9)], daemon=True).start()
time.sleep(0.05)
for turn in range(20):  # now and then in the middle of a run
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for pool in (used, unused):
                for _ in range(20):
                    stages.run(pool)
            try:
                stages.run(closed)
            except RuntimeError:
                code = 0
            used.close()
            unused.close()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0, "the child failed"
    stages.run(unused)
print("all children ran")
"""
# The lock is held in the parent at most forks; in the child three callers are first at the same time.
FORK_CALLERS = """
pool = Pool(2)
stages = [Stages(2) for _ in range(3)]
busy = Stages(2)
threading.Thread(target=lambda: [busy.run(pool) for _ in range(10**9)], daemon=True).start()
time.sleep(0.05)

def call(own, together, done):
    together.wait()
    for _ in range(20):
        own.run(pool)
    done.append(own)

for turn in range(20):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            together, done = threading.Barrier(3), []
            callers = [threading.Thread(target=call, args=(own, together, done)) for own in stages]
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join()
            workers = [one for one in threading.enumerate() if one.name.startswith("nybble-cpu")]
            pool.close()
            try:
                stages[0].run(pool)
            except RuntimeError:
                code = 0 if len(done) == 3 and len(workers) == 1 else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0, "the child failed"
print("all children ran")
"""


@pytest.mark.parametrize("script", [FORK, FORK_CALLERS], ids=["one caller", "three callers"])
def test_a_fork_gets_threads_of_its_own(script: str, child_environment: dict[str, str]) -> None:
    """Forked while a thread runs; pools that were used, that were not, and that are closed. Of several
    callers the first starts the threads, and all use them."""
    head = FORK_HEAD.format(path=[str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", head + script]
    done = subprocess.run(
        command, env=child_environment, capture_output=True, text=True, timeout=TIMEOUT * 4, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "all children ran" in done.stdout


def test_its_own_end_ends_its_threads() -> None:
    before = threading.active_count()
    pool = Pool(3)
    assert threading.active_count() == before + 2
    del pool
    assert threading.active_count() == before
