"""Record a decoder's forward as kernel calls: its ops over ``meta`` tensors, which have no memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import (
    amx_tile,
    bf16_linear,
    exact_linear,
    int8_batch,
    int8_linear,
    int8_overlay,
    overlay,
    overlay_tiles,
    paged_attention,
    row_results,
    rows,
    sparse24,
)
from .abi import compile_kernel
from .activations import OCTETS, PAIRS, QUADS, quantize_kernel
from .isa import AMX, AVX2, TILES, vectors_of
from .l16 import GROUP, ROWS, padded
from .overlay_slices import OverlayWeight
from .tape import BY_COLUMNS, BY_HEADS, BY_ROWS, Call, Inputs, Scratch, ScratchBytes, Tape, build_tape
from .vectors import FLOAT32
from .weights import KINDS, DenseWeight, LowBitWeight


class Kernels:
    """Compiled kernels for one instruction set, by what they are compiled for."""

    def __init__(self, isa: int) -> None:
        self.isa, self.vectors = isa, vectors_of(isa)
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def get(self, make: Callable[..., Any], *traits: Any) -> Any:
        """The kernel that ``make(*traits)`` describes, compiled once."""
        key = (make.__module__, make.__name__, traits)
        if key not in self._compiled:
            self._compiled[key] = compile_kernel(make(*traits), key)
        return self._compiled[key]


@dataclass(frozen=True, slots=True)
class PagedCache:
    """One layer: keys [blocks, Hkv, block_size / 16, D, 16], values [blocks, Hkv, block_size, D]."""

    keys: Tensor
    values: Tensor
    block_size: int
    group: int = 0  # the KV group whose slots and spans it goes by
    window: int | None = None


class Recorder:
    """Collects calls. Its ops have the signatures of ``kernels/reference.py``, over meta tensors."""

    def __init__(
        self, kernels: Kernels, inputs: Inputs, num_threads: int, tied_head: DenseWeight | None = None
    ) -> None:
        """tied_head: embeddings are read from its layout, so that the table need not be kept as well."""
        self._tied_head = tied_head
        self.kernels = kernels
        self.inputs = inputs
        self._num_threads = num_threads
        self._calls: list[Call] = []
        self._scratch_bytes = 0
        self._quantized: dict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor]] = {}
        self._tiles: dict[tuple[int, int, int], Tensor] = {}
        self._kept: list[Tensor] = []

    def buffer(self, width: int, more_rows: int = 0) -> Tensor:
        """[max_tokens + more_rows, width] fp32, rows padded to whole blocks of 16."""
        whole = torch.empty(self.inputs.max_tokens + more_rows, padded(width, ROWS), device="meta")
        self._kept.append(whole)  # the identity of a dead storage could be given to another one
        return whole[:, :width]

    def finish(self, output: Tensor) -> Tape:
        """The tape that computes ``output``."""
        return build_tape(self._calls, output, self._scratch_bytes, self._num_threads)

    def embedding(self, token_ids: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
        """See reference; the token ids are the inputs'."""
        width = table.shape[1]
        out = self.buffer(width)
        if self._tied_head is not None:
            head = self._tied_head
            source = (self.inputs.token_ids, self.inputs.tokens, head.values, head.values.shape[1])
            kernel = self.kernels.get(rows.tied_embedding_kernel, head.kind)
            self._call(kernel, (*source, width, out, _ld(out)), BY_ROWS)
            return out
        args = (self.inputs.token_ids, self.inputs.tokens, table.contiguous(), width, out, _ld(out))
        self._call(self.kernels.get(rows.embedding_kernel, KINDS[table.dtype]), args, BY_ROWS)
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See reference."""
        width = x.shape[-1]
        heads = 1 if x.dim() == 2 else x.shape[1]
        assert x.dim() == 2 or x.stride(1) == width
        out = self.buffer(heads * width)
        weight_stride = width if weight.dim() == 2 else 0
        head = (x, _ld(x), weight.float().contiguous(), width, out, _ld(out))
        args = (*head, self.inputs.tokens, np.array([eps], np.float32), heads, weight_stride)
        self._call(self.kernels.get(rows.norm_kernel), args, BY_ROWS)
        return out if x.dim() == 2 else out.view(-1, heads, width)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See reference."""
        width = x.shape[-1]
        out, total = self.buffer(width), self.buffer(width)
        head = (x, _ld(x), residual, _ld(residual), weight.float().contiguous(), width)
        tail = (out, _ld(out), total, _ld(total), self.inputs.tokens, np.array([eps], np.float32))
        self._call(self.kernels.get(rows.add_norm_kernel), (*head, *tail), BY_ROWS)
        return out, total

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See reference; ``cos`` and ``sin`` are tables here: fp32 [positions, D / 2], nothing negated."""
        _, heads, dim = x.shape
        assert x.stride(1) == dim
        out = self.buffer(heads * dim)
        head = (x, _ld(x), heads, dim, cos, sin, self.inputs.positions)
        self._call(self.kernels.get(rows.rope_kernel), (*head, out, _ld(out), self.inputs.tokens), BY_ROWS)
        return out.view(-1, heads, dim)

    def silu_and_mul(self, x: Tensor) -> Tensor:
        """See reference."""
        width = x.shape[1] // 2
        out = self.buffer(width)
        args = (x, _ld(x), width, out, _ld(out), self.inputs.tokens)
        self._call(self.kernels.get(rows.silu_kernel), args, BY_ROWS)
        return out

    def finite(self, x: Tensor, out: NDArray[np.bool_]) -> None:
        """Note of each row of x whether it is finite. out: [max_tokens]."""
        args = (x, _ld(x), x.shape[1], self.inputs.tokens, out)
        self._call(self.kernels.get(row_results.finite_kernel), args, BY_ROWS)

    def choose(self, x: Tensor, keys: NDArray[np.int64]) -> Tensor:
        """Rows of x, a tensor with memory, by their indices in ``inputs.token_ids``; begins their keys."""
        width = x.shape[1]
        out = self.buffer(width)
        args = (self.inputs.token_ids, self.inputs.tokens, x, _ld(x), width, out, _ld(out), keys)
        self._call(self.kernels.get(row_results.choose_kernel), args, BY_ROWS)
        return out

    def largest(self, logits: Tensor, keys: NDArray[np.int64], follows: bool) -> None:
        """Complete the keys of rows, see ``row_results``. follows: the call before computed the logits."""
        args = (logits, _ld(logits), logits.shape[1], self.inputs.tokens, keys)
        kernel = self.kernels.get(row_results.largest_kernel)
        self._calls.append(Call(kernel, args, BY_COLUMNS, follows))

    def attend(self, cache: PagedCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k, v [T, Hkv, D] to their slots and attend with q [T, Hq, D]; returns [T, Hq * D]."""
        _, heads, dim = q.shape
        kv_heads, kind, tokens = k.shape[1], KINDS[cache.keys.dtype], self.inputs.tokens
        group_inputs = self.inputs.groups[cache.group]
        kernel = self.kernels.get(rows.kv_write_kernel, kind, dim, cache.block_size)
        pages = (cache.keys, cache.values)
        self._call(kernel, (k, _ld(k), v, _ld(v), *pages, group_inputs.slots, tokens, kv_heads), BY_ROWS)
        out = self.buffer(heads * dim)
        group = heads // kv_heads
        traits = (self.kernels.vectors, kind, group, dim, cache.block_size)
        kernel = self.kernels.get(paged_attention.attention_kernel, *traits)
        scratch = self._scratch(4 * paged_attention.scratch_floats(group, dim))
        spans = (group_inputs.spans, group_inputs.num_spans, kv_heads, cache.window or 0)
        self._call(kernel, (q, _ld(q), out, _ld(out), *pages, *spans, *scratch), BY_HEADS)
        return out

    def linear(self, weights: Sequence[LowBitWeight | DenseWeight], x: Tensor, activations: str) -> Tensor:
        """x [T, K] times weights side by side: [T, sum of their outputs].

        ``activations``: what low-bit weights meet, "int8" (fast), "bf16" or "fp32" (exact).
        """
        starts = [sum(w.out_features for w in weights[:i]) for i in range(len(weights))]
        # A part writes whole blocks: its padding lies where the next part, computed after it, begins.
        needed = max(start + ROWS * w.blocks for start, w in zip(starts, weights, strict=True))
        out = self.buffer(needed)[:, : sum(w.out_features for w in weights)]
        for start, weight in zip(starts, weights, strict=True):
            self._part(weight, x, out[:, start : start + weight.out_features], activations)
        return out

    def _part(self, weight: LowBitWeight | DenseWeight, x: Tensor, out: Tensor, activations: str) -> None:
        isa, tokens = self.kernels.vectors, self.inputs.tokens
        if weight.bias is not None:
            args: tuple[Any, ...] = (weight.bias, weight.blocks * ROWS, out, _ld(out), tokens)
            self._call(self.kernels.get(rows.bias_kernel), args, BY_ROWS)
        accumulate = int(weight.bias is not None)
        shape = (weight.groups, weight.blocks, accumulate)
        if isinstance(weight, DenseWeight):
            kernel = self.kernels.get(exact_linear.exact_kernel, isa, exact_linear.DENSE, weight.kind, False)
            ordered = self._ordered(x, weight.groups, None)
            args = (weight.values, 0, 0, ordered, _ld(ordered), tokens, out, _ld(out), *shape)
        else:
            kernel, args = self._low_bit(weight, x, out, activations)
        if isinstance(weight, LowBitWeight) and weight.overlay is not None:
            one = self._one_token(weight, weight.overlay, activations)
            args = (*self._residuals(weight.overlay, x, out, weight.blocks), one, kernel, *args)
            kernel = self.kernels.get(overlay.overlay_kernel, weight.overlay.wide)
        self._call(kernel, args, BY_COLUMNS)

    def _low_bit(
        self, weight: LowBitWeight, x: Tensor, out: Tensor, activations: str
    ) -> tuple[Any, tuple[Any, ...]]:
        """The kernel of a low-bit weight and its arguments."""
        get, isa, tokens = self.kernels.get, self.kernels.vectors, self.inputs.tokens
        bits, asym = weight.num_bits, weight.zeros is not None
        weights = (weight.codes, weight.scales, weight.zeros if asym else 0)
        shape = (weight.groups, weight.blocks, int(weight.bias is not None))
        y = (out, tokens, _ld(out), *shape)
        if weight.sparse:
            assert activations == "int8"
            return get(sparse24.kernel_24, isa), (*weights[:2], *self._rounded(weight, x, OCTETS)[:2], *y)
        if activations == "int8":
            rounded = (*weights, *self._rounded(weight, x, QUADS), *y)
            if isa == AVX2:
                scratch = self._scratch(int8_batch.SCRATCH_BYTES)
                return get(int8_linear.avx2_kernel, bits, asym), (*rounded, *scratch)
            if self.kernels.isa != AMX:
                return get(int8_linear.vnni_kernel, bits, asym), rounded
            kernel = get(int8_linear.amx_kernel, bits, amx_tile.kind_of(bits, weight.zeros))
            return kernel, (*rounded, *self._scratch(amx_tile.SCRATCH_BYTES))
        if activations == "bf16":
            pairs, _, sums = self._rounded(weight, x, PAIRS)
            return get(bf16_linear.bf16_kernel, bits, asym), (*weights, pairs, sums, *y)
        assert activations == "fp32"
        ordered = self._ordered(x, weight.groups, weight.perm)
        args = (*weights, ordered, _ld(ordered), tokens, out, _ld(out), *shape)
        return get(exact_linear.exact_kernel, isa, bits, FLOAT32, asym), args

    def _one_token(self, weight: LowBitWeight, entries: OverlayWeight, activations: str) -> Any:
        """The kernel of one token for a linear with residuals, or 0 where there is none.

        AVX2's registers hold no more than the linear: beside it residuals cost what they cost behind it.
        """
        if activations != "int8" or weight.sparse or self.kernels.vectors == AVX2:
            return 0
        traits = (weight.num_bits, weight.zeros is not None, entries.wide)
        return self.kernels.get(int8_overlay.one_token_kernel, *traits)

    def _residuals(self, entries: OverlayWeight, x: Tensor, out: Tensor, blocks: int) -> tuple[Any, ...]:
        """The arguments of residuals, those of ``overlay_kernel`` before the kernels."""
        head = (x, _ld(x), x.shape[1], self._tiled(x), self.inputs.tokens, out, _ld(out), blocks)
        return (*head, *entries.arrays)

    def _tiled(self, x: Tensor) -> Tensor:
        """x in tiles of 8 tokens; shared by all weights over it."""
        key = _identity(x)
        if key not in self._tiles:
            size = x.shape[1]
            tiles = torch.empty(padded(self.inputs.max_tokens, overlay_tiles.TILE), size, device="meta")
            self._tiles[key] = tiles
            args = (x, _ld(x), size, self.inputs.tokens, tiles)
            self._call(self.kernels.get(overlay_tiles.tiles_kernel), args, BY_ROWS)
        return self._tiles[key]

    def _rounded(self, weight: LowBitWeight, x: Tensor, form: int) -> tuple[Tensor, Tensor, Tensor]:
        """x as int8 or bf16 in the weight's order of inputs; shared by weights that agree on it."""
        middle = 2 ** (weight.num_bits - 1) + (bf16_linear.base(weight.num_bits) if form == PAIRS else 0)
        offset = 0 if form == OCTETS else 1 if weight.zeros is not None else middle
        key = (*_identity(x), form, offset, None if weight.perm is None else weight.perm.tobytes())
        if key not in self._quantized:
            groups = weight.groups
            isa = self.kernels.isa if form == QUADS else self.kernels.vectors
            words = groups * GROUP // (2 if form == PAIRS else 4)
            # A tile may have a row more than there are tokens, see ROUNDED.
            rounded = (self.buffer(words, 1), self.buffer(groups, 1), self.buffer(groups, 1))
            perm = 0 if weight.perm is None else weight.perm
            head = (x, _ld(x), weight.in_features, groups, self.inputs.tokens, *rounded)
            args = (*head, offset, perm, *self._scratch(TILES[isa][0] * groups * GROUP * 4))
            self._call(self.kernels.get(quantize_kernel, isa, form), args, BY_ROWS)
            self._quantized[key] = rounded
        return self._quantized[key]

    def _ordered(self, x: Tensor, groups: int, perm: Any) -> Tensor:
        """x with its inputs in the weight's order and zeros up to whole groups."""
        if perm is None and x.shape[1] == groups * GROUP:
            return x
        out = self.buffer(groups * GROUP)
        order = 0 if perm is None else perm
        args = (x, _ld(x), x.shape[1], groups * GROUP, order, out, _ld(out), self.inputs.tokens)
        self._call(self.kernels.get(rows.gather_kernel), args, BY_ROWS)
        return out

    def _scratch(self, bytes_per_thread: int) -> tuple[Scratch, ScratchBytes]:
        self._scratch_bytes = max(self._scratch_bytes, padded(bytes_per_thread, 64))
        return Scratch(), ScratchBytes()

    def _call(self, kernel: Any, args: tuple[Any, ...], split: int) -> None:
        self._calls.append(Call(kernel, args, split))


def _ld(x: Tensor) -> int:
    """The row stride in floats."""
    assert x.stride(-1) == 1
    return int(x.stride(0))


def _identity(x: Tensor) -> tuple[int, int, int]:
    return x.untyped_storage()._cdata, int(x.storage_offset()), x.shape[1]
