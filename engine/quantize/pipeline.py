"""Quantizing a model: a rounder, perhaps after a transform, over one decoder block after the other.

True-sequential: in each block the linears that share an input are quantized together, in the order of
computation, on inputs that passed through all that was quantized before. In memory are one decoder block
(fp32), the Hessians at hand, and the calibration's activations.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ...kernels.layout import PackedWeight, QuantSpec
from ..errors import LayerError, lacks_memory
from ..model.config import ModelConfig
from ..model.plan import Slot
from .activations import (
    Batch,
    InputStats,
    activation_bytes,
    gather_hessian,
    gather_stats,
    make_batches,
)
from .grid import StaysDenseError
from .hessian import FactorizationError
from .results import QuantizedBlock, QuantizedModule, Rescale, Specs, Stage
from .source import Block
from .work import Work


@dataclass(frozen=True, slots=True)
class ToRound:
    """A module, or, for rounders to which rows are independent, several side by side along the outputs.

    weight: [out, in] fp32, not to be changed. exclude: [out, in] bool, weights to be kept apart: they count
    for no range, make no error, and come back exactly as residuals in ``PackedWeight.outliers``.
    """

    name: str
    weight: Tensor
    spec: QuantSpec
    exclude: Tensor | None = None


Stats = TypeVar("Stats")


class Rounder(Protocol[Stats]):
    """Rounds one linear. Holds settings only: what it gathers is ``Stats``, or lies in ``work.folder``."""

    @property
    def statistics(self) -> str:
        """What it gathers from calibration text, in words; "" for nothing."""

    @property
    def needs_inputs(self) -> bool:
        """Whether ``prepare`` needs the Hessian of the inputs (else it gets None)."""

    @property
    def rows_independent(self) -> bool:
        """Whether a row's result is the same whatever the other rows are."""

    def settings(self) -> dict[str, object]:
        """For the checkpoint's provenance."""

    def peak_bytes(self, config: ModelConfig, num_tokens: int) -> int:
        """What it holds beside the block at hand, one Hessian and the activations."""

    def begin(self, work: Work) -> None:
        """Before the first block: passes over the whole model, their results kept in ``work.folder``."""

    def prepare(self, hessian: Tensor | None, spec: QuantSpec) -> Stats:
        """For all modules that read the same input and have the same ``spec``. Raises FactorizationError."""

    def round(self, module: ToRound, stats: Stats) -> PackedWeight:
        """Raises StaysDenseError."""


class Transform(Protocol):
    """Changes a block before it is rounded, so that it computes the same and rounds better."""

    @property
    def statistics(self) -> str:
        """What it gathers, in words."""

    def settings(self) -> dict[str, object]:
        """For the checkpoint's provenance."""

    def prepare(self, block: Block, stats: Mapping[str, InputStats], specs: Specs) -> tuple[Rescale, ...]:
        """The edits of ``block`` (changed by none), given what its linears see, by slot name."""


Exclude = Callable[[str], Tensor | None]


@dataclass(frozen=True, slots=True)
class Rerun:
    """Another round over the same model. stage: where it goes.

    exclude: by module name, [out, in] bool or None. edits: the stage whose edits are applied again, so that
    both rounds start from the same weights.
    """

    stage: str
    exclude: Exclude
    edits: Stage


