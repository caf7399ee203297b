"""Attention over pages and without them, against float64 numpy: mixed steps, windows, scattered pages."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nybble.kernels import attention, reference
from nybble.kernels.paged import PagedSequence, PlanOptions, plan_attention

HEADS, KV_HEADS, DIM, BLOCK = 6, 2, 16, 8
SCALE = DIM**-0.5


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def oracle(q: Any, k: Any, v: Any, window: int | None) -> Any:
    """q: the last queries of a sequence whose keys are k: [L, KV_HEADS, DIM]. In float64."""
    out = np.zeros(q.shape)
    for row in range(len(q)):
        position = len(k) - len(q) + row
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(HEADS):
            kv = head // (HEADS // KV_HEADS)
            scores = k[first : position + 1, kv] @ q[row, head] * SCALE
            weights = np.exp(scores - scores.max())
            out[row, head] = weights / weights.sum() @ v[first : position + 1, kv]
    return out


class Step:
    """Sequences of (already cached, new) tokens in a cache of scattered pages, garbage everywhere else."""

    def __init__(
        self, lengths: list[tuple[int, int]], scattered: bool = True, garbage: float = 7.0, dtype: Any = None
    ) -> None:
        num_pages = sum(-(-(a + b) // BLOCK) for a, b in lengths) + 3
        order = torch.arange(num_pages)
        if scattered:
            order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(9))
        free = order.tolist()
        self.cache = torch.full((num_pages, BLOCK, 2, KV_HEADS, DIM), garbage, dtype=dtype or torch.float32)
        self.sequences: list[PagedSequence] = []
        self.keys: list[tuple[torch.Tensor, torch.Tensor]] = []
        first = 0
        for number, (old, new) in enumerate(lengths):
            table = tuple(free.pop(0) for _ in range(-(-(old + new) // BLOCK)))
            k = random(old + new, KV_HEADS, DIM, seed=2 * number)
            v = random(old + new, KV_HEADS, DIM, seed=2 * number + 1)
            for position in range(old):
                self.cache[table[position // BLOCK], position % BLOCK, 0] = k[position]
                self.cache[table[position // BLOCK], position % BLOCK, 1] = v[position]
            self.sequences.append(PagedSequence(first, new, old, table))
            self.keys.append((k, v))
            first += new
        self.q = random(first, HEADS, DIM, seed=99)

    def new(self, index: int) -> torch.Tensor:
        return torch.cat([kv[index][s.start :] for s, kv in zip(self.sequences, self.keys, strict=True)])

    def run(self, ops: Any, **options: Any) -> torch.Tensor:
        plan = plan_attention(self.sequences, PlanOptions(BLOCK, **options))
        ops.kv_write(self.new(0), self.new(1), self.cache, plan.slot_mapping)
        out: torch.Tensor = ops.paged_attention(self.q, self.cache, plan, SCALE)
        return out

    def expected(self, window: int | None = None) -> Any:
        return np.concatenate(
            [
                oracle(
                    self.q[s.first : s.first + s.count].double().numpy(),
                    k.double().numpy(),
                    v.double().numpy(),
                    window,
                )
                for s, (k, v) in zip(self.sequences, self.keys, strict=True)
            ]
        ).reshape(len(self.q), -1)


@pytest.fixture(params=[reference, attention], ids=["reference", "sdpa"])
def ops(request: pytest.FixtureRequest) -> Any:
    return request.param


STEPS: dict[str, list[tuple[int, int]]] = {
    "one decode": [(13, 1)],
    "first token": [(0, 1)],
    "full page": [(BLOCK - 1, 1)],
    "new page": [(BLOCK, 1)],
    "decodes": [(13, 1), (0, 1), (37, 1), (8, 1), (24, 1)],
    "one long decode": [(200, 1), (3, 1), (5, 1), (9, 1)],
    "prefill": [(0, 21)],
    "chunk": [(16, 21)],
    "unaligned chunk": [(13, 12)],
    "mixed": [(13, 1), (0, 9), (40, 1), (5, 30), (0, 1), (17, 2)],
}


@pytest.mark.parametrize("window", [None, 1, 5, 8, 64])
@pytest.mark.parametrize("scattered", [True, False])
@pytest.mark.parametrize("name", STEPS)
def test_paged_attention(ops: Any, name: str, scattered: bool, window: int | None) -> None:
    step = Step(STEPS[name], scattered)
    out = step.run(ops, window=window)
    np.testing.assert_allclose(out.double().numpy(), step.expected(window), atol=2e-6)


@pytest.mark.parametrize("window", [None, 100])
def test_a_chunk_longer_than_one_mask(ops: Any, window: int | None) -> None:
    step = Step([(30, 600), (50, 1)])
    np.testing.assert_allclose(
        step.run(ops, window=window).double().numpy(), step.expected(window), atol=3e-6
    )


def test_the_bound_on_gathered_tokens_splits_batches_only() -> None:
    lengths = [(20, 1)] * 9
    plan = plan_attention(Step(lengths).sequences, PlanOptions(BLOCK, max_batch_tokens=100))
    assert [batch.batch_size for batch in plan.batches] == [4, 4, 1]
    step = Step(lengths)
    out = step.run(attention, max_batch_tokens=1)
    np.testing.assert_allclose(out.double().numpy(), step.expected(), atol=2e-6)


def test_lengths_that_differ_much_are_not_padded_to_each_other() -> None:
    plan = plan_attention(Step([(300, 1), (5, 1), (290, 1), (9, 1)]).sequences, PlanOptions(BLOCK))
    assert sorted(batch.num_pages for batch in plan.batches) == [2, 38]


def test_neighbouring_pages_are_not_copied() -> None:
    step = Step([(60, 1)], scattered=False)
    (batch,) = plan_attention(step.sequences, PlanOptions(BLOCK)).batches
    assert batch.pages == 0
    (batch,) = plan_attention(step.sequences, PlanOptions(BLOCK, window=9)).batches
    assert (batch.pages, batch.num_pages) == (6, 2)


def test_a_window_reads_its_own_pages_only() -> None:
    step = Step([(60, 1), (59, 1)])
    for s in step.sequences:
        for page in s.block_table[: (s.start - 12 + 1) // BLOCK]:
            step.cache[page] = float("nan")
    assert step.run(attention, window=12).isfinite().all()


def test_large_values_in_unused_slots_do_not_matter(ops: Any) -> None:
    step = Step(STEPS["mixed"], garbage=1e30)
    np.testing.assert_allclose(step.run(ops).double().numpy(), step.expected(), atol=2e-6)


def test_half_precision_cache(ops: Any) -> None:
    step = Step(STEPS["mixed"], dtype=torch.float16)
    np.testing.assert_allclose(step.run(ops).double().numpy(), step.expected(), atol=5e-3)


def test_sequences_may_share_pages(ops: Any) -> None:
    step = Step([(BLOCK * 2, 1), (BLOCK * 2, 1)])
    first, second = step.sequences
    shared = PagedSequence(1, 1, second.start, (*first.block_table[:2], second.block_table[2]))
    step.sequences[1] = shared
    k, v = ([*zip(*step.keys, strict=True)][index] for index in (0, 1))
    step.keys[1] = tuple(torch.cat([t[0][: BLOCK * 2], t[1][BLOCK * 2 :]]) for t in (k, v))  # type: ignore[assignment]
    np.testing.assert_allclose(step.run(ops).double().numpy(), step.expected(), atol=2e-6)


def test_a_decode_is_the_same_in_any_batch() -> None:
    lengths = [(13, 1), (20, 1), (37, 1), (33, 1)]
    together = Step(lengths).run(attention)
    for row in range(len(lengths)):
        step = Step(lengths)
        s = step.sequences[row]
        step.run(attention)
        plan = plan_attention([PagedSequence(0, 1, s.start, s.block_table)], PlanOptions(BLOCK))
        alone = attention.paged_attention(step.q[row : row + 1], step.cache, plan, SCALE)
        torch.testing.assert_close(alone[0], together[row], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 6])
def test_causal_attention(ops: Any, window: int | None) -> None:
    lengths = [1, 12, 7]
    q, k, v = random(20, HEADS, DIM), random(20, KV_HEADS, DIM, seed=1), random(20, KV_HEADS, DIM, seed=2)
    split: Callable[[torch.Tensor], tuple[torch.Tensor, ...]] = lambda t: torch.split(t, lengths)  # noqa: E731
    parts = zip(*(split(t.double()) for t in (q, k, v)), strict=True)
    expected = np.concatenate([oracle(*(t.numpy() for t in part), window) for part in parts])
    out = ops.causal_attention(q, k, v, SCALE, window, lengths)
    np.testing.assert_allclose(out.double().numpy(), expected.reshape(20, -1), atol=2e-6)
