"""Every kind of weight x every implementation of its linear, against float64: one table, one test.

Without a GPU the Triton kernels are interpreted (``triton_interpreter``), as each architecture launches them;
with one, the same cases run on it, with fresh inputs by NYBBLE_TEST_SEED (``make gpu-check`` draws it).
"""

import itertools
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from nybble.engine.hardware import cpu_features
from nybble.kernels.dispatch import Target, WeightTraits, choose
from nybble.kernels.layout import PackedWeight, QuantSpec, SparseOverlay

triton = pytest.importorskip("triton")
INTERPRETED = bool(triton.knobs.runtime.interpret)
if INTERPRETED:
    import triton_interpreter
from nybble.kernels.triton import launch  # noqa: E402 (after the interpreter)

SEED = int(os.environ.get("NYBBLE_TEST_SEED", "0"))
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
MACHINES = {
    "sm_80": launch.Machine("interpreted", "sm_80", 6),
    "sm_90": launch.Machine("interpreted", "sm_90", 6),
    "gfx942": launch.Machine("interpreted", "gfx942", 6),
}


@dataclass(frozen=True)
class Case:
    """A kind of weight and a number of tokens. ``kind``: "", "outliers", "2:4", "half 2:4"."""

    bits: int
    group: int
    symmetric: bool
    shape: tuple[int, int]
    tokens: int
    dtype: str = "fp16"
    actorder: bool = False
    bias: bool = False
    kind: str = ""

    def __str__(self) -> str:
        words = [f"w{self.bits}g{self.group}", "sym" if self.symmetric else "asym", self.dtype, self.kind]
        words += ["actorder"] * self.actorder + ["bias"] * self.bias
        return "-".join([*filter(None, words), "x".join(map(str, self.shape)), f"M{self.tokens}"])


# Every value of every property, in covering combinations; odd sizes throughout.
CASES = [
    *(Case(bits, 128, True, (130, 384), m) for bits in (2, 3, 4, 8) for m in (1, 17)),
    *(Case(bits, 64, False, (72, 320), 9, "bf16", bias=True) for bits in (2, 3, 4, 8)),
    *(Case(bits, -1, False, (64, 200), 3) for bits in (2, 3, 4, 8)),
    *(Case(bits, 32, False, (40, 288), 70, "bf16") for bits in (2, 3, 4, 8)),
    *(Case(4, group, sym, (65, 257), 5) for group in (32, 64, 128, -1) for sym in (True, False)),
    Case(4, 48, False, (33, 200), 2, bias=True),
    Case(4, 256, True, (128, 512), 33, "bf16"),
    Case(4, 64, False, (96, 320), 8, actorder=True, bias=True),
    Case(3, 128, True, (64, 300), 2, "bf16", actorder=True),
    *(Case(4, 128, True, (200, 384), m, dtype) for m in (1, 16, 64, 65, 130) for dtype in DTYPES),
    *(Case(bits, 128, True, (96, 384), m, kind="outliers") for bits in (3, 4) for m in (1, 20, 100)),
    Case(4, 32, False, (70, 260), 6, "bf16", bias=True, actorder=True, kind="outliers"),
    *(Case(4, 128, True, (80, 384), m, dtype, kind="2:4") for m in (1, 12, 90) for dtype in DTYPES),
    *(Case(4, 128, True, (250, 256), m, dtype, kind="2:4") for m, dtype in ((3, "bf16"), (13, "fp16"))),
    Case(4, 128, True, (250, 256), 30, kind="2:4"),
    Case(4, 64, False, (250, 256), 40, "bf16"),
    Case(4, 32, True, (72, 288), 5, bias=True, kind="2:4"),
    Case(4, 64, True, (80, 320), 9, "bf16", kind="2:4"),
    Case(4, 64, True, (130, 448), 40, kind="2:4"),
    Case(4, -1, True, (65, 200), 17, "bf16", bias=True, kind="2:4"),
    *(Case(16, -1, True, (80, 256), m, dtype, kind="half 2:4") for m in (1, 12, 90) for dtype in DTYPES),
    Case(4, 128, True, (64, 128), 0),
]  # fmt: skip


# Up to 32 tokens sm_90 has sm_80's launches.
INTERPRETED_CASES = [(c, m) for c in CASES for m in MACHINES if m != "sm_90" or c.tokens > 32]


