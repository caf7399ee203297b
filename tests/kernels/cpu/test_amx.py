"""AMX against AVX-512 VNNI: the same bits for every form of weights and any number of tokens."""

import ctypes
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from nybble.engine.hardware import cpu_features
from nybble.kernels.cpu import amx_permission, numba_linear
from nybble.kernels.cpu.abi import compile_kernel, word
from nybble.kernels.cpu.amx_tile import (
    BLOCKS,
    REAL,
    STRIP,
    SYMMETRIC,
    TILES,
    TOKENS,
    WHOLE,
    configure_tiles,
    kind_of,
    release_tiles,
)
from nybble.kernels.cpu.compiled import CompiledLinear, compile_low_bit, kernels_for
from nybble.kernels.cpu.ir import I32, I64, Emitter
from nybble.kernels.cpu.numba_linear import instruction_set
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.cpu.recorder import Recorder
from nybble.kernels.cpu.tape import Inputs
from nybble.kernels.dispatch import Target
from nybble.kernels.layout import PackedWeight, QuantSpec, SparseOverlay
from torch import Tensor

AMX_FEATURES = frozenset(
    ["amx_tile", "amx_int8", "gfni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx2", "fma", "f16c"]
)
MISSING = sorted(AMX_FEATURES - cpu_features())
REASON = f"the CPU lacks {', '.join(MISSING)}" if MISSING else amx_permission.amx_refusal()
on_amx = pytest.mark.skipif(REASON is not None, reason=REASON or "")
COUNTS = (*range(1, 65), 112, 127, 128, 129, 137, 144, 160)  # TILES * TOKENS are computed together
SHAPES = ((64, 256), (41, 333), (1, 7), (17, 100), (16, 32 * STRIP), (48, 32 * STRIP + 32))


@dataclass(frozen=True)
class Cell:
    """One weight. zeros: "none", "whole", "real" (with a fraction) or "large" (a whole one beyond int8)."""

    bits: int
    zeros: str
    group_size: int
    order: bool
    residuals: bool
    shape: tuple[int, int]


# Every pair of bits and zeros; the other traits go through their values beside them.
CELLS = [
    Cell(bits, zeros, (32, 128, -1, 20)[index % 4], index % 3 == 1, index % 2 == 1, SHAPES[index % 6])
    for index, (bits, zeros) in enumerate(
        pair for pair in itertools.product((2, 3, 4, 8), ("none", "whole", "real", "large")) for _ in range(3)
    )
]