class Method(Protocol):
    """A way to quantize a whole model. One class in one file, one line in ``methods.METHODS``."""

    @property
    def statistics(self) -> str:
        """What it gathers from calibration text; "" for nothing (``work.calibration`` is then None)."""

    def settings(self) -> dict[str, object]:
        """Its settings, for the checkpoint's provenance."""

    def peak_bytes(self, config: ModelConfig, num_tokens: int) -> int:
        """A bound of the memory that ``run`` holds at once, beside the process itself."""

    def run(self, work: Work) -> Stage:
        """Quantize; the stage that holds every block. Finished blocks that are found there stay."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The methods that need one pass over the blocks: rounder x transform. A ``Method``, and others' base."""

    rounder: Rounder[Any]
    transform: Transform | None = None
    true_sequential: bool = True

    @property
    def statistics(self) -> str:
        """See Method."""
        found = [self.rounder.statistics, "" if self.transform is None else self.transform.statistics]
        return "; ".join(part for part in found if part)

    @property
    def needs_inputs(self) -> bool:
        """Whether the calibration goes through the blocks."""
        return self.rounder.needs_inputs or self.transform is not None

    def settings(self) -> dict[str, object]:
        """See Method."""
        found = dict(self.rounder.settings())
        if self.rounder.needs_inputs:
            found["true_sequential"] = self.true_sequential
        return found if self.transform is None else found | self.transform.settings()

    def peak_bytes(self, config: ModelConfig, num_tokens: int) -> int:
        """See Method: activations, the block and what becomes of it, Hessians, the rounder's."""
        hidden, ffn = config.hidden_size, config.intermediate_size
        heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        block = 8 * hidden * (2 * heads + 2 * kv_heads + 3 * ffn)
        needed = block + self.rounder.peak_bytes(config, num_tokens)
        if self.needs_inputs:
            together = self.transform is not None or not self.true_sequential
            inputs = (hidden, heads, hidden, ffn) if together else (max(hidden, heads, ffn),)
            needed += activation_bytes(config, num_tokens) + 4 * sum(size * size for size in inputs)
        return needed

    def run(self, work: Work, again: Rerun | None = None) -> Stage:
        """See Method; ``again``: another round, see Rerun."""
        stage = work.stage("quantize" if again is None else again.stage)
        if len(stage):
            work.log(
                f"{stage.folder.name}: goes on after block {len(stage)} of {work.source.config.num_layers}"
            )
        if len(stage) < work.source.config.num_layers:
            self.rounder.begin(work)
            _Pass(self, work, again, stage).run()
        return stage