def make(case: Case) -> tuple[PackedWeight, torch.Tensor]:
    """The weight and activations [tokens, inputs], on the CPU."""
    rng = torch.Generator().manual_seed(SEED + zlib.crc32(str(case).encode()))
    rows, cols = case.shape
    kept = torch.rand(rows, -(-cols // 4), 4, generator=rng).argsort(-1) < 2
    kept = kept.flatten(1)[:, :cols]
    bias = torch.randn(rows, generator=rng) if case.bias else None
    x = torch.randn(case.tokens, cols, generator=rng).to(DTYPES[case.dtype])
    if case.kind == "half 2:4":
        return PackedWeight((torch.randn(rows, cols, generator=rng) * kept).to(x.dtype), bias=bias), x
    spec = QuantSpec(case.bits, case.group, case.symmetric, "group" if case.actorder else "none")
    groups = spec.num_groups(cols)
    codes = torch.randint(0, 2**case.bits, (rows, cols), generator=rng, dtype=torch.uint8)
    if case.kind == "2:4":
        codes = torch.where(kept, codes, 2 ** (case.bits - 1)).to(torch.uint8)
    g_idx = None
    if case.actorder:
        g_idx = (torch.arange(cols) // case.group)[torch.randperm(cols, generator=rng)].int()
    zeros = torch.randint(0, 2**case.bits, (rows, groups), generator=rng, dtype=torch.uint8)
    scales = (torch.rand(rows, groups, generator=rng) * 0.02 + 0.01).half()
    weight = PackedWeight(codes, spec, scales, None if case.symmetric else zeros, g_idx, bias)
    if case.kind == "outliers":
        chosen = torch.rand(rows, cols, generator=rng) < 0.02
        chosen[3] = True  # a heavy row
        residuals = torch.randn(rows, cols, generator=rng) * chosen
        weight = replace(weight, outliers=SparseOverlay.of(residuals))
    return weight, x


def kernel_for(case: Case, architecture: str) -> str:
    """What the dispatch table must take, so that a case cannot fall back to torch unseen."""
    if "2:4" not in case.kind:
        return "triton-low-bit"
    if architecture.startswith("sm_"):
        return "triton-24"
    return "torch" if case.kind == "half 2:4" else "triton-low-bit"  # no mma.sp: expanded


def run(case: Case, target: Target) -> str:
    """Within a few times what rounding the exact result to its type costs; the same bits again. Its name."""
    weight, x = make(case)
    choice = choose("linear", target, weight=WeightTraits.of(weight))
    x = x.to(target.device, target.activation_dtype)
    exact = x.cpu().double() @ weight.dequantize(torch.float64).T
    if weight.bias is not None:
        exact = exact + weight.bias.double()
    linear = choice.implementation.repack(weight, target)
    out = linear(x)
    assert out.dtype == x.dtype
    assert out.shape == exact.shape
    if not case.tokens:
        return choice.name
    norm = exact.norm()
    rounding = float((exact.to(x.dtype).double() - exact).norm() / norm)
    error = float((out.cpu().double() - exact).norm() / norm)
    assert error < 4 * max(rounding, 2e-4 if target.dtype == torch.float16 else 1e-7), (choice.name, error)
    assert torch.equal(linear(x), out), f"{choice.name}: not the same bits again"
    return choice.name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case: Case) -> None:
    run(case, Target("cpu", torch.float32))


@pytest.mark.skipif(not {"avx2", "fma", "f16c"} <= cpu_features(), reason="the CPU kernels need AVX2")
@pytest.mark.parametrize("case", [c for c in CASES if c.tokens in (0, 1, 5, 9, 17)], ids=str)
def test_cpu(case: Case) -> None:
    run(case, Target("cpu", torch.float16, cpu_features(), "auto", "fp32"))


@pytest.mark.skipif(not INTERPRETED, reason="a GPU is here: test_gpu runs the same cases on it")
@pytest.mark.parametrize(("case", "machine"), INTERPRETED_CASES, ids=str)
def test_interpreted(case: Case, machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.Machine, "of", staticmethod(lambda device: MACHINES[machine]))
    target = triton_interpreter.InterpretedTarget("cpu", DTYPES[case.dtype])
    before = triton_interpreter.accesses()["store"]
    with triton_interpreter.poisoned_memory():
        name = run(case, target)
    assert name == kernel_for(case, machine)
    stored = triton_interpreter.accesses()["store"] > before
    assert stored == (case.tokens > 0 and name != "torch")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu(case: Case) -> None:
    architecture = launch.Machine.of("cuda").architecture
    assert run(case, Target("cuda", DTYPES[case.dtype])) == kernel_for(case, architecture)


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "tokens"), [*itertools.product((2, 3, 4, 8), (1, 16, 64, 500))])
def test_gpu_large(bits: int, tokens: int) -> None:
    """Sizes of real layers, whose indices pass 2**31 bits and whose programs fill the GPU."""
    run(Case(bits, 128, False, (4096 + 8, 4096 + 128), tokens, "bf16"), Target("cuda", torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "kind"), [(4, "2:4"), (16, "half 2:4")])
def test_gpu_many_tokens_by_cusparselt(bits: int, kind: str) -> None:
    """Where torch has it: above 2048 tokens, see ``sparse_product``."""
    target = Target("cuda", torch.bfloat16)
    wanted = "cusparselt" if torch.backends.cusparselt.is_available() else "sparse_product"
    assert choose("sparse_product", target).name == wanted
    group = 128 if bits == 4 else -1
    run(Case(bits, group, True, (520, 640), 2100, "bf16", bias=True, kind=kind), target)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 100])
def test_gpu_in_a_graph(tokens: int) -> None:
    """A captured call can be replayed: locks are back at zero, nothing is computed on the host."""
    target = Target("cuda", torch.float16)
    weight, x = make(Case(4, 128, True, (512, 8192), tokens))
    chosen = choose("linear", target, weight=WeightTraits.of(weight))
    linear = chosen.implementation.repack(weight, target)
    x = x.cuda()
    linear(x)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear(x)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(out, linear(x))


def test_the_table_covers_every_value() -> None:
    """A case that is dropped by mistake shows here."""
    for read, values in _WANTED:
        assert {read(case) for case in CASES} >= values
    assert {case.group for case in CASES if case.kind == "2:4"} >= {32, 64, 128, -1}


_WANTED: tuple[tuple[Callable[[Case], Any], set[Any]], ...] = (
    (lambda c: c.bits, {2, 3, 4, 8, 16}),
    (lambda c: c.group, {32, 64, 128, -1}),
    (lambda c: c.symmetric, {True, False}),
    (lambda c: c.dtype, set(DTYPES)),
    (lambda c: c.kind, {"", "outliers", "2:4", "half 2:4"}),
    (lambda c: c.actorder, {True, False}),
    (lambda c: c.tokens, {0, 1, 16, 64, 65}),
)
