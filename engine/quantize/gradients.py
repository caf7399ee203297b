"""Gradients of the loss with respect to every linear's weight, one decoder block in memory at a time.

The forward pass keeps only each block's input; the backward pass reads the blocks again from the last to
the first, computes each once more with autograd (Chen et al., arXiv 1604.06174), and gives away every
linear's inputs x [T, K] and the gradients g [T, N] of its outputs. A weight's gradient is g^T x, which
whoever wants it adds to an accumulator of its own: none is held here.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..errors import ConfigError
from ..model.config import ModelConfig
from ..model.plan import Slot
from .activations import BATCH_TOKENS, Batch, make_batches
from .calibrate import Calibration
from .results import Stage
from .source import Block
from .work import Work

KEPT_BYTES = 1 << 30  # of block inputs between the forward and the backward pass
LOGIT_BYTES = 1 << 27  # of [rows, vocab] logits at once

# (linear's slot, its inputs x [T, K], gradients g [T, N] of its outputs, lengths of the sequences, sum T)
Take = Callable[[Slot, Tensor, Tensor, Sequence[int]], None]
# alters a block's weights before they are used
Change = Callable[[Block], None]
# (log-probabilities [R, vocab], the text's own next tokens [R]) -> the tokens whose loss is taken [R]
Targets = Callable[[Tensor, Tensor], Tensor]


def own_tokens(logprobs: Tensor, token_ids: Tensor) -> Tensor:
    """The text's own next tokens: the usual loss."""
    return token_ids


class Sampled:
    """Tokens drawn from the model's own distribution: the mean outer product of such gradients is the Fisher
    information F, and d^T F d / 2 the divergence that a small change d of the weights makes."""

    def __init__(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)

    def __call__(self, logprobs: Tensor, token_ids: Tensor) -> Tensor:
        """See Targets."""
        return torch.multinomial(logprobs.exp(), 1, generator=self._random)[:, 0]


def unchanged(block: Block) -> None:
    """The weights as they are."""


class Towards:
    """Moves a block to w + share (v - w): w after the edits of ``stage``, v what it made of its modules."""

    def __init__(self, stage: Stage, share: float) -> None:
        self._stage = stage
        self._share = share

    def __call__(self, block: Block) -> None:
        """See Change."""
        done = self._stage.load(block.layer.index)
        for edit in done.edits:
            block.rescale(edit)
        weights = block.weights()
        for module in done.modules:
            if module.weight is not None:
                weights[module.name].lerp_(module.weight.dequantize(), self._share)


