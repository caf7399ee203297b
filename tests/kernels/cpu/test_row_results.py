"""Whether rows are finite, and the first of their largest, against numpy: any width, any share, any value."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from nybble.engine.hardware import cpu_features
from nybble.kernels.cpu import row_results
from nybble.kernels.cpu.abi import compile_kernel
from nybble.kernels.cpu.compiled import CompiledLinear, compile_low_bit, kernels_for
from nybble.kernels.cpu.l16 import padded
from nybble.kernels.cpu.numba_linear import instruction_set
from nybble.kernels.cpu.pool import RECORD_WORDS, Pool
from nybble.kernels.cpu.recorder import Recorder
from nybble.kernels.cpu.tape import Inputs
from nybble.kernels.dispatch import Target
from nybble.kernels.layout import PackedWeight, QuantSpec, SparseOverlay
from torch import Tensor

ISA = instruction_set(Target(cpu_features=cpu_features(), cpu_kernels="auto"))
pytestmark = pytest.mark.skipif(ISA is None, reason="the CPU has neither AVX2 nor AVX-512 VNNI")
WIDTHS = (1, 2, 15, 16, 17, 31, 33, 64, 97, 130, 1000)
THREADS = (1, 2, 3, 4, 9)
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def kernels() -> dict[str, Any]:
    made = (row_results.finite_kernel, row_results.choose_kernel, row_results.largest_kernel)
    return {make.__name__: compile_kernel(make()) for make in made}


def call(kernel: Any, args: tuple[Any, ...], num_threads: int) -> None:
    """One thread after another, the last one first."""
    words = np.array([arg if isinstance(arg, int) else arg.ctypes.data for arg in args], np.int64)
    for thread in reversed(range(num_threads)):
        kernel.ctypes(words.ctypes.data, thread, num_threads)


def behind_padding(x: NDArray[np.float32], poison: float) -> NDArray[np.float32]:
    """The same rows, up to whole blocks of 16 columns filled with poison, and rows of it behind them."""
    rows, width = x.shape
    whole = np.full((rows + 2, padded(width, 16) + 16), poison, np.float32)
    whole[:rows, :width] = x
    return whole


def largest(
    kernels: dict[str, Any], x: NDArray[np.float32], num_threads: int = 1, poison: float = INF
) -> tuple[list[int], list[bool]]:
    """As the head does: the keys are begun by a copy of chosen rows."""
    rows, width = x.shape
    whole, count = behind_padding(x, poison), np.array([rows], np.int64)
    keys, out = np.full(rows + 1, 7, np.int64), np.zeros_like(whole)
    indices = np.arange(rows)[::-1].copy()
    ld = whole.shape[1]
    call(
        kernels["choose_kernel"],
        (indices, count, np.ascontiguousarray(whole[:rows][::-1]), ld, ld, out, ld, keys),
        num_threads,
    )
    assert np.array_equal(out[:rows], whole[:rows], equal_nan=True)
    assert not out[rows:].any()
    call(kernels["largest_kernel"], (out, ld, width, count, keys), num_threads)
    assert keys[rows] == 7  # nothing is written behind the last row
    return row_results.decoded(keys[:rows].tolist())


@pytest.mark.parametrize("num_threads", THREADS)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_first_of_the_largest(width: int, num_threads: int, kernels: dict[str, Any]) -> None:
    """Few values, so that ties are everywhere, across lanes, chains and threads."""
    rng = np.random.default_rng(width)
    for rows in (1, 2, 3, 17, 64, 70):
        for values in ([0.0, -0.0], [-0.0, -1.5], [0.0, -0.0, 1.5, -2.0, 1.4999999], [-3e38, -1e-45, -1e-38]):
            x = rng.choice(np.array(values, np.float32), (rows, width))
            for poison in (INF, NAN, 3e38):
                columns, finite = largest(kernels, x, num_threads, poison)
                assert columns == x.argmax(1).tolist()
                assert finite == [True] * rows
        x = rng.normal(size=(rows, width)).astype(np.float32) * 10.0 ** rng.integers(-40, 38)
        assert largest(kernels, x, num_threads) == (x.argmax(1).tolist(), [True] * rows)


def test_every_place_can_be_the_largest_and_can_be_broken(kernels: dict[str, Any]) -> None:
    x = np.tile(-np.arange(130, dtype=np.float32), (130, 1))
    x[np.arange(130), np.arange(130)] = 1.0
    limits = np.finfo(np.float32)
    for num_threads, top in itertools.product(THREADS, (1.0, limits.max, limits.smallest_subnormal)):
        x[x > 0] = top
        assert largest(kernels, x, num_threads) == (list(range(130)), [True] * 130)
    for num_threads, bad in itertools.product(THREADS, (NAN, -NAN, INF, -INF)):
        broken = x.copy()
        broken[np.arange(0, 130, 2), np.arange(0, 130, 2)] = bad
        columns, finite = largest(kernels, broken, num_threads, poison=0.0)
        assert finite == [row % 2 == 1 for row in range(130)]
        assert columns[1::2] == list(range(1, 130, 2))
    assert largest(kernels, np.full((1, 40), -limits.max, np.float32)) == ([0], [True])


@pytest.mark.parametrize("num_threads", THREADS)
@pytest.mark.parametrize("width", WIDTHS)
def test_finite_rows(width: int, num_threads: int, kernels: dict[str, Any]) -> None:
    rng = np.random.default_rng(width)
    for rows, bad in itertools.product((1, 2, 16, 17, 70), (NAN, INF, -INF)):
        x = rng.normal(size=(rows, width)).astype(np.float32) * np.float32(3e37)
        broken = rng.random(rows) < 0.4
        x[broken, rng.integers(width, size=rows)[broken]] = bad
        whole, count = behind_padding(x, NAN), np.array([rows], np.int64)
        found = np.full(rows + 1, 9, np.uint8)
        args = (whole, whole.shape[1], width, count, found)
        call(kernels["finite_kernel"], args, num_threads)
        assert found.tolist() == [*(~broken).astype(int).tolist(), 9]
    x = np.zeros((width, width), np.float32)
    np.fill_diagonal(x, NAN)
    found = np.full(width, 9, np.uint8)
    call(kernels["finite_kernel"], (x, width, width, np.array([width], np.int64), found), num_threads)
    assert not found.any()


def part(rows: int, residuals: bool, isa: str) -> CompiledLinear:
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 16, (rows, 64), generator=generator, dtype=torch.uint8)
    scales = torch.full((rows, 2), 0.125).half()
    dense = torch.randn(rows, 64, generator=generator) * (torch.rand(rows, 64, generator=generator) < 0.05)
    outliers = SparseOverlay.of(dense) if residuals else None
    return compile_low_bit(
        PackedWeight(codes, QuantSpec(4, 32, True), scales, outliers=outliers), isa, "int8"
    )


@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize(
    "parts", [[(97, False)], [(205, True)], [(16, True)], [(24, False), (41, True), (3, False)]], ids=str
)
def test_over_a_tape(parts: list[tuple[int, bool]], num_threads: int) -> None:
    """A head: the rows that are asked for, in any order and more than once; buffers hold NaN before."""
    assert ISA is not None
    weights = [part(*each, ISA).weight for each in parts]
    inputs, keys = Inputs(64), np.zeros(64, np.int64)
    hidden = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    hidden[50:60, 7] = NAN
    recorder = Recorder(kernels_for(ISA), inputs, num_threads)
    logits = recorder.linear(weights, recorder.choose(hidden, keys), "int8")
    recorder.largest(logits, keys, follows=len(weights) == 1)
    tape, pool = recorder.finish(logits), Pool(num_threads)
    arena = torch.from_numpy(tape.kept[0])
    generator = np.random.default_rng(1)
    try:
        for count in (1, 2, 15, 16, 40, 64) * 5:
            rows = generator.integers(100, size=count)
            inputs.tokens[0], inputs.token_ids[:count] = count, rows
            arena.fill_(255)
            tape.run(pool)
            found: Tensor = tape.output[:count]
            columns, finite = row_results.decoded(keys[:count].tolist())
            assert finite == (~((rows >= 50) & (rows < 60))).tolist() == found.isfinite().all(1).tolist()
            kept = np.flatnonzero(finite)
            assert [columns[row] for row in kept] == found.numpy().argmax(1)[kept].tolist()
    finally:
        pool.close()


@pytest.mark.parametrize("num_threads", [2, 4])
def test_threads_that_meet_at_a_key_lose_nothing(kernels: dict[str, Any], num_threads: int) -> None:
    """Many short rows, so that threads raise the same keys at the same time.

    With a load and a store instead of the atomic maximum 21 (2 threads) and 59 (4) of 300 runs were wrong.
    """
    rows = 4096
    x = np.random.default_rng(0).normal(size=(rows, 16 * num_threads)).astype(np.float32)
    count, keys = np.array([rows], np.int64), np.zeros(rows, np.int64)
    words = [x.ctypes.data, x.shape[1], x.shape[1], count.ctypes.data, keys.ctypes.data]
    args, record = np.array(words, np.int64), np.zeros((1, RECORD_WORDS), np.int64)
    record[0, :3] = kernels["largest_kernel"].address, args.ctypes.data, 1
    expected = x.argmax(1)
    pool = Pool(num_threads)
    try:
        for _ in range(300):
            keys[:] = np.iinfo(np.int64).min
            pool.run(record.ctypes.data, 1)
            assert (np.array(row_results.decoded(keys.tolist())[0]) == expected).all()
    finally:
        pool.close()
