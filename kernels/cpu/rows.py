"""Kernels that work row by row: embedding, norms, rotary positions, KV writes, gating.

All split the rows as ``row_share`` does, so a run of them needs no barrier in between.
"""

from typing import Any

import numpy as np
from numba import njit

from .abi import word
from .activations import gather_row, row_share
from .exponentials import silu_mul
from .vectors import ELEMENT_BYTES, load_f32, load_kind, store_f32, store_kind

REDUCE = {"nnan", "nsz", "arcp", "contract", "reassoc"}  # the order within a row depends on its length only


def embedding_kernel(kind: int) -> Any:
    """args: token ids (int64), tokens, table, width, out, ldo."""
    size = ELEMENT_BYTES[kind]

    def embedding(args, thread, num_threads):
        ids = word(args, 0)
        table = word(args, 2)
        width = word(args, 3)
        out = word(args, 4)
        ldo = word(args, 5)
        first, last = row_share(word(word(args, 1), 0), thread, num_threads)
        for m in range(first, last):
            row = table + word(ids, m) * width * size
            for i in range(width):
                store_f32(out + (m * ldo + i) * 4, load_kind(kind, row + i * size))

    return embedding


def tied_embedding_kernel(kind: int) -> Any:
    """args: token ids (int64), tokens, the head's values [vocab / 16, K, 16], padded K, width, out, ldo."""
    size = ELEMENT_BYTES[kind]

    def tied_embedding(args, thread, num_threads):
        ids = word(args, 0)
        values = word(args, 2)
        inputs = word(args, 3)
        width = word(args, 4)
        out = word(args, 5)
        ldo = word(args, 6)
        first, last = row_share(word(word(args, 1), 0), thread, num_threads)
        for m in range(first, last):
            token = word(ids, m)
            column = values + (token // 16 * inputs * 16 + token % 16) * size
            for i in range(width):
                store_f32(out + (m * ldo + i) * 4, load_kind(kind, column + i * 16 * size))

    return tied_embedding


@njit(nogil=True, error_model="numpy", fastmath=REDUCE)
def _norm_row(x, weight, out, width, eps):
    total = np.float32(0)
    for i in range(width):
        value = load_f32(x + 4 * i)
        total += value * value
    factor = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
    for i in range(width):
        store_f32(out + 4 * i, load_f32(x + 4 * i) * factor * load_f32(weight + 4 * i))


def norm_kernel() -> Any:
    """args: x, ldx, weight (fp32), width, out, ldo, tokens, address of eps, heads, their weights' stride."""

    def norm(args, thread, num_threads):
        x = word(args, 0)
        ldx = word(args, 1)
        weight = word(args, 2)
        width = word(args, 3)
        out = word(args, 4)
        ldo = word(args, 5)
        eps = load_f32(word(args, 7))
        heads = word(args, 8)
        ldw = word(args, 9)
        first, last = row_share(word(word(args, 6), 0), thread, num_threads)
        for m in range(first, last):
            for h in range(heads):
                at = h * width * 4
                _norm_row(x + m * ldx * 4 + at, weight + h * ldw * 4, out + m * ldo * 4 + at, width, eps)

    return norm


def add_norm_kernel() -> Any:
    """args: x, ldx, residual, ldr, weight, width, out, ldo, total, ldt, tokens, address of eps."""

    def add_norm(args, thread, num_threads):
        x = word(args, 0)
        ldx = word(args, 1)
        residual = word(args, 2)
        ldr = word(args, 3)
        weight = word(args, 4)
        width = word(args, 5)
        out = word(args, 6)
        ldo = word(args, 7)
        total = word(args, 8)
        ldt = word(args, 9)
        eps = load_f32(word(args, 11))
        first, last = row_share(word(word(args, 10), 0), thread, num_threads)
        for m in range(first, last):
            row = total + m * ldt * 4
            for i in range(width):
                store_f32(
                    row + 4 * i, load_f32(x + (m * ldx + i) * 4) + load_f32(residual + (m * ldr + i) * 4)
                )
            _norm_row(row, weight, out + m * ldo * 4, width, eps)

    return add_norm


def rope_kernel() -> Any:
    """args: x, ldx, heads, head_dim, cos, sin ([positions, head_dim / 2]), positions, out, ldo, tokens."""

    def rope(args, thread, num_threads):
        x = word(args, 0)
        ldx = word(args, 1)
        heads = word(args, 2)
        dim = word(args, 3)
        cos = word(args, 4)
        sin = word(args, 5)
        positions = word(args, 6)
        out = word(args, 7)
        ldo = word(args, 8)
        half = dim // 2
        first, last = row_share(word(word(args, 9), 0), thread, num_threads)
        for m in range(first, last):
            table = word(positions, m) * half * 4
            for h in range(heads):
                low = x + (m * ldx + h * dim) * 4
                to = out + (m * ldo + h * dim) * 4
                for i in range(half):
                    a = load_f32(low + 4 * i)
                    b = load_f32(low + 4 * (i + half))
                    c = load_f32(cos + table + 4 * i)
                    s = load_f32(sin + table + 4 * i)
                    store_f32(to + 4 * i, a * c - b * s)
                    store_f32(to + 4 * (i + half), b * c + a * s)

    return rope


def kv_write_kernel(kind: int, head_dim: int, block_size: int) -> Any:
    """args: k, ldk, v, ldv, keys, values, slots (int64), tokens, kv_heads. Pages: see ``attention``."""
    size = ELEMENT_BYTES[kind]
    pages = block_size // 16

    def kv_write(args, thread, num_threads):
        k = word(args, 0)
        ldk = word(args, 1)
        v = word(args, 2)
        ldv = word(args, 3)
        keys = word(args, 4)
        values = word(args, 5)
        slots = word(args, 6)
        kv_heads = word(args, 8)
        first, last = row_share(word(word(args, 7), 0), thread, num_threads)
        for m in range(first, last):
            slot = word(slots, m)
            block = slot // block_size
            token = slot % block_size
            for h in range(kv_heads):
                page = (block * kv_heads + h) * pages + token // 16
                key = keys + (page * head_dim * 16 + token % 16) * size
                value = values + ((block * kv_heads + h) * block_size + token) * head_dim * size
                for i in range(head_dim):
                    store_kind(kind, key + i * 16 * size, load_f32(k + (m * ldk + h * head_dim + i) * 4))
                    store_kind(kind, value + i * size, load_f32(v + (m * ldv + h * head_dim + i) * 4))

    return kv_write


def silu_kernel() -> Any:
    """args: x [T, 2 * width], ldx, width, out, ldo, tokens: out = silu(first half) * second half."""

    def silu(args, thread, num_threads):
        x = word(args, 0)
        ldx = word(args, 1)
        width = word(args, 2)
        out = word(args, 3)
        ldo = word(args, 4)
        first, last = row_share(word(word(args, 5), 0), thread, num_threads)
        for m in range(first, last):
            gate = x + m * ldx * 4
            to = out + m * ldo * 4
            for i in range(0, width - 15, 16):
                silu_mul(16, gate + 4 * i, gate + 4 * (i + width), to + 4 * i)
            for i in range(width // 16 * 16, width):
                silu_mul(1, gate + 4 * i, gate + 4 * (i + width), to + 4 * i)

    return silu


def bias_kernel() -> Any:
    """args: bias, width, out, ldo, tokens: every row of out becomes the bias."""

    def bias(args, thread, num_threads):
        values = word(args, 0)
        width = word(args, 1)
        out = word(args, 2)
        ldo = word(args, 3)
        first, last = row_share(word(word(args, 4), 0), thread, num_threads)
        for m in range(first, last):
            for i in range(width):
                store_f32(out + (m * ldo + i) * 4, load_f32(values + 4 * i))

    return bias


def gather_kernel() -> Any:
    """Reorders inputs. args: x, ldx, width, places, perm (see ``gather_row``), out, ldo, tokens."""

    def gather(args, thread, num_threads):
        x = word(args, 0)
        ldx = word(args, 1)
        width = word(args, 2)
        places = word(args, 3)
        perm = word(args, 4)
        out = word(args, 5)
        ldo = word(args, 6)
        first, last = row_share(word(word(args, 7), 0), thread, num_threads)
        for m in range(first, last):
            gather_row(x + m * ldx * 4, width, places, perm, out + m * ldo * 4)

    return gather
