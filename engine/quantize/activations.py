"""The calibration's activations: sequences on their way through the blocks, and what linears see of them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.dispatch import Ops
from ..model.config import ModelConfig
from ..model.decoder import Attend, Rotary, causal_attend
from ..model.layers import RotaryEmbedding
from .calibrate import Calibration
from .hessian import HessianMean
from .source import Block, Source

HELD_BYTES = (
    2 << 30
)  # of activations inside a block that are held, rather than computed again for each linear
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
    _steps: Iterator[tuple[str, Tensor]] | None = None

    def advance(self, block: Block) -> None:
        """Through ``block``, or through what is left of it."""
        if self._steps is None:
            self.hidden = block(self.hidden, self.rotary, self.attend)
        else:
            self.hidden = self._until("", self._steps)
        self._steps = None

    def input_of(self, slot: str, block: Block, keep: bool) -> Tensor:
        """What the linear ``slot`` reads, [T, in].

        keep: hold what the block has computed so far, and go on from there the next time, so that nothing is
        computed twice; the slots asked for must be in order then.
        """
        steps = self._steps or block.steps(self.hidden, self.rotary, self.attend)
        self._steps = steps if keep else None
        return self._until(slot, steps)

    @staticmethod
    def _until(slot: str, steps: Iterator[tuple[str, Tensor]]) -> Tensor:
        return next(inputs for name, inputs in steps if name == slot)


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
    held = _held_bytes(config, num_tokens)
    return 4 * (kept + passing) + (held if held <= HELD_BYTES else 0)


def _held_bytes(config: ModelConfig, num_tokens: int) -> int:
    """What batches hold that have stopped inside a block: the residual and the widest input."""
    widest = max(config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size)
    return 4 * num_tokens * (config.hidden_size + widest)


def gather_stats(block: Block, batches: list[Batch]) -> dict[str, InputStats]:
    """What all linears of ``block`` see of the batches, by slot, in one pass."""
    watches = {slot: _Watch(linear.weight.shape[1]) for slot, linear in block.linears.items()}
    for batch in batches:
        for slot, inputs in block.steps(batch.hidden, batch.rotary, batch.attend):
            if slot in watches:
                watches[slot].add(inputs)
    return {slot: watch.stats for slot, watch in watches.items()}


def gather_hessian(block: Block, slot: str, batches: list[Batch]) -> Tensor:
    """2 E[x x^T] of the inputs x of the linear ``slot``: [K, K]. Slots of a block are asked for in order."""
    statistics = HessianMean(block.linears[slot].weight.shape[1])
    num_tokens = sum(len(batch.token_ids) for batch in batches)
    keep = _held_bytes(block.layer.config, num_tokens) <= HELD_BYTES
    for batch in batches:
        statistics.add(batch.input_of(slot, block, keep))
    return statistics.value
