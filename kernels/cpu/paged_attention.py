"""Paged causal attention on the CPU: grouped query heads, online softmax, fp32 or fp16 pages.

Pages hold 16 tokens: keys [block, kv_head, block_size / 16, head_dim, 16] (transposed: one vector is one
component of 16 tokens), values [block, kv_head, block_size, head_dim].

A *span* is up to 8 rows of one sequence at consecutive positions: int64 words (first row, rows, first
position, address of the sequence's int32 block table). Every query's softmax runs over chunks of 128
tokens that begin at multiples of 128, in order, so its result depends neither on the rows beside it nor
on how the prompt was cut (batch invariance).
"""

from typing import Any

import numpy as np
from numba import njit

from .abi import named, word
from .exponentials import exp_f32, row_max, scale_row, softmax_weights
from .isa import VNNI
from .vectors import ELEMENT_BYTES, load_f32, load_i32, scores, store_f32, weighted_sum

CHUNK = 128
SPAN_ROWS = 8
SPAN_WORDS = 4
NEG_INF = np.float32(-1e30)


def scratch_floats(group: int, head_dim: int) -> int:
    """fp32 words of scratch a thread needs: a span's probabilities, accumulators, maxima and sums."""
    return SPAN_ROWS * group * (CHUNK + head_dim + 2)


