"""Every cell of compiled low-bit linears against float64: kinds of weights, orders, shapes, residuals, ISAs.

A cell is one weight in one mode over a tape with 1 to 64 tokens, and a few more around the cuts of long
prompts. The tape's memory is poisoned with NaN, so are x's rows behind the last token and its columns behind
the last input; the outputs behind the last token must stay NaN.

Bounds, for outputs y and reference r = x W^T in float64, of one row of W:
* int8: x is rounded per token and group of 32 inputs (in the weight's order, each of the weight's groups cut
  by itself) to steps of amax / 127, so |y - r| <= sum over groups of amax / 254 * sum |w|, plus SUMS;
  And they are what float64 makes of the rounded x (``rounded``), |x8|, to fp32's roundings, which a code off
  by one does not pass: 2^-20 of sum |x8 w| + sum |x residual| + |bias|;
* bf16: x is rounded to 8 significant bits: |y - r| <= 2^-8 sum |x w|, plus SUMS;
* fp32: |y - r| <= 1e-5 of the token's largest |r|, or 2^-21 sum |x w| where all of them cancel (one output).
SUMS is what fp32 sums of codes and zero points may lose, 40 roundings of the largest terms:
40 * 2^-24 * max(scale) * 2^(bits + 2) * sum |x|; and 2^-22 sum |x| |residual| for the residuals.

NYBBLE_TEST_EVERY_CELL=1 runs the whole product; without it, a covering part: every pair of two traits' values
comes up in some cell.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import pytest
import torch
from nybble.engine.hardware import cpu_features
from nybble.kernels.cpu.compiled import CompiledLinear, compile_24, compile_low_bit, kernels_for
from nybble.kernels.cpu.numba_linear import instruction_set
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.cpu.recorder import Recorder
from nybble.kernels.cpu.tape import Inputs
from nybble.kernels.dispatch import Target
from nybble.kernels.layout import PackedWeight, QuantSpec, SparseOverlay
from torch import Tensor

FEATURES = cpu_features()
ISAS = [
    isa
    for isa in ("avx2", "vnni", "amx")
    if instruction_set(Target(cpu_features=FEATURES, cpu_kernels=isa)) == isa
]
BF16 = "vnni" in ISAS and "avx512_bf16" in FEATURES
MODES = [(isa, activations) for isa in ISAS for activations in ("int8", "fp32")] + [("vnni", "bf16")] * BF16
pytestmark = pytest.mark.skipif(not ISAS, reason="the CPU has neither AVX2 nor AVX-512 VNNI")
TOKENS = (*range(1, 65), 119, 120, 121, 131)
# (N, K); 205 rows are 13 blocks: several streams of more than one block, and blocks behind them.
SHAPES = ((205, 160), (41, 333), (1, 7), (17, 100))
WHOLE = bool(os.environ.get("NYBBLE_TEST_EVERY_CELL"))


@dataclass(frozen=True)
class Cell:
    """One weight in one mode. kind: "sym", "asym", or "2:4" (symmetric int4)."""

    bits: int
    kind: str
    group_size: int
    order: bool
    residuals: bool
    shape: tuple[int, int]
    mode: tuple[str, str]

    @property
    def exists(self) -> bool:
        """2:4 is for int4 in its own order over int8; act-order means nothing with one group."""
        if self.kind == "2:4":
            return self.bits == 4 and not self.order and self.mode[1] == "int8"
        return not (self.order and self.group_size == -1)

    def __str__(self) -> str:
        words = [f"{self.bits}bit", self.kind, f"g{self.group_size}", "order" * self.order]
        words += ["residuals" * self.residuals, "{}x{}".format(*self.shape), *self.mode]
        return "-".join(word for word in words if word)


def every_cell() -> list[Cell]:
    axes = (
        (2, 3, 4, 8),
        ("sym", "asym", "2:4"),
        (32, 64, 128, -1, 20, 48),
        (False, True),
        (False, True),
        SHAPES,
        tuple(MODES),
    )
    return [cell for traits in itertools.product(*axes) if (cell := Cell(*traits)).exists]  # type: ignore[arg-type]


def pairs(cell: Cell) -> Iterator[tuple[object, ...]]:
    values = (cell.bits, cell.kind, cell.group_size, cell.order, cell.residuals, cell.shape, cell.mode)
    return itertools.combinations(enumerate(values), 2)


def covering(cells: Sequence[Cell]) -> list[Cell]:
    """Greedy: of every pair of two traits' values that some cell has, one that has it."""
    missing = {pair for cell in cells for pair in pairs(cell)}
    chosen: list[Cell] = []
    # A stride that is prime to the number of cells visits them scattered, so that few are needed.
    scattered = [cells[index * 1009 % len(cells)] for index in range(len(cells))]
    for least in range(21, 0, -1):
        for cell in scattered:
            if len(new := missing.intersection(pairs(cell))) >= least:
                chosen.append(cell)
                missing -= new
    assert not missing
    return chosen