def make_weight(cell: Cell) -> PackedWeight:
    generator = torch.Generator().manual_seed(cell.bits * 1000 + cell.shape[1])
    (rows, cols), top = cell.shape, 2**cell.bits
    order = cell.order and cell.group_size != -1
    spec = QuantSpec(cell.bits, cell.group_size, cell.zeros == "none", "group" if order else "none")
    shape = (rows, spec.num_groups(cols))
    zeros: Tensor | None = torch.randint(0, top + 1, shape, generator=generator).half()
    assert zeros is not None
    if cell.zeros == "none":
        zeros = None
    elif cell.zeros == "real":
        zeros += torch.rand(shape, generator=generator).half()
    elif cell.zeros == "large":
        zeros[-1, 0] = 129
    codes = torch.randint(0, top, (rows, cols), generator=generator, dtype=torch.uint8)
    codes[0], codes[-1] = 0, top - 1
    residuals = torch.randn(rows, cols, generator=generator)
    residuals *= torch.rand(rows, cols, generator=generator) < 0.03
    places = torch.randperm(cols, generator=generator)
    return PackedWeight(
        codes,
        spec,
        (torch.rand(shape, generator=generator) * 0.02 + 1e-3).half(),
        zeros,
        (torch.arange(cols) // abs(cell.group_size))[places].int() if order else None,
        torch.randn(rows, generator=generator) if rows % 2 else None,
        SparseOverlay.of(residuals) if cell.residuals else None,
    )


def inputs_of(cols: int) -> Tensor:
    """[max(COUNTS), cols]: rows of very different sizes; zeros; the largest sums of a group there can be."""
    generator = torch.Generator().manual_seed(cols)
    x = torch.randn(max(COUNTS), cols, generator=generator)
    x *= 10.0 ** torch.randint(-3, 4, (len(x), 1), generator=generator)
    x[2], x[3], x[20] = 0, 1, -1
    return x


class Recorded:
    """One linear over a tape; what is not set holds NaN."""

    def __init__(self, linear: CompiledLinear, x: Tensor, num_threads: int = 1) -> None:
        self._x, self._inputs = x, Inputs(len(x) + 9)
        recorder = Recorder(kernels_for(linear.isa), self._inputs, num_threads)
        self._rows = torch.full((len(x) + 9, x.shape[1]), float("nan"))
        self._tape = recorder.finish(recorder.linear([linear.weight], self._rows, linear.activations))
        self._pool = Pool(num_threads)

    @property
    def scratch(self) -> Tensor:
        """The threads' scratch memory, 255 before a run."""
        return torch.from_numpy(self._tape.kept[1])

    def run(self, tokens: int) -> Tensor:
        self._rows.fill_(float("nan"))
        self._rows[:tokens] = self._x[:tokens]
        torch.from_numpy(self._tape.kept[0]).fill_(255)
        self.scratch.fill_(255)
        self._inputs.tokens[0] = tokens
        self._tape.run(self._pool)
        assert self._tape.output[tokens:].isnan().all(), "written behind the last token"
        return self._tape.output[:tokens].clone()


@on_amx
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_equals_vnni_for_any_number_of_tokens(cell: Cell) -> None:
    weight, x = make_weight(cell), inputs_of(cell.shape[1])
    expected = Recorded(compile_low_bit(weight, "vnni", "int8"), x).run(len(x))
    assert expected.isfinite().all()
    found = Recorded(compile_low_bit(weight, "amx", "int8"), x)
    for tokens in COUNTS:
        assert torch.equal(found.run(tokens), expected[:tokens]), f"{tokens} tokens"


@on_amx
def test_amx_takes_over_at_16_tokens() -> None:
    """It alone writes to the scratch memory here: the comparison above is not one of VNNI with itself."""
    recorded = Recorded(
        compile_low_bit(make_weight(Cell(4, "none", 32, False, False, (64, 256))), "amx", "int8"),
        inputs_of(256),
    )
    for tokens in (1, 8, 15, 16, 17, 64):
        recorded.run(tokens)
        assert bool((recorded.scratch != 255).any()) == (tokens >= TOKENS), tokens


@on_amx
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_do_not_change_a_bit(num_threads: int) -> None:
    cell = Cell(3, "whole", 32, True, True, (16 * (2 * BLOCKS + 1), 333))
    weight, x = make_weight(cell), inputs_of(333)
    expected = Recorded(compile_low_bit(weight, "vnni", "int8"), x).run(len(x))
    found = Recorded(compile_low_bit(weight, "amx", "int8"), x, num_threads)
    for tokens in (1, 16, 33, 48, TILES * TOKENS + 17):
        assert torch.equal(found.run(tokens), expected[:tokens]), f"{tokens} tokens"


@intrinsic
def note_state(typingctx: Any, address: Any) -> Any:
    """Store which parts of the thread's registers are in use (XGETBV 1) at an address."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> Any:
        emit = Emitter(builder)
        emit.store(emit.call("llvm.x86.xgetbv", I64, [I32(1)]), arguments[0], 8)
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@on_amx
@pytest.mark.parametrize("released", [False, True])
def test_tile_registers_are_released(released: bool) -> None:
    """They are 8 KiB that the operating system would save whenever another thread takes the core."""

    def state(args, thread, num_threads):  # type: ignore[no-untyped-def]
        note_state(word(args, 0))

    def held(args, thread, num_threads):  # type: ignore[no-untyped-def]
        configure_tiles()
        note_state(word(args, 0))
        release_tiles()

    weight = make_weight(Cell(4, "whole", 32, False, False, (17, 100)))
    Recorded(compile_low_bit(weight, "amx", "int8"), inputs_of(100)).run(33)
    found = np.full(1, -1, np.int64)
    args = np.array([found.ctypes.data], np.int64)
    kernel = compile_kernel(state if released else held)
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(kernel.address)(args.ctypes.data, 0, 1)
    assert bool(found[0] >> 17 & 3) != released, hex(found[0])


def test_kinds_of_zero_points() -> None:
    assert kind_of(4, None) == SYMMETRIC
    for bits, values, kind in (
        (4, [0, 7, 16], WHOLE),
        (4, [0, 128], WHOLE),
        (4, [0, 129], REAL),
        (4, [-1], REAL),
        (2, [0.5], REAL),
        (4, [float("nan")], REAL),
        (8, [0, 1], REAL),
    ):
        assert kind_of(bits, np.array(values, np.float16)) == kind, (bits, values)


def test_what_is_chosen_where_the_system_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def target(kernels: str, features: frozenset[str] = AMX_FEATURES) -> Target:
        return Target(cpu_features=features, cpu_kernels=kernels)

    monkeypatch.setattr(numba_linear, "amx_refusal", lambda: None)
    assert instruction_set(target("auto")) == instruction_set(target("amx")) == "amx"
    assert instruction_set(target("vnni")) == "vnni"
    for feature in AMX_FEATURES:
        assert instruction_set(target("auto", AMX_FEATURES - {feature})) != "amx", feature
    for feature in ("amx_tile", "amx_int8", "gfni"):
        assert instruction_set(target("auto", AMX_FEATURES - {feature})) == "vnni", feature
    lacking = AMX_FEATURES - {"amx_int8"}
    assert instruction_set(target("auto", lacking)) == "vnni"
    assert instruction_set(target("amx", lacking)) is None
    assert numba_linear.why_not(target("amx", lacking)) == "the CPU lacks what --cpu-kernels amx needs"
    assert numba_linear.passed_over(target("auto")) is None

    monkeypatch.setattr(numba_linear, "amx_refusal", lambda: "not today")
    assert instruction_set(target("auto")) == "vnni"
    assert instruction_set(target("amx")) is None
    assert numba_linear.why_not(target("amx")) == "not today"
    assert numba_linear.passed_over(target("auto")) == "AMX is not used: not today"
    assert numba_linear.passed_over(target("vnni")) is None
    assert numba_linear.passed_over(target("auto", lacking)) is None


def test_a_refusal_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def syscall(self, *_: int) -> int:
            ctypes.set_errno(95)
            return -1

    monkeypatch.setattr(amx_permission.platform, "system", lambda: "Linux")
    monkeypatch.setattr(amx_permission.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(amx_permission.ctypes, "CDLL", lambda *_, **__: Refusing())
    refusal = amx_permission.amx_refusal.__wrapped__()
    assert refusal == "the operating system refuses AMX's registers: Operation not supported"
    monkeypatch.setattr(amx_permission.platform, "system", lambda: "Darwin")
    assert amx_permission.amx_refusal.__wrapped__() == "AMX is used on x86-64 Linux only"
