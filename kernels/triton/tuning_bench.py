"""Launches measured on the GPU at hand, over weights that no cache holds. Imports triton: see ``tuning``."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from ..dispatch import Target
from ..layout import PackedWeight, QuantSpec, SparseOverlay
from .graph_clock import graph_seconds
from .launch import Launch
from .linear import low_bit, sparse_24
from .low_bit import compile_all
from .tuning import KINDS, Contest, DoesNotRun, Problem, Shape

GROUP = 128
OUTLIERS = 0.005  # of the weights
TOLERANCE = 2e-2  # relative, to the default's result: bf16 rounds products and sums to 4e-3
_SEED = 1234


class Bench:
    """Measures. rotated: bytes of weights that a round goes through at least, some times the L2 cache."""

    def __init__(
        self, target: Target, rotated: int, clock: Callable[[Sequence[Callable[[], object]]], float]
    ) -> None:
        self._target = target
        self._rotated = rotated
        self._clock = clock
        self._kind = ""
        self._linears: dict[Shape, list[Any]] = {}  # of one kind
        self._expected: dict[Problem, Tensor] = {}

    @staticmethod
    def of_this_gpu(dtype: torch.dtype) -> "Bench":
        """The first device's."""
        rotated = 4 * torch.cuda.get_device_properties(0).L2_cache_size
        return Bench(Target("cuda", dtype), rotated, graph_seconds)

    def compile(self, contest: Contest, threads: int) -> None:
        """All candidates in parallel; those that fail will say so when they are measured."""
        problem = contest.problems[0]
        linear = self._of(problem)[0]
        jobs = [
            partial(linear.compile_launch, self._target.dtype, problem.tokens, launch)
            for launch in contest.candidates
        ]
        compile_all(jobs, threads, ignore_errors=True)

    def __call__(self, problem: Problem, launch: Launch) -> float:
        """Seconds of one call. The first launch of a problem (the default) says what the result is."""
        linears, x = self._of(problem), self._activations(problem)
        try:
            out = linears[0].launched(x, launch).float()
            expected = self._expected.setdefault(problem, out)
            error = float((out - expected).norm() / expected.norm())
            if not error < TOLERANCE:
                raise DoesNotRun(f"another result: relative error {error:.1e}")
            return self._clock([partial(linear.launched, x, launch) for linear in linears])
        except torch.AcceleratorError:
            raise  # the device is lost to this process
        except (RuntimeError, triton.TritonError) as error:
            raise DoesNotRun(f"{type(error).__name__}: {str(error).strip()[:200]}") from error

    def _of(self, problem: Problem) -> list[Any]:
        """Copies of a linear, kept for the next launch."""
        if self._kind != problem.kind:
            self._kind, self._linears, self._expected = problem.kind, {}, {}
        if problem.shape not in self._linears:
            kernel = sparse_24 if KINDS[problem.kind][1] == "2:4" else low_bit
            weight = make_weight(problem.kind, problem.shape, self._target)
            first = kernel.repack(weight, self._target)
            count = max(2, -(-self._rotated // first.nbytes))
            self._linears[problem.shape] = [first, *(copy.deepcopy(first) for _ in range(count - 1))]
        return self._linears[problem.shape]

    def _activations(self, problem: Problem) -> Tensor:
        rng = torch.Generator(self._target.device).manual_seed(_SEED)
        size = (problem.tokens, problem.shape[1])
        return torch.randn(size, generator=rng, device=self._target.device).to(self._target.dtype)


def make_weight(kind: str, shape: Shape, target: Target) -> PackedWeight:
    """Random, symmetric in groups of 128. Outliers: 0.5 %, uneven rows."""
    (bits, sparsity), device = KINDS[kind], target.device
    rng = torch.Generator(device).manual_seed(_SEED)
    kept = torch.rand(shape[0], shape[1] // 4, 4, generator=rng, device=device).argsort(-1).flatten(1) < 2
    if bits == 16:
        values = torch.randn(shape, generator=rng, device=device, dtype=target.dtype)
        return PackedWeight(values * kept)
    codes = torch.randint(0, 2**bits, shape, generator=rng, device=device, dtype=torch.uint8)
    if sparsity == "2:4":
        codes = torch.where(kept, codes, 2 ** (bits - 1)).to(torch.uint8)
    groups = -(-shape[1] // GROUP)
    scales = (torch.rand(shape[0], groups, generator=rng, device=device) * 0.02 + 0.01).half()
    weight = PackedWeight(codes, QuantSpec(bits, GROUP, True), scales)
    if sparsity == "overlay":
        chosen = torch.rand(shape, generator=rng, device=device) < OUTLIERS
        residuals = torch.randn(shape, generator=rng, device=device, dtype=torch.float16) * chosen
        weight = replace(weight, outliers=SparseOverlay.of(residuals))
    return weight
