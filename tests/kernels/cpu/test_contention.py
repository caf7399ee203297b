"""When a pool had better run on one thread: judged by counts in a false /proc."""

import threading
import time
from pathlib import Path

import pytest
from nybble.kernels.cpu.contention import LEAST_PENALTY, WINDOW, Contention, waits_are_counted


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    write(tmp_path, threading.get_native_id(), 0)
    write(tmp_path, 7, 0)
    return tmp_path


def write(proc: Path, thread: int, waited: int) -> None:
    folder = proc / str(thread)
    folder.mkdir(exist_ok=True)
    (folder / "schedstat").write_text(f"123456 {waited} 99\n")


def runs(contention: Contention, seconds: float) -> None:
    for _ in range(round(seconds / 0.01)):
        contention.ran(0.01)


def test_threads_that_wait_for_a_core_go_alone_and_come_back(proc: Path) -> None:
    contention = Contention([7], proc)
    runs(contention, WINDOW * 3)
    assert not contention.alone(time.monotonic())
    write(proc, 7, int(0.5 * WINDOW * 1e9))
    runs(contention, WINDOW)
    now = time.monotonic()
    assert contention.alone(now)
    assert not contention.alone(now + LEAST_PENALTY + 0.1)


def test_a_second_time_lasts_longer(proc: Path) -> None:
    contention = Contention([7], proc)
    for turn in range(1, 3):
        contention.ran(0.001)
        write(proc, 7, turn * int(WINDOW * 1e9))
        runs(contention, WINDOW)
    assert contention.alone(time.monotonic() + 1.5 * LEAST_PENALTY)


def test_a_short_wait_is_no_contention(proc: Path) -> None:
    contention = Contention([7], proc)
    for turn in range(5):
        write(proc, 7, turn * int(0.1 * WINDOW * 1e9))
        runs(contention, WINDOW)
    assert not contention.alone(time.monotonic())


def test_a_kernel_that_does_not_count(tmp_path: Path) -> None:
    contention = Contention([7], tmp_path / "nothing")
    runs(contention, 10 * WINDOW)
    assert not contention.alone(time.monotonic())


@pytest.mark.parametrize(("content", "counted"), [("123456 0 99\n", True), ("0 0 0\n", False), (None, False)])
def test_whether_waits_are_counted(content: str | None, counted: bool, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "schedstat").write_text(content)
    assert waits_are_counted(tmp_path) == counted