CELLS = every_cell() if WHOLE else covering(every_cell())


def make_weight(cell: Cell) -> PackedWeight:
    generator = torch.Generator().manual_seed(hash((cell.bits, cell.group_size, cell.shape)) % 2**31)
    (rows, cols), top = cell.shape, 2**cell.bits
    spec = QuantSpec(cell.bits, cell.group_size, cell.kind != "asym", "group" if cell.order else "none")
    groups = spec.num_groups(cols)
    codes = torch.randint(0, top, (rows, cols), generator=generator, dtype=torch.uint8)
    if cell.kind == "2:4":
        keep = torch.rand(rows, -(-cols // 4), 4, generator=generator).argsort(2) < 2
        codes[~keep.reshape(rows, -1)[:, :cols]] = 8
    scales = (torch.rand(rows, groups, generator=generator) * 0.02 + 1e-3).half()
    zeros = torch.randint(0, top, (rows, groups), generator=generator, dtype=torch.uint8)
    order = (torch.arange(cols) // abs(cell.group_size))[torch.randperm(cols, generator=generator)].int()
    residuals = torch.randn(rows, cols, generator=generator) * 0.3
    residuals *= torch.rand(rows, cols, generator=generator) < 0.03
    residuals[rows // 2, cols // 2] = 1.0  # never without an entry
    return PackedWeight(
        codes,
        spec,
        scales,
        zeros if cell.kind == "asym" else None,
        order if cell.order else None,
        torch.randn(rows, generator=generator) if cell.shape[0] % 2 else None,
        SparseOverlay.of(residuals) if cell.residuals else None,
    )


@lru_cache(maxsize=8)
def inputs_of(cols: int) -> Tensor:
    """[max(TOKENS), cols]; rows of very different sizes, one of zeros, one with one large input."""
    generator = torch.Generator().manual_seed(cols)
    x = torch.randn(max(TOKENS), cols, generator=generator)
    x *= 10.0 ** torch.randint(-3, 4, (len(x), 1), generator=generator)
    x[2] = 0
    x[5, cols // 3] = 1000.0
    return x


def bound(weight: PackedWeight, x: Tensor, activations: str, reference: Tensor) -> Tensor:
    """[T, N], see the top of this file."""
    if activations == "fp32":
        sums = x.double().abs() @ weight.dequantize(torch.float64).abs().T / 2**21
        return torch.maximum(1e-5 * reference.abs().amax(1, keepdim=True), sums) + 1e-30
    assert weight.spec is not None
    assert weight.scales is not None
    residuals = torch.zeros(weight.values.shape, dtype=torch.float64)
    if weight.outliers is not None:
        weight.outliers.add_to(residuals)
    size, plain = x.double().abs(), (weight.dequantize(torch.float64) - residuals).abs()
    sums = size.sum(1, keepdim=True) * weight.scales.double().amax(1) * 2 ** (weight.spec.num_bits + 2)
    error = 40 / 2**24 * (sums + reference.abs()) + size @ residuals.abs().T / 2**22
    if activations == "bf16":
        return error + size @ plain.T / 2**8
    group = weight.group_of_inputs()
    for index in range(int(group.max()) + 1):
        for places in (group == index).nonzero()[:, 0].split(32):
            if len(places):
                error += size[:, places].amax(1, keepdim=True) / 254 * plain[:, places].sum(1)
    return error


def rounded(weight: PackedWeight, x: Tensor) -> Tensor:
    """x as int8 kernels see it, float64: rint(x * 127 / amax) * amax / 127 per token and 32 inputs."""
    group, seen = weight.group_of_inputs(), torch.zeros(x.shape, dtype=torch.float64)
    for index in range(int(group.max()) + 1):
        for places in (group == index).nonzero()[:, 0].split(32):
            if len(places):
                top = x[:, places].abs().amax(1, keepdim=True).clamp(min=1e-20)
                # Torch makes 127 / top a product with the reciprocal, which may turn a tie.
                codes = (x[:, places] * torch.full_like(top, 127).div(top)).round()  # to even, as rint
                seen[:, places] = codes.double() * (top * (1 / 127)).double()
    return seen


def over_rounded(weight: PackedWeight, x: Tensor) -> tuple[Tensor, Tensor]:
    """[T, N] each: float64 over ``rounded`` x (residuals meet x itself), and what fp32 may differ."""
    residuals = torch.zeros(weight.values.shape, dtype=torch.float64)
    if weight.outliers is not None:
        weight.outliers.add_to(residuals)
    plain, seen, whole = weight.dequantize(torch.float64) - residuals, rounded(weight, x), x.double()
    bias = torch.zeros(len(plain)).double() if weight.bias is None else weight.bias.double()
    sizes = seen.abs() @ plain.abs().T + whole.abs() @ residuals.abs().T + bias.abs()
    return seen @ plain.T + whole @ residuals.T + bias, sizes / 2**20 + 1e-30


class Poisoned:
    """One linear over a tape whose every byte that is not set holds NaN."""

    def __init__(self, linear: CompiledLinear, x: Tensor) -> None:
        count, cols = x.shape
        self._x = x
        self._rows = torch.full((count + 9, cols + 5), float("nan"))
        self._inputs = Inputs(count + 9)
        recorder = Recorder(kernels_for(linear.isa), self._inputs, 1)
        out = recorder.linear([linear.weight], self._rows[:, :cols], linear.activations)
        self._tape = recorder.finish(out)
        self._pool = Pool(1)

    def run(self, tokens: int) -> Tensor:
        """The outputs of the first ``tokens`` rows of x."""
        self._rows.fill_(float("nan"))
        self._rows[:tokens, : self._x.shape[1]] = self._x[:tokens]
        torch.from_numpy(self._tape.kept[0]).fill_(255)  # NaN in every type
        self._inputs.tokens[0] = tokens
        self._tape.run(self._pool)
        assert self._tape.output[tokens:].isnan().all(), "written behind the last token"
        return self._tape.output[:tokens]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_equals_float64_within_the_bound_of_its_activations(cell: Cell) -> None:
    weight = make_weight(cell)
    assert weight.is_24() or cell.kind != "2:4"
    isa, activations = cell.mode
    linear = compile_24(weight, isa) if cell.kind == "2:4" else compile_low_bit(weight, isa, activations)
    x = inputs_of(cell.shape[1])
    poisoned = Poisoned(linear, x)
    whole = poisoned.run(len(x)).clone()
    reference = x.double() @ weight.dequantize(torch.float64).T
    reference += 0 if weight.bias is None else weight.bias.double()
    error = (whole - reference).abs()
    allowed = bound(weight, x, activations, reference)
    assert (error <= allowed).all(), f"{float((error / allowed).max()):.3g} of the bound"
    if activations == "int8":
        exact, allowed = over_rounded(weight, x)
        error = (whole - exact).abs()
        assert (error <= allowed).all(), f"{float((error / allowed).max()):.3g} of fp32's roundings"
    for tokens in TOKENS:
        assert torch.equal(poisoned.run(tokens), whole[:tokens]), f"{tokens} tokens: other bits"


def test_the_cells() -> None:
    """Each trait's every value is among those that run."""
    assert {cell.mode for cell in CELLS} == set(MODES)
    assert {cell.group_size for cell in CELLS} == {32, 64, 128, -1, 20, 48}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_code_off_by_one_is_seen(bits: int, isa: str) -> None:
    """In one input of each row: beyond fp32's roundings in all rows, while the rounding of x hides it."""
    weight, x = make_weight(Cell(bits, "asym", 32, True, True, (41, 333), (isa, "int8"))), inputs_of(333)
    exact, allowed = over_rounded(weight, x)
    wide = bound(weight, x, "int8", x.double() @ weight.dequantize(torch.float64).T)
    codes = weight.values.clone()
    codes[:, 7] ^= 1
    wrong = Poisoned(compile_low_bit(replace(weight, values=codes), isa, "int8"), x).run(len(x))
    error = (wrong - exact).abs()
    assert (error > allowed).any(0).all()
    assert (error <= wide).float().mean() > 0.9
