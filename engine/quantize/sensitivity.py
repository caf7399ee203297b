"""Post-quantization integral (Hu et al., arXiv 2503.01901): what each weight's rounding costs the model.

With w the weights, v what quantization made of them and F the mean loss per token,

    F(v) - F(w) = integral over t in 0..1 of grad F(w + t (v - w)) . (v - w) dt,

so with g the gradient averaged over the path, p_i = g_i (v_i - w_i) is each weight's share: their sum is the
loss change, up to the error of the rule, which falls with the square of the number of intervals. |p_i| ranks
weights.

Of the paper we had the abstract, its tables and captions. Ours are: the midpoint rule (its nodes are not
known; the mean over both ends and all nodes, which its tables suggest, is less exact) and the absolute value
outside the integral (which keeps the signed sum as a check).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..model.plan import Slot
from .gradients import GradientModel, Take, Targets, Towards, own_tokens, unchanged
from .results import QuantizedBlock, Stage
from .store import Store
from .work import Work

Rule = Literal["midpoint", "trapezoid"]


@dataclass(frozen=True, slots=True)
class ModuleScore:
    """signed: sum of p_i, a module's share of the loss change; mass: sum of |p_i|, in nats per token."""

    signed: float
    mass: float
    num_weights: int


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """gradients: averaged over the path, [out, in] fp32 by module. losses: at the nodes, nats per token.

    stage: the path's end; work: its start.
    """

    gradients: Mapping[str, Tensor]
    losses: list[float]
    stage: Stage
    work: Work

    def scores(self) -> Iterator[tuple[str, Tensor]]:
        """(module, p [out, in]), one at a time."""
        for name, start, end in changes(self.work, self.stage):
            yield name, self.gradients[name] * (end - start)

    def modules(self) -> dict[str, ModuleScore]:
        """The sums of each module."""
        return {name: summed(scores) for name, scores in self.scores()}


def summed(scores: Tensor) -> ModuleScore:
    """The sums of one module's p [out, in]."""
    signed, mass = scores.sum(dtype=torch.float64), scores.abs().sum(dtype=torch.float64)
    return ModuleScore(float(signed), float(mass), scores.numel())


def nodes(num_intervals: int, rule: Rule = "midpoint") -> list[tuple[float, float]]:
    """(place in 0..1, weight) of each node; weights sum to 1. Both rules' errors fall with 1/N^2."""
    step = 1 / num_intervals
    if rule == "midpoint":
        return [((k + 0.5) * step, step) for k in range(num_intervals)]
    ends = (0, num_intervals)
    return [(k * step, step / 2 if k in ends else step) for k in range(num_intervals + 1)]


def integrate(
    work: Work, stage: Stage, store: Store, rule: Sequence[tuple[float, float]], num_sequences: int
) -> Sensitivity:
    """Average the gradients from the weights of ``work`` (with the edits of ``stage``) to those of ``stage``.

    Holds an fp32 accumulator per weight in ``store``, and what ``gradients.peak_bytes`` says.
    """
    model = GradientModel(work, num_sequences)
    found = accumulators(work, stage.changed(), store)
    losses = []
    for done, (place, share) in enumerate(rule):
        work.progress("sensitivity", done, len(rule))
        take = adder(found, share / model.num_predicted)
        summed_loss = sum(loss for _, loss in model.run(take, Towards(stage, place)))
        losses.append(summed_loss / model.num_predicted)
    work.progress("sensitivity", len(rule), len(rule))
    return Sensitivity(found, losses, stage, work)


def plain_gradients(
    work: Work, store: Store, num_sequences: int, targets: Targets = own_tokens
) -> dict[str, Tensor]:
    """Gradients of the mean loss at the weights themselves, [out, in] fp32 by module of ``work.specs``."""
    model = GradientModel(work, num_sequences)
    found = accumulators(work, work.specs, store)
    for _ in model.run(adder(found, 1 / model.num_predicted), unchanged, targets):
        pass
    return found


def accumulators(work: Work, names: Sequence[str] | Mapping[str, object], store: Store) -> dict[str, Tensor]:
    """Zeros [out, in] fp32 for the modules ``names``, in the order of the model."""
    return {
        part.name: store.zeros((part.out_features, part.in_features))
        for _, part in work.source.parts()
        if part.name in names
    }


def adder(sums: Mapping[str, Tensor], scale: float) -> Take:
    """Adds ``scale`` g^T x to the accumulator of each module that has one."""

    def take(slot: Slot, x: Tensor, g: Tensor, lengths: Sequence[int]) -> None:
        parts = torch.split(g, [part.out_features for part in slot.parts], 1)
        for part, gradient in zip(slot.parts, parts, strict=True):
            if part.name in sums:
                sums[part.name].addmm_(gradient.T, x, alpha=scale)

    return take


def changes(work: Work, stage: Stage) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(module, w, v) [out, in] fp32 of every quantized module: before, with the edits, and after. One block
    in memory."""
    for done in stage:
        weights = before(work, done)
        for module in done.modules:
            if module.weight is not None:
                yield module.name, weights[module.name], module.weight.dequantize()


def before(work: Work, done: QuantizedBlock) -> dict[str, Tensor]:
    """The weights of a block by module, with the edits of ``done``: what was rounded."""
    block = work.source.block(done.index, work.ops)
    for edit in done.edits:
        block.rescale(edit)
    return block.weights()


def layer_sums(scores: Mapping[str, ModuleScore]) -> dict[str, ModuleScore]:
    """The same by decoder layer (``model.layers.0``), in order."""
    sums: dict[str, ModuleScore] = {}
    for name, score in scores.items():
        layer = ".".join(name.split(".")[:3])
        old = sums.get(layer, ModuleScore(0.0, 0.0, 0))
        sums[layer] = ModuleScore(
            old.signed + score.signed, old.mass + score.mass, old.num_weights + score.num_weights
        )
    return sums
