"""Running a rounder over a model: module by module, or block by block with calibration.

``blockwise`` is true-sequential: in each block the linears that share an input are quantized together, in the
order of computation, on inputs that passed through all that was quantized before. In memory are one decoder
block (fp32), the Hessian at hand with its factor, and the calibration's activations.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ...kernels.dispatch import Ops
from ...kernels.layout import PackedWeight, QuantSpec
from ..model.config import ModelConfig
from ..model.decoder import Attend, Rotary, causal_attend
from ..model.layers import RotaryEmbedding
from ..model.plan import Slot
from .calibrate import Calibration
from .grid import ScaleOverflowError, round_nearest
from .hessian import FactorizationError, HessianMean
from .source import TARGET, Block, ObservedWeight, Source

BATCH_TOKENS = 2048  # tokens that go through a block at once; a longer sequence is a batch by itself

Specs = Mapping[str, QuantSpec]  # by module name; modules that are not in it stay dense


@dataclass(frozen=True, slots=True)
class QuantizedModule:
    """What became of one module.

    weight: without the bias, which is not touched; None where it must stay dense, ``warning`` says why.
    weight_error: ||W - Q||^2 / ||W||^2. output_error: the same of the outputs on the calibration text,
    None where none was used. damping: what the Hessian needed.
    """

    name: str
    weight: PackedWeight | None
    weight_error: float | None = None
    output_error: float | None = None
    damping: float | None = None
    warning: str | None = None


class Method(Protocol):
    """A way to quantize a whole model. One class in one file, one line in ``methods.METHODS``."""

    @property
    def statistics(self) -> str:
        """What it gathers from calibration text; "" for nothing (``run`` then gets no calibration)."""

    def settings(self) -> dict[str, object]:
        """Its settings, for the checkpoint's provenance."""

    def peak_bytes(self, config: ModelConfig, num_tokens: int) -> int:
        """A bound of the memory that ``run`` holds at once, beside the process itself."""

    def run(self, source: Source, calibration: Calibration | None, specs: Specs) -> Iterator[QuantizedModule]:
        """The modules of ``specs`` in order."""


class Prepared(Protocol):
    """Statistics made ready, shared by all linears that read the same input."""

    @property
    def damping(self) -> float:
        """What was added to the Hessian's diagonal, as a share of its mean."""


Stats = TypeVar("Stats", bound=Prepared)


class Rounder(Protocol[Stats]):
    """Rounds one linear by the Hessian of its input."""

    @property
    def mse(self) -> float:
        """Exponent of the range search, also where it has to be replaced by rounding to nearest."""

    def prepare(self, hessian: Tensor, spec: QuantSpec) -> Stats:
        """Raises FactorizationError."""

    def round(
        self, weight: Tensor, stats: Stats, spec: QuantSpec, exclude: Tensor | None = None
    ) -> PackedWeight:
        """weight: [out, in] fp32, not changed. Raises ScaleOverflowError."""


def modulewise(source: Source, specs: Specs, mse: float) -> Iterator[QuantizedModule]:
    """Round to nearest, each module by itself; one module in memory."""
    for slot, part in source.parts():
        spec = specs.get(part.name)
        if spec is None:
            continue
        weight = source.read(slot, part).values.float()
        try:
            packed = round_nearest(weight, spec, mse)
        except ScaleOverflowError as error:
            yield _stays_dense(part.name, error)
            continue
        yield QuantizedModule(part.name, packed, _weight_error(weight, packed.dequantize()))


def blockwise(
    source: Source, calibration: Calibration, specs: Specs, rounder: Rounder[Stats]
) -> Iterator[QuantizedModule]:
    """Calibrate and round one decoder block after the other."""
    ops = Ops.resolve(TARGET)
    batches = make_batches(source, calibration, ops)
    for layer in range(source.config.num_layers):
        block = source.block(layer, ops)
        for slot in source.linear_slots(layer):
            if any(part.name in specs for part in slot.parts):
                yield from _quantize_slot(block, slot, batches, specs, rounder)
        if layer + 1 < source.config.num_layers:
            for batch in batches:
                batch.hidden = block(batch.hidden, batch.rotary, batch.attend)
        del block