class _Pass:
    """One pass of a recipe over the blocks."""

    def __init__(self, recipe: Recipe, work: Work, again: Rerun | None, stage: Stage) -> None:
        self.recipe, self.work, self.again, self.stage = recipe, work, again, stage
        self.batches: list[Batch] = []
        if recipe.needs_inputs:
            assert work.calibration is not None
            self.batches = make_batches(work.source, work.calibration, work.ops)
        self.done = 0

    def run(self) -> None:
        """Over all blocks; those that are in the stage are only passed through."""
        self._tell(0, None)
        last = self.work.source.config.num_layers - 1
        for layer in range(last + 1):
            with _enough_memory(layer):
                self._run(layer, layer < last)

    def _run(self, layer: int, goes_on: bool) -> None:
        block = self.work.source.block(layer, self.work.ops)
        if layer < len(self.stage):
            finished = self.stage.load(layer)
            block.put(finished)
            self.done += len(finished.modules)
            self._tell(layer, None)
        else:
            self.stage.save(self._quantize(block))
        for batch in self.batches if goes_on else ():
            batch.advance(block)

    def _tell(self, layer: int, loss: float | None) -> None:
        self.work.progress(self.stage.folder.name, self.done, len(self.work.specs), layer, loss)

    def _quantize(self, block: Block) -> QuantizedBlock:
        index, needs_inputs = block.layer.index, self.recipe.rounder.needs_inputs
        edits = self._edits(block)
        for edit in edits:
            block.rescale(edit)
        hessians: dict[str, Tensor] = {}
        if needs_inputs and not self.recipe.true_sequential:
            hessians = {n: s.hessian for n, s in gather_stats(block, self.batches).items()}
        modules: list[QuantizedModule] = []
        for slot in block.slots:
            if slot.kind == "linear" and any(part.name in self.work.specs for part in slot.parts):
                hessian = hessians.pop(slot.name, None)
                if needs_inputs and hessian is None:
                    hessian = gather_hessian(block, slot.name, self.batches)
                for module in self._slot(block, slot, hessian):
                    modules.append(module)
                    self.done += 1
                    self._tell(index, module.output_error)
        quantized = {module.name for module in modules if module.weight is not None}
        return QuantizedBlock(index, tuple(modules), edits, block.changed(edits, quantized))

    def _edits(self, block: Block) -> tuple[Rescale, ...]:
        if self.again is not None:
            return self.again.edits.load(block.layer.index).edits
        if self.recipe.transform is None:
            return ()
        stats = gather_stats(block, self.batches)
        return self.recipe.transform.prepare(block, stats, self.work.specs)

    def _slot(self, block: Block, slot: Slot, hessian: Tensor | None) -> Iterator[QuantizedModule]:
        """The modules of ``slot``, whose quantized weights then stand in the block."""
        weights, rounder = block.weights(), self.recipe.rounder
        for spec, names in _by_spec(slot, self.work.specs).items():
            try:
                stats = rounder.prepare(hessian, spec)
            except FactorizationError as error:
                raise LayerError(
                    f"{names[0]}: no use can be made of its Hessian ({error}); raise --damping, give more "
                    "calibration text (--num-samples), or use --method rtn",
                    layer=names[0],
                ) from error
            for name, packed in self._round(names, weights, spec, stats):
                module = _judge(name, weights[name], packed, hessian)
                if module.weight is not None:
                    weights[name].copy_(module.weight.dequantize())
                yield replace(module, damping=getattr(stats, "damping", None))

    def _round(
        self, names: list[str], weights: Mapping[str, Tensor], spec: QuantSpec, stats: object
    ) -> Iterator[tuple[str, PackedWeight | StaysDenseError]]:
        """All in one go where rows are independent; one by one where not, or where one of them overflows."""
        rounder = self.recipe.rounder
        todo = [ToRound(name, weights[name], spec, self._exclude(name)) for name in names]
        if rounder.rows_independent and len(todo) > 1:
            try:
                packed = rounder.round(_side_by_side(todo), stats)
            except StaysDenseError:
                pass
            else:
                sizes = [len(module.weight) for module in todo]
                for module, stop, size in zip(todo, accumulate(sizes), sizes, strict=True):
                    yield module.name, packed.rows(stop - size, stop)
                return
        for module in todo:
            try:
                yield module.name, rounder.round(module, stats)
            except StaysDenseError as error:
                yield module.name, error

    def _exclude(self, name: str) -> Tensor | None:
        return None if self.again is None else self.again.exclude(name)


@contextmanager
def _enough_memory(layer: int) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        name = f"model.layers.{layer}"
        message = f"{name}: out of memory; lower --num-samples or --seq-len, or free some ({error})"
        raise LayerError(message.splitlines()[0], layer=name) from error


def _by_spec(slot: Slot, specs: Specs) -> dict[QuantSpec, list[str]]:
    found: dict[QuantSpec, list[str]] = {}
    for part in slot.parts:
        if part.name in specs:
            found.setdefault(specs[part.name], []).append(part.name)
    return found


def _side_by_side(modules: list[ToRound]) -> ToRound:
    exclude: Tensor | None = None
    if any(module.exclude is not None for module in modules):
        exclude = torch.cat(
            [
                torch.zeros_like(m.weight, dtype=torch.bool) if m.exclude is None else m.exclude
                for m in modules
            ]
        )
    return replace(modules[0], weight=torch.cat([m.weight for m in modules]), exclude=exclude)


def _judge(
    name: str, weight: Tensor, packed: PackedWeight | StaysDenseError, hessian: Tensor | None
) -> QuantizedModule:
    if isinstance(packed, StaysDenseError):
        return QuantizedModule(name, None, warning=f"stays dense: {packed}")
    difference = weight - packed.dequantize()
    return QuantizedModule(
        name,
        packed,
        float(difference.square().sum()) / (float(weight.square().sum()) or 1.0),
        None if hessian is None else _energy(difference, hessian) / (_energy(weight, hessian) or 1.0),
    )


def _energy(weight: Tensor, hessian: Tensor) -> float:
    """2 E||W x||^2 over the inputs x that made the Hessian."""
    return float(((weight @ hessian) * weight).sum())