class GradientModel:
    """The model of ``work``, its loss over the calibration, or the first ``num_sequences`` of it.

    Sequences longer than a batch are cut: attention's [Hq, T, T] would not be bounded otherwise.
    """

    def __init__(self, work: Work, num_sequences: int | None = None) -> None:
        assert work.calibration is not None
        self.work = work
        self.config = work.source.config
        self.sequences = tuple(_pieces(work.calibration.sequences[:num_sequences]))
        self.num_predicted = sum(len(sequence) - 1 for sequence in self.sequences)
        self._head = work.source.head(work.ops)

    def loss(self, change: Change = unchanged) -> float:
        """Mean per predicted token, nats."""
        return sum(loss for _, loss in self.run(None, change)) / self.num_predicted

    def run(
        self, take: Take | None, change: Change = unchanged, targets: Targets = own_tokens
    ) -> Iterator[tuple[int, float]]:
        """For each portion: how many sequences, and their loss (summed over tokens), after ``take`` saw them.

        The gradients are of the *sum* over tokens. take None: the loss alone.
        """
        for portion in self._portions():
            batches = make_batches(self.work.source, Calibration(portion, "", ""), self.work.ops)
            inputs = self._forward(batches, change, keep=take is not None)
            losses, gradients = [], []
            for batch in batches:
                loss, gradient = self._loss(batch, targets, take is not None)
                losses.append(loss)
                gradients.append(gradient)
            if take is not None:
                self._backward(batches, (inputs, gradients), take, change)
            if not math.isfinite(sum(losses)):
                folder = self.work.source.model.folder
                raise ConfigError(
                    f"MODEL {folder}: its loss on the calibration is {sum(losses)}: fp32 overflows, and "
                    "gradients say nothing; use --method rtn or gptq"
                )
            yield len(portion), sum(losses)

    def _portions(self) -> Iterator[tuple[tuple[int, ...], ...]]:
        """As many sequences as may keep the inputs of all blocks at once, at least one."""
        room = KEPT_BYTES // (4 * self.config.hidden_size * (self.config.num_layers + 2))
        start = used = 0
        for index, sequence in enumerate(self.sequences):
            if index > start and used + len(sequence) > room:
                yield self.sequences[start:index]
                start, used = index, 0
            used += len(sequence)
        yield self.sequences[start:]

    def _block(self, layer: int, change: Change) -> Block:
        block = self.work.source.block(layer, self.work.ops)
        change(block)
        return block

    @torch.no_grad()
    def _forward(self, batches: list[Batch], change: Change, keep: bool) -> list[list[Tensor]]:
        """Each block's input by batch; ``batch.hidden`` becomes the last one's output."""
        inputs: list[list[Tensor]] = []
        for layer in range(self.config.num_layers):
            block = self._block(layer, change)
            if keep:
                inputs.append([batch.hidden for batch in batches])
            for batch in batches:
                batch.advance(block)
        return inputs

    def _loss(self, batch: Batch, targets: Targets, differentiate: bool) -> tuple[float, Tensor]:
        """The sum, and its gradient with respect to ``batch.hidden``."""
        last = torch.tensor(batch.lengths).cumsum(0) - 1
        rows = torch.ones(len(batch.token_ids), dtype=torch.bool)
        rows[last] = False
        total, gradient = 0.0, torch.zeros_like(batch.hidden)
        for part in torch.split(rows.nonzero()[:, 0], max(1, LOGIT_BYTES // (4 * self.config.vocab_size))):
            with torch.set_grad_enabled(differentiate):
                hidden = batch.hidden[part].requires_grad_(differentiate)
                logprobs = self._head(hidden).log_softmax(-1)
                wanted = targets(logprobs.detach(), batch.token_ids[part + 1])
                loss = -logprobs.gather(1, wanted[:, None]).sum(dtype=torch.float64)
            total += float(loss.detach())
            if differentiate:
                (gradient[part],) = torch.autograd.grad(loss, hidden)
        return total, gradient

    def _backward(
        self, batches: list[Batch], state: tuple[list[list[Tensor]], list[Tensor]], take: Take, change: Change
    ) -> None:
        inputs, gradients = state
        for layer in reversed(range(self.config.num_layers)):
            block = self._block(layer, change)
            slots = self.work.source.linear_slots(layer)
            for index, (batch, hidden) in enumerate(zip(batches, inputs.pop(), strict=True)):
                seen: dict[str, tuple[Tensor, Tensor]] = {}
                for slot in slots:
                    block.linears[slot.name].watch = _keep_in(seen, slot.name)
                hidden.requires_grad_()
                output = block(hidden, batch.rotary, batch.attend)
                outputs = [seen[slot.name][1] for slot in slots]
                gradients[index], *found = torch.autograd.grad(output, [hidden, *outputs], gradients[index])
                for slot, gradient in zip(slots, found, strict=True):
                    take(slot, seen[slot.name][0].detach(), gradient, batch.lengths)


def _pieces(sequences: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    for sequence in sequences:
        for start in range(0, len(sequence), BATCH_TOKENS):
            piece = sequence[start : start + BATCH_TOKENS]
            if len(piece) > 1:
                yield piece


def _keep_in(seen: dict[str, tuple[Tensor, Tensor]], name: str) -> Callable[[Tensor, Tensor], None]:
    def watch(x: Tensor, y: Tensor) -> None:
        seen[name] = (x, y)

    return watch


def peak_bytes(config: ModelConfig, num_tokens: int) -> int:
    """A bound of what a pass over ``num_tokens`` holds at once, accumulators aside.

    The inputs kept of all blocks, at most KEPT_BYTES or one batch; a batch in a block with what autograd
    keeps of it, attention's [Hq, T, T] five times among it; two blocks; the head, and its logits five times.
    All in fp32.
    """
    hidden, ffn = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    tokens = min(num_tokens, BATCH_TOKENS)
    kept = max(
        min(KEPT_BYTES, 4 * num_tokens * hidden * (config.num_layers + 2)),
        4 * tokens * hidden * (config.num_layers + 2),
    )
    saved = tokens * (12 * hidden + 6 * heads + 6 * kv_heads + 8 * ffn + 5 * config.num_heads * tokens)
    blocks = 2 * hidden * (2 * heads + 2 * kv_heads + 3 * ffn)
    logits = 5 * min(LOGIT_BYTES, 4 * tokens * config.vocab_size)
    return kept + 4 * (saved + blocks + config.vocab_size * hidden) + logits