@dataclass(slots=True)
class Batch:
    """Sequences that go through a block together. hidden: [T, H] fp32, the next block's input."""

    hidden: Tensor
    rotary: Rotary
    attend: Attend


def make_batches(source: Source, calibration: Calibration, ops: Ops) -> list[Batch]:
    """The calibration's sequences, embedded."""
    groups: list[list[tuple[int, ...]]] = [[]]
    for sequence in calibration.sequences:
        if groups[-1] and sum(map(len, groups[-1])) + len(sequence) > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(sequence)
    hidden = source.embed(torch.tensor([i for g in groups for s in g for i in s]), ops)
    rotary = RotaryEmbedding(source.config)
    batches = []
    for group, part in zip(groups, torch.split(hidden, [sum(map(len, g)) for g in groups]), strict=True):
        positions = torch.cat([torch.arange(len(sequence)) for sequence in group])
        attend = causal_attend(source.config, ops, [len(sequence) for sequence in group])
        batches.append(Batch(part.clone(), rotary(positions), attend))
    return batches


class _ReachedError(Exception):
    """The forward pass came to the linear that is watched; the rest of the block need not be computed."""


def _gather(block: Block, linear: ObservedWeight, batches: list[Batch]) -> Tensor:
    """The Hessian of ``linear``'s input."""
    statistics = HessianMean(linear.weight.shape[1])

    def observe(inputs: Tensor) -> None:
        statistics.add(inputs)
        raise _ReachedError

    linear.observe = observe
    for batch in batches:
        with suppress(_ReachedError):
            block(batch.hidden, batch.rotary, batch.attend)
    linear.observe = None
    return statistics.value


def _quantize_slot(
    block: Block, slot: Slot, batches: list[Batch], specs: Specs, rounder: Rounder[Stats]
) -> Iterator[QuantizedModule]:
    linear = block.linears[slot.name]
    hessian = _gather(block, linear, batches)
    prepared: dict[QuantSpec, Stats | FactorizationError] = {}
    start = 0
    for part in slot.parts:
        rows = slice(start, start + part.out_features)
        start = rows.stop
        spec = specs.get(part.name)
        if spec is None:
            continue
        if spec not in prepared:
            prepared[spec] = _prepare(rounder, hessian, spec)
        module = _quantize(part.name, linear.weight[rows], hessian, spec, (rounder, prepared[spec]))
        if module.weight is not None:
            linear.weight[rows] = module.weight.dequantize()
        yield module


def _prepare(rounder: Rounder[Stats], hessian: Tensor, spec: QuantSpec) -> Stats | FactorizationError:
    try:
        return rounder.prepare(hessian, spec)
    except FactorizationError as error:
        return error


def _quantize(
    name: str,
    weight: Tensor,
    hessian: Tensor,
    spec: QuantSpec,
    how: tuple[Rounder[Stats], Stats | FactorizationError],
) -> QuantizedModule:
    rounder, stats = how
    try:
        if isinstance(stats, FactorizationError):
            packed = round_nearest(weight, spec, rounder.mse)
            warning = f"rounded to nearest: no use could be made of its Hessian ({stats})"
            return QuantizedModule(name, packed, _weight_error(weight, packed.dequantize()), warning=warning)
        packed = rounder.round(weight, stats, spec)
    except ScaleOverflowError as error:
        return _stays_dense(name, error)
    values = packed.dequantize()
    return QuantizedModule(
        name,
        packed,
        _weight_error(weight, values),
        _output_error(weight, values, hessian),
        stats.damping,
    )


def _stays_dense(name: str, error: ScaleOverflowError) -> QuantizedModule:
    return QuantizedModule(name, None, warning=f"stays dense: fp16 cannot hold its scales ({error})")


def _weight_error(weight: Tensor, values: Tensor) -> float:
    """||W - Q||^2 / ||W||^2; 0 for a weight of zeros."""
    return float((weight - values).square().sum()) / (float(weight.square().sum()) or 1.0)


def _output_error(weight: Tensor, values: Tensor, hessian: Tensor) -> float:
    """E||(W - Q) x||^2 / E||W x||^2 over the inputs x that made the Hessian."""
    difference = weight - values
    before = float(((weight @ hessian) * weight).sum())
    return float(((difference @ hessian) * difference).sum()) / (before or 1.0)