@njit(nogil=True, error_model="numpy")
def _softmax_chunk(row, low, count, head_dim, accumulator, state, scale):
    """Scores [low, count) at ``row`` become weights, what was accumulated is rescaled; updates (max, sum).

    The 16-token pages around them get weight 0 outside of that range.
    """
    first = low // 16 * 16
    vectors = (count - first + 15) // 16
    for t in range(first, low):
        store_f32(row + 4 * t, NEG_INF)
    for t in range(count, first + 16 * vectors):
        store_f32(row + 4 * t, NEG_INF)
    top = load_f32(state)
    best = max(top, row_max(row + 4 * first, vectors, NEG_INF) * scale)
    if best > top:
        factor = exp_f32(top - best)
        store_f32(state, best)
        store_f32(state + 4, load_f32(state + 4) * factor)
        scale_row(accumulator, head_dim // 16, factor, accumulator)
    added = softmax_weights(row + 4 * first, vectors, scale, best)
    store_f32(state + 4, load_f32(state + 4) + added)


def _key_scores(kind: int, head_dim: int) -> Any:
    """Scores of queries against a page: strides of q and out in floats. Four queries share a load of keys."""

    @njit(nogil=True, error_model="numpy")
    @named(kind, head_dim)
    def key_scores(count, q, ldq, page, out, ldo):
        i = 0
        while i + 4 <= count:
            scores(4, kind, q + i * ldq * 4, ldq, page, head_dim, out + i * ldo * 4, ldo)
            i += 4
        if i + 2 <= count:
            scores(2, kind, q + i * ldq * 4, ldq, page, head_dim, out + i * ldo * 4, ldo)
            i += 2
        if i < count:
            scores(1, kind, q + i * ldq * 4, ldq, page, head_dim, out + i * ldo * 4, ldo)

    return key_scores


def _value_sums(isa: int, kind: int, head_dim: int) -> Any:
    """Add a page's values, weighted, to accumulators: strides of p and out in floats."""
    wide = 64 if isa == VNNI and head_dim % 64 == 0 else 16  # four rows of 64 fill the registers of AVX-512
    size = ELEMENT_BYTES[kind]

    @njit(nogil=True, error_model="numpy")
    @named(isa, kind, head_dim)
    def value_sums(rows, p, ldp, values, count, out, ldo):
        for c in range(0, head_dim, wide):
            v = values + c * size
            to = out + c * 4
            i = 0
            while i + 4 <= rows:
                weighted_sum(4, wide, kind, p + i * ldp * 4, ldp, v, head_dim, count, to + i * ldo * 4, ldo)
                i += 4
            if i + 2 <= rows:
                weighted_sum(2, wide, kind, p + i * ldp * 4, ldp, v, head_dim, count, to + i * ldo * 4, ldo)
                i += 2
            if i < rows:
                weighted_sum(1, wide, kind, p + i * ldp * 4, ldp, v, head_dim, count, to + i * ldo * 4, ldo)

    return value_sums


def _span_scores(kind: int, group: int, head_dim: int, block_size: int) -> Any:
    """A span's rows times the keys of tokens [first, stop) of one KV head; rows of weights start at begin."""
    pages = block_size // 16
    page_key_bytes = head_dim * 16 * ELEMENT_BYTES[kind]
    key_scores = _key_scores(kind, head_dim)
    ldp = group * CHUNK

    @njit(nogil=True, error_model="numpy")
    @named(kind, group, head_dim, block_size)
    def span_scores(q, ldq, keys, rows, table, kv_heads, head, probs, begin, first, stop):
        for t in range(first, stop, 16):
            block = load_i32(table + 4 * (t // block_size))
            page = keys + ((block * kv_heads + head) * pages + t % block_size // 16) * page_key_bytes
            to = probs + (t - begin) * 4
            if rows == 1:
                key_scores(group, q, head_dim, page, to, CHUNK)
            else:
                for h in range(group):
                    key_scores(rows, q + h * head_dim * 4, ldq, page, to + h * CHUNK * 4, ldp)

    return span_scores


def _span_chunk(isa: int, kind: int, group: int, head_dim: int, block_size: int) -> Any:
    """One span against tokens [begin, stop) of its sequence, for one KV head.

    Scores of a row past its own token are computed with the others' and dropped. Values are not: what a row
    does not attend to must not reach it even with weight 0, it may be infinite. So a page that all rows
    attend to whole serves them together, and the others each row by itself, its heads together.
    """
    size = ELEMENT_BYTES[kind]
    scale = np.float32(head_dim**-0.5)
    span_scores = _span_scores(kind, group, head_dim, block_size)
    value_sums = _value_sums(isa, kind, head_dim)
    ldp = group * CHUNK  # from a row to the next, of weights and of accumulators
    lda = group * head_dim

    @njit(nogil=True, error_model="numpy")
    @named(isa, kind, group, head_dim, block_size)
    def span_chunk(q, ldq, keys, values, rows, position, table, kv_heads, head, window, scratch, begin, stop):
        probs = scratch
        accumulators = probs + SPAN_ROWS * group * CHUNK * 4
        states = accumulators + SPAN_ROWS * group * head_dim * 4
        first = begin
        if window > 0:
            first = max(begin, position - window + 1) // 16 * 16
        span_scores(q, ldq, keys, rows, table, kv_heads, head, probs, begin, first, stop)
        for r in range(rows):
            end = min(stop, position + r + 1)
            low = begin
            if window > 0:
                low = max(begin, position + r - window + 1)
            if low < end:
                for h in range(group):
                    row, i = probs + (r * ldp + h * CHUNK) * 4, r * group + h
                    at = accumulators + i * head_dim * 4
                    _softmax_chunk(row, low - begin, end - begin, head_dim, at, states + 8 * i, scale)
        for t in range(first, stop, 16):
            block = load_i32(table + 4 * (t // block_size))
            slot = (block * kv_heads + head) * block_size + t % block_size
            v = values + slot * head_dim * size
            p = probs + (t - begin) * 4
            inside = window <= 0 or t >= position + rows - window
            if rows > 1 and inside and t + 16 <= min(stop, position + 1):
                for h in range(group):
                    at = accumulators + h * head_dim * 4
                    value_sums(rows, p + h * CHUNK * 4, ldp, v, 16, at, lda)
            else:
                for r in range(rows):
                    end = min(stop, position + r + 1)
                    low = begin
                    if window > 0:
                        low = max(begin, position + r - window + 1)
                    if low < t + 16 and t < end:
                        at = accumulators + r * lda * 4
                        value_sums(group, p + r * ldp * 4, CHUNK, v, min(16, end - t), at, head_dim)

    return span_chunk


def _finish(group: int, head_dim: int) -> Any:
    """Divide a span's accumulators by their sums of weights, into the output."""

    @njit(nogil=True, error_model="numpy")
    @named(group, head_dim)
    def finish(states, accumulators, rows, out, ldo):
        for r in range(rows):
            for h in range(group):
                i = r * group + h
                inverse = np.float32(1) / load_f32(states + 8 * i + 4)
                to = out + (r * ldo + h * head_dim) * 4
                scale_row(accumulators + i * head_dim * 4, head_dim // 16, inverse, to)

    return finish


def attention_kernel(isa: int, kind: int, group: int, head_dim: int, block_size: int) -> Any:
    """The kernel for pages of a storage kind, ``group`` query heads per KV head.

    args: q, ldq (floats), out, ldo, keys, values, spans, address of the number of spans, kv_heads,
    window (0: none), scratch, scratch bytes per thread. Spans and KV heads are the unit of threads.
    """
    span_chunk = _span_chunk(isa, kind, group, head_dim, block_size)
    finish = _finish(group, head_dim)

    def attention(args, thread, num_threads):
        q = word(args, 0)
        ldq = word(args, 1)
        out = word(args, 2)
        ldo = word(args, 3)
        keys = word(args, 4)
        values = word(args, 5)
        spans = word(args, 6)
        kv_heads = word(args, 8)
        window = word(args, 9)
        scratch = word(args, 10) + thread * word(args, 11)
        accumulators = scratch + SPAN_ROWS * group * CHUNK * 4
        states = accumulators + SPAN_ROWS * group * head_dim * 4
        for unit in range(thread, word(word(args, 7), 0) * kv_heads, num_threads):
            span = spans + unit // kv_heads * SPAN_WORDS * 8
            head = unit % kv_heads
            first = word(span, 0)
            rows = word(span, 1)
            position = word(span, 2)
            table = word(span, 3)
            for i in range(rows * group):
                store_f32(states + 8 * i, NEG_INF)
                store_f32(states + 8 * i + 4, np.float32(0))
            for i in range(rows * group * head_dim):
                store_f32(accumulators + 4 * i, np.float32(0))
            at = head * group * head_dim * 4
            query = q + first * ldq * 4 + at
            begin = 0
            if window > 0:
                begin = max(0, position - window + 1) // CHUNK * CHUNK
            while begin < position + rows:
                end = min(position + rows, begin + CHUNK)
                span_chunk(
                    query,
                    ldq,
                    keys,
                    values,
                    rows,
                    position,
                    table,
                    kv_heads,
                    head,
                    window,
                    scratch,
                    begin,
                    end,
                )
                begin += CHUNK
            finish(states, accumulators, rows, out + first * ldo * 4 + at, ldo)

    return attention
