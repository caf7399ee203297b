"""Packed weights as linears on a GPU: they pick a launch by the number of tokens, and make it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import torch
import triton
from torch import Tensor

from ..reference import sparse_product
from .arrange import arrange
from .dequantize import add_overlay, dequantize, expand24
from .fragments import ROWS, STEP
from .launch import Launch, Machine, choose, limits
from .mma_linear import mma_linear
from .packing import FragmentWeight
from .packing24 import Sparse24Weight
from .sparse24_linear import sparse24_linear
from .tile_linear import tile_linear

_ARRANGED = 1024  # inputs that one program moves


class _Weight(Protocol):
    """What both kinds of packed weights have."""

    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def inputs(self) -> int: ...
    @property
    def words(self) -> Tensor: ...
    @property
    def order(self) -> Tensor | None: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def nbytes(self) -> int: ...


_Run = Callable[..., None]


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    kernel[grid](*arguments, **constants)


def _compile(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    kernel.warmup(*arguments, grid=grid, **constants)


def warm(linears: Iterable[object], dtype: torch.dtype, max_tokens: int, threads: int) -> int:
    """Compile in parallel what the GPU linears among ``linears`` may launch; returns how many kernels.

    A kernel is compiled once, however many linears launch it. Triton keeps it on disk for the next start.
    """
    jobs = [partial(p.compile, dtype, max_tokens) for p in linears if isinstance(p, _PackedLinear)]
    return compile_all(jobs, threads)


def compile_all(jobs: Iterable[Callable[[], None]], threads: int, *, ignore_errors: bool = False) -> int:
    """Run ``jobs``, that compile, in parallel; returns how many kernels. Interpreted kernels need none."""
    if triton.knobs.runtime.interpret:
        return 0
    mode = triton.AsyncCompileMode(executor := ThreadPoolExecutor(threads), ignore_errors=ignore_errors)
    with executor, mode:
        for job in jobs:
            job()
    return len(mode.future_kernels)


def _unused(weight: _Weight, dtype: torch.dtype) -> Tensor:
    """A pointer that is not followed, of the type that it has where it is: one more type, one more kernel."""
    return weight.words.view(dtype)


_Product = Callable[[Tensor, Tensor, int, Tensor | None], Tensor]


class _PackedLinear(ABC):
    """Takes x [T, in_features] fp16 or bf16, gives [T, out_features] of its type.

    One launch; one more where inputs are reordered or padded. Results do not depend on the order in which
    programs run. Not for two streams at once: launches of one linear share locks.
    """

    def __init__(self, weight: _Weight, machine: Machine, product: _Product = sparse_product) -> None:
        self._product24 = product
        self._machine = machine
        self._base = weight
        rows = int(weight.words.shape[0]) * ROWS.value
        self._shape = (rows, weight.inputs)
        locks = max(rows // ROWS.value, machine.multiprocessors)  # tiles that are split, at most
        self._locks = torch.zeros(locks, dtype=torch.int32, device=weight.words.device)

    @property
    def nbytes(self) -> int:
        """Bytes that the packed weight holds."""
        return self._base.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in_features] -> [T, out_features]."""
        if len(x) == 0:
            return x.new_empty(0, self._base.out_features)
        return self.launched(x, self._choose(len(x)))

    def launched(self, x: Tensor, launch: Launch) -> Tensor:
        """The same by ``launch``."""
        w = self._base
        x = self._arranged(x, _launch)
        if launch.kernel in ("dense", "cusparselt"):
            return self._expanded(x, launch)
        out = x.new_empty(len(x), w.out_features)
        self._multiply(launch, x, out, len(x), _launch)
        return out

    def _expanded(self, x: Tensor, launch: Launch) -> Tensor:
        """By a product with the whole matrix, x arranged."""
        w = self._base
        product = self._product24 if launch.kernel == "cusparselt" else sparse_product
        return product(x, self.dense(x.dtype), w.out_features, w.bias)

    def compile(self, dtype: torch.dtype, max_tokens: int) -> None:
        """Compile what calls with up to ``max_tokens`` tokens of ``dtype`` launch. See ``warm``."""
        for tokens in limits(self._machine, max_tokens):
            self.compile_launch(dtype, tokens, self._choose(tokens))

    def compile_launch(self, dtype: torch.dtype, tokens: int, launch: Launch) -> None:
        """Compile what ``launch`` needs for ``tokens`` tokens."""
        x = torch.empty(1, self._base.in_features, dtype=dtype, device=self._base.words.device)
        x = self._arranged(x, _compile)
        if launch.kernel in ("dense", "cusparselt"):
            self.dense(dtype, _compile)
        else:
            out = x.new_empty(1, self._base.out_features)
            self._multiply(launch, x, out, tokens, _compile)

    def _multiply(self, launch: Launch, x: Tensor, out: Tensor, tokens: int, run: _Run) -> None:
        """out = x @ weight.T + bias, x arranged."""
        w = self._base
        tiles_m, tiles_n = -(-tokens // launch.BM), self._shape[0] // launch.BN
        tiles = tiles_m * tiles_n
        splits = 1
        if tiles <= len(self._locks):
            splits = launch.splits(self._machine, tiles, w.inputs // STEP.value)
        sums = _unused(w, torch.float32)
        if splits > 1:
            sums = x.new_empty(tiles * splits * launch.BM * launch.BN, dtype=torch.float32)
        bias, num_bias = (_unused(w, torch.float32), 0) if w.bias is None else (w.bias, w.out_features)
        tail = (out, sums, self._locks, tokens, w.out_features, w.inputs, splits, num_bias)
        self._product(launch, (tiles_n, splits, tiles_m), (x, bias, tail), run)

    def _arranged(self, x: Tensor, run: _Run) -> Tensor:
        """The activations as the weight's inputs stand, in rows of 16-byte units."""
        w = self._base
        x = x.contiguous()
        if w.order is None:
            return x if x.data_ptr() % 16 == 0 else x.clone()
        out = x.new_empty(len(x), w.inputs)
        grid = (-(-w.inputs // _ARRANGED), len(x))
        run(arrange, grid, x, w.order, out, w.in_features, w.inputs, BLOCK=_ARRANGED)
        return out

    @abstractmethod
    def _choose(self, tokens: int) -> Launch:
        """The launch for so many tokens."""

    @abstractmethod
    def _product(
        self, launch: Launch, grid: tuple[int, int, int], arguments: tuple[Any, Any, Any], run: _Run
    ) -> None:
        """grid: tiles of outputs, splits, tiles of tokens; arguments: x, bias, and the last eight."""

    @abstractmethod
    def dense(self, dtype: torch.dtype, run: _Run = _launch) -> Tensor:
        """The weight as a matrix [N, K] of ``dtype``, padded, its inputs arranged."""


class LowBitLinear(_PackedLinear):
    """A quantized weight."""

    def __init__(self, weight: FragmentWeight, machine: Machine) -> None:
        super().__init__(weight, machine)
        self.weight = weight

    def _choose(self, tokens: int) -> Launch:
        sparsity = None if self.weight.overlay is None else "overlay"
        return choose(self._machine, self.weight.bits, self._shape, tokens, sparsity)

    def _product(
        self, launch: Launch, grid: tuple[int, int, int], arguments: tuple[Any, Any, Any], run: _Run
    ) -> None:
        w, (x, bias, tail) = self.weight, arguments
        zeros = _unused(w, torch.uint8) if w.zeros is None else w.zeros
        if w.overlay is None:
            types = (torch.int32, x.dtype, torch.uint8, torch.int16)
            overlay = tuple(_unused(w, dtype) for dtype in types)
        else:
            overlay = w.overlay.tensors
        constants: dict[str, Any] = {
            "BITS": w.bits, "GROUP": w.group, "ZEROS": w.zeros is not None, "SPARSE": w.overlay is not None,
            "SCALE_WEIGHTS": launch.scales_weights(w.group), "BM": launch.BM, "BN": launch.BN,
            "STAGES": launch.stages, "num_warps": launch.warps, "num_stages": launch.stages,
        }  # fmt: skip
        every = (x, w.words, w.scales, zeros, bias, *overlay, *tail)
        if launch.kernel == "mma":
            run(mma_linear, grid, *every, **constants, WARPS=launch.warps)
        else:
            tiles_n, splits, tiles_m = grid
            run(tile_linear, (tiles_n * tiles_m, splits), *every, **constants, ASM=self._machine.is_cuda)

    def dense(self, dtype: torch.dtype, run: _Run = _launch) -> Tensor:
        """The weight as a matrix [N, K] of ``dtype``, padded, its inputs arranged."""
        w = self.weight
        out = torch.empty(self._shape, dtype=dtype, device=w.words.device)
        zeros = _unused(w, torch.uint8) if w.zeros is None else w.zeros
        grid = (self._shape[0] // ROWS.value, w.inputs // STEP.value)
        run(
            dequantize, grid, w.words, w.scales, zeros, out, w.out_features, w.inputs,
            BITS=w.bits, GROUP=w.group, ZEROS=w.zeros is not None, ASM=self._machine.is_cuda,
        )  # fmt: skip
        if w.overlay is not None:
            run(add_overlay, grid[:1], *w.overlay.tensors, out, w.inputs)
        return out


class Sparse24Linear(_PackedLinear):
    """A weight with 2:4 sparsity, compressed. product: the dispatch table's "sparse_product"."""

    def __init__(self, weight: Sparse24Weight, machine: Machine, product: _Product = sparse_product) -> None:
        super().__init__(weight, machine, product)
        self.weight = weight

    def _choose(self, tokens: int) -> Launch:
        return choose(self._machine, self.weight.bits, self._shape, tokens, "2:4")

    def _product(
        self, launch: Launch, grid: tuple[int, int, int], arguments: tuple[Any, Any, Any], run: _Run
    ) -> None:
        w, (x, bias, tail) = self.weight, arguments
        scales = _unused(w, torch.float16) if w.scales is None else w.scales
        run(
            sparse24_linear, grid, x, w.words, w.meta, scales, bias, *tail,
            BITS=w.bits, GROUP=w.group, BM=launch.BM, BN=launch.BN, STAGES=launch.stages,
            WARPS=launch.warps, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip

    def dense(self, dtype: torch.dtype, run: _Run = _launch) -> Tensor:
        """The weight as a matrix [N, K] of ``dtype``, padded, its inputs arranged."""
        w = self.weight
        out = torch.empty(self._shape, dtype=dtype, device=w.words.device)
        scales = _unused(w, torch.float16) if w.scales is None else w.scales
        grid = (self._shape[0] // ROWS.value, w.inputs // STEP.value)
        run(
            expand24, grid, w.words, w.meta, scales, out, w.out_features, w.inputs,
            BITS=w.bits, GROUP=w.group,
        )  # fmt: skip
        return out
