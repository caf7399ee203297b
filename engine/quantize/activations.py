"""The calibration's activations: sequences on their way through the blocks, and what linears see of them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...kernels.dispatch import Ops
from ..model.config import ModelConfig
from ..model.decoder import Attend, Rotary, causal_attend
from ..model.layers import RotaryEmbedding
from .calibrate import Calibration
from .hessian import HessianMean
from .source import Block, Source

BATCH_TOKENS = 2048  # tokens that go through a block at once; a longer sequence is a batch by itself


@dataclass(slots=True)
class Batch:
    """Sequences that go through a block together.

    hidden: [T, H] fp32, the next block's input. token_ids: [T]; lengths: of the sequences in it, sum T.
    """

    hidden: Tensor
    rotary: Rotary
    attend: Attend
    token_ids: Tensor
    lengths: tuple[int, ...]

    def advance(self, block: Block) -> None:
        """Through ``block``."""
        self.hidden = block(self.hidden, self.rotary, self.attend)


@dataclass(frozen=True, slots=True)
class InputStats:
    """What a linear's inputs x looked like. hessian: [K, K], 2 E[x x^T]; mean_abs, max_abs: [K]."""

    hessian: Tensor
    mean_abs: Tensor
    max_abs: Tensor


class _Watch:
    """Gathers InputStats."""

    def __init__(self, in_features: int) -> None:
        self.hessian = HessianMean(in_features)
        self.total_abs = torch.zeros(in_features)
        self.max_abs = torch.zeros(in_features)

    def add(self, inputs: Tensor) -> None:
        """Count ``inputs`` [T, K]."""
        magnitude = inputs.abs()
        self.total_abs += magnitude.sum(0)
        self.max_abs = torch.maximum(self.max_abs, magnitude.amax(0))
        self.hessian.add(inputs)

    @property
    def stats(self) -> InputStats:
        """Of all that was added."""
        tokens = max(self.hessian.num_tokens, 1)
        return InputStats(self.hessian.value, self.total_abs / tokens, self.max_abs)


def make_batches(source: Source, calibration: Calibration, ops: Ops) -> list[Batch]:
    """The calibration's sequences, embedded."""
    groups: list[list[tuple[int, ...]]] = [[]]
    for sequence in calibration.sequences:
        if groups[-1] and sum(map(len, groups[-1])) + len(sequence) > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(sequence)
    token_ids = torch.tensor([i for group in groups for sequence in group for i in sequence])
    hidden = source.embed(token_ids, ops)
    rotary = RotaryEmbedding(source.config)
    sizes = [sum(map(len, group)) for group in groups]
    batches = []
    parts = zip(groups, torch.split(hidden, sizes), torch.split(token_ids, sizes), strict=True)
    for group, part, ids in parts:
        lengths = tuple(map(len, group))
        positions = torch.cat([torch.arange(length) for length in lengths])
        attend = causal_attend(source.config, ops, lengths)
        batches.append(Batch(part.clone(), rotary(positions), attend, ids, lengths))
    return batches


def activation_bytes(config: ModelConfig, num_tokens: int) -> int:
    """A bound of what the batches hold, and one of them inside a block."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    kept = num_tokens * (hidden + 2 * config.head_dim + 2)
    passing = min(num_tokens, BATCH_TOKENS) * (4 * hidden + 2 * heads + 2 * kv_heads + 5 * ffn)
    return 4 * (kept + passing)


class _ReachedError(Exception):
    """The forward pass came to the last linear that is watched; no more need be computed."""


def gather_stats(block: Block, slots: Iterable[str], batches: list[Batch]) -> dict[str, InputStats]:
    """What the linears ``slots`` see of the batches, in one pass through ``block``."""
    watches = {slot: _Watch(block.linears[slot].weight.shape[1]) for slot in slots}
    for batch in batches:
        with _observed(block, watches), suppress(_ReachedError):
            block(batch.hidden, batch.rotary, batch.attend)
    return {slot: watch.stats for slot, watch in watches.items()}


def gather_hessian(block: Block, slot: str, batches: list[Batch]) -> Tensor:
    """2 E[x x^T] of the inputs x of the linear ``slot``: [K, K]."""
    watches = {slot: HessianMean(block.linears[slot].weight.shape[1])}
    for batch in batches:
        with _observed(block, watches), suppress(_ReachedError):
            block(batch.hidden, batch.rotary, batch.attend)
    return watches[slot].value


@contextmanager
def _observed(block: Block, watches: Mapping[str, _Watch | HessianMean]) -> Iterator[None]:
    """Linears report their inputs to ``watches``; the last of them ends the pass."""
    waiting = set(watches)

    def observe(slot: str, inputs: Tensor) -> None:
        watches[slot].add(inputs)
        waiting.discard(slot)
        if not waiting:
            raise _ReachedError

    for slot in watches:
        block.linears[slot].observe = partial(observe, slot)
    try:
        yield
    finally:
        for slot in watches:
            block.linears[slot].observe = None
