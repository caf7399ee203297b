"""What attention needs to know about one step: which rows belong to which sequence, and where its pages are.

Built once a step on the host, used by every layer of one KV group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_QUERIES_PER_MASK = 256  # a chunk's queries are split, so that a mask has at most this many rows
_MIN_FILL = 0.5  # sequences share a padded batch only while they fill this share of its length


@dataclass(frozen=True, slots=True)
class PagedSequence:
    """Rows [first, first + count) of the step are one sequence's tokens at positions start, start + 1...

    ``block_table``: ids of the pages that hold its tokens [0, start + count).
    """

    first: int
    count: int
    start: int
    block_table: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Some of a step's queries, attended in one call: B sequences with Q queries each over L gathered tokens.

    rows: the B * Q rows of the step's tensors, a slice or int64 indices.
    pages: int64 [B * P], or the first of P neighbouring pages (then B is 1 and nothing is copied).
    skip, length: the gathered tokens [skip, skip + length) are looked at.
    mask: [B, 1, Q, L] additive, or None; causal: Q equals L and each query sees itself and what is before it.
    """

    batch_size: int
    rows: slice | Tensor
    pages: Tensor | int
    num_pages: int
    skip: int
    length: int
    mask: Tensor | None
    causal: bool


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """One step of one KV group. ``slot_mapping``: int64 [T], page * block_size + offset of each new token."""

    sequences: tuple[PagedSequence, ...]
    block_size: int
    window: int | None
    slot_mapping: Tensor
    batches: tuple[PagedBatch, ...]


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """``max_batch_tokens`` bounds B * L of a padded batch, and with it the memory of the gathered pages."""

    block_size: int
    window: int | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    max_batch_tokens: int = 1 << 15


def plan_attention(sequences: Sequence[PagedSequence], options: PlanOptions) -> AttentionPlan:
    """Group the step's queries: single ones (decodes) into padded batches, each chunk by itself."""
    batches: list[PagedBatch] = []
    for group in _group_singles([s for s in sequences if s.count == 1], options):
        batches.append(_batch_of_singles(group, options))
    for sequence in sequences:
        if sequence.count > 1:
            batches.extend(_batches_of_chunk(sequence, options))
    return AttentionPlan(
        tuple(sequences), options.block_size, options.window, _slots(sequences, options), tuple(batches)
    )


def _slots(sequences: Sequence[PagedSequence], options: PlanOptions) -> Tensor:
    size = options.block_size
    slots: list[int] = []
    for s in sequences:
        position, end = s.start, s.start + s.count
        while position < end:
            page_end = min(end, (position // size + 1) * size)
            base = s.block_table[position // size] * size + position % size
            slots.extend(range(base, base + page_end - position))
            position = page_end
    return torch.tensor(slots, dtype=torch.int64, device=options.device)


def _first_page(sequence: PagedSequence, position: int, options: PlanOptions) -> int:
    """The first page that the query at ``position`` looks at."""
    if options.window is None:
        return 0
    return max(0, position - options.window + 1) // options.block_size


def _group_singles(singles: list[PagedSequence], options: PlanOptions) -> list[list[PagedSequence]]:
    """Neighbours of similar length together; in the step's order where one group holds them all."""

    def pages(s: PagedSequence) -> int:
        return s.start // options.block_size + 1 - _first_page(s, s.start, options)

    groups: list[list[PagedSequence]] = []
    longest = 0
    for s in sorted(singles, key=pages, reverse=True):
        fits = groups and (len(groups[-1]) + 1) * longest * options.block_size <= options.max_batch_tokens
        if fits and pages(s) >= _MIN_FILL * longest:
            groups[-1].append(s)
        else:
            groups.append([s])
            longest = pages(s)
    return [sorted(group, key=lambda s: s.first) for group in groups]


def _batch_of_singles(group: list[PagedSequence], options: PlanOptions) -> PagedBatch:
    size = options.block_size
    firsts = [_first_page(s, s.start, options) for s in group]
    tables = [s.block_table[f : s.start // size + 1] for s, f in zip(group, firsts, strict=True)]
    # The tokens each query sees, counted from its first gathered page.
    lows = [
        0 if options.window is None else max(0, s.start - options.window + 1) - f * size
        for s, f in zip(group, firsts, strict=True)
    ]
    highs = [s.start + 1 - f * size for s, f in zip(group, firsts, strict=True)]
    num_pages = max(len(table) for table in tables)
    skip, length = 0, num_pages * size
    mask = None
    if min(highs) < length or max(lows) > 0:
        column = torch.arange(length)
        seen = (column >= torch.tensor(lows)[:, None]) & (column < torch.tensor(highs)[:, None])
        mask = _additive(seen, options)[:, None, None, :]
    pages = _pages(tables, num_pages, options)
    rows = [s.first for s in group]
    contiguous = rows[-1] - rows[0] == len(rows) - 1
    return PagedBatch(
        batch_size=len(group),
        rows=slice(rows[0], rows[-1] + 1) if contiguous else torch.tensor(rows, device=options.device),
        pages=pages,
        num_pages=num_pages,
        skip=skip,
        length=length,
        mask=mask,
        causal=False,
    )


def _batches_of_chunk(sequence: PagedSequence, options: PlanOptions) -> list[PagedBatch]:
    size, window = options.block_size, options.window
    end = sequence.start + sequence.count
    whole = sequence.start == 0 and (window is None or window >= end)
    step = sequence.count if whole else _QUERIES_PER_MASK
    batches = []
    for offset in range(0, sequence.count, step):
        count = min(step, sequence.count - offset)
        start = sequence.start + offset
        first_page = _first_page(sequence, start, options)
        table = sequence.block_table[first_page : -(-(start + count) // size)]
        length = start + count - first_page * size
        mask = None
        if not whole:
            query = torch.arange(start, start + count)[:, None]
            key = torch.arange(first_page * size, start + count)
            seen = key <= query
            if window is not None:
                seen &= key > query - window
            mask = _additive(seen, options)[None, None]
        batches.append(
            PagedBatch(
                batch_size=1,
                rows=slice(sequence.first + offset, sequence.first + offset + count),
                pages=_pages([table], len(table), options),
                num_pages=len(table),
                skip=0,
                length=length,
                mask=mask,
                causal=whole,
            )
        )
    return batches


def _additive(seen: Tensor, options: PlanOptions) -> Tensor:
    mask = torch.zeros(seen.shape, dtype=options.dtype).masked_fill_(~seen, float("-inf"))
    return mask.to(options.device)


def _pages(tables: list[tuple[int, ...]], num_pages: int, options: PlanOptions) -> Tensor | int:
    if len(tables) == 1:
        table = tables[0]
        if table == tuple(range(table[0], table[0] + num_pages)):
            return table[0]
    # Short tables are padded with a page of the same sequence: what it holds is finite, and masked.
    padded = [page for table in tables for page in (*table, *([table[0]] * (num_pages - len(table))))]
    return torch.tensor(padded, dtype=torch.int64, device=options.device)
