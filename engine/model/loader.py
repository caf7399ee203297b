"""From a folder of safetensors to the decoder's weights: strict, module by module, with a report.

At any time the memory holds what is loaded so far and one module on its way through its kernel's repack.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.cpu.numba_linear import bf16_refusal, passed_over, why_not
from ...kernels.dispatch import Target
from ...kernels.layout import PackedWeight, QuantSpec
from ..config import EngineConfig
from ..errors import CheckpointError, ConfigError
from ..formats.base import Format
from ..formats.registry import format_of
from ..formats.safetensors_files import SafetensorsFiles, TensorInfo
from ..hardware import cpu_features
from ..model_files import ModelFiles
from .config import ModelConfig
from .layers import Linear
from .plan import (
    EMBEDDING,
    LM_HEAD,
    Part,
    Slot,
    open_model,
    part_format,
    part_tensors,
    weight_plan,
)

Progress = Callable[[str, int, int, str], None]
Weights = dict[str, Linear | Tensor]
RoundHead = Callable[[PackedWeight], PackedWeight]
Refusals = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class LayerKernel:
    """What one packed weight got: the kernel, and why each better candidate refused."""

    slot: str
    kernel: str
    refused: Refusals
    spec: QuantSpec | None
    num_weights: int


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did. ``weight_bytes``: all weights in their kernels' layouts.

    ``notes``: modules that are not served as the checkpoint says, and how they are.
    """

    layers: tuple[LayerKernel, ...]
    weight_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def main_kernel(self) -> str:
        """The kernel that holds most weights."""
        totals: dict[str, int] = {}
        for layer in self.layers:
            totals[layer.kernel] = totals.get(layer.kernel, 0) + layer.num_weights
        return max(totals, key=lambda name: totals[name])

    def lines(self) -> list[str]:
        """The notes; a line per kernel, form of weights and set of reasons: how many layers, examples."""
        groups: dict[tuple[str, str, Refusals], list[str]] = {}
        for layer in self.layers:
            groups.setdefault((layer.kernel, spec_text(layer.spec), layer.refused), []).append(layer.slot)
        return list(self.notes) + [_line(*key, slots) for key, slots in groups.items()]

    def details(self) -> list[str]:
        """One line per layer."""
        return [
            _line(layer.kernel, spec_text(layer.spec), layer.refused, [layer.slot]) for layer in self.layers
        ]


def spec_text(spec: QuantSpec | None) -> str:
    """As in: 4-bit group 128 sym, or: dense."""
    if spec is None:
        return "dense"
    order = ", act-order" if spec.actorder == "group" else ""
    return f"{spec.num_bits}-bit group {spec.group_size} {'sym' if spec.symmetric else 'asym'}{order}"


def _line(kernel: str, form: str, refused: Refusals, slots: list[str]) -> str:
    named = ", ".join(slots[:2]) + (", ..." if len(slots) > 2 else "")
    why = "; ".join(f"not {name}: {reason}" for name, reason in refused)
    return f"{kernel}: {len(slots)} x {form} ({named})" + (f"; {why}" if why else "")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A decoder's weights by slot name, ready for ``target``."""

    config: ModelConfig
    weights: Weights
    report: LoadReport
    target: Target
    format: Format


def resolve_target(
    config: EngineConfig, checkpoint_format: Format, found: Mapping[str, TensorInfo]
) -> Target:
    """Device and dtype from the options and, for "auto", from what the checkpoint holds most of.

    auto is fp32 for fp32 checkpoints; others are computed in fp16 on a CPU, in their own dtype on CUDA.
    """
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no usable GPU here; use --device cpu or auto")
    if config.dtype != "auto":
        dtype = getattr(torch, config.dtype)
    else:
        dtype = _stored_dtype(checkpoint_format, found)
        if dtype == torch.bfloat16 and device == "cpu":
            dtype = torch.float16
    features = cpu_features() if device == "cpu" else frozenset()
    target = Target(device, dtype, features, config.cpu_kernels, config.low_bit_activations)
    if target.is_cpu and config.cpu_activations == "int8" and (reason := why_not(target)) is not None:
        raise ConfigError(f"--cpu-activations int8: {reason}; leave it out, or use --cpu-kernels auto")
    refusal = bf16_refusal(target) if target.is_cpu and config.cpu_activations == "bf16" else None
    if refusal is not None:
        raise ConfigError(
            f"--cpu-activations bf16: {refusal}; it takes AVX512-BF16, numba and --cpu-kernels auto or vnni; "
            "use int8 or fp32"
        )
    return target


def _stored_dtype(checkpoint_format: Format, found: Mapping[str, TensorInfo]) -> torch.dtype:
    sizes = {"F32": 0, "F16": 0, "BF16": 0}
    for info in found.values():
        if info.dtype in sizes:
            sizes[info.dtype] += info.nbytes
    largest = max(sizes, key=lambda name: sizes[name])
    if largest == "F32" and checkpoint_format.default_spec is not None:
        return torch.float16  # quantized, with an fp32 embedding: the codes decide, not what was left over
    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[largest]


def load_slot(
    files: SafetensorsFiles,
    checkpoint_format: Format,
    slot: Slot,
    target: Target,
    table: Tensor | None = None,
) -> Linear | Tensor:
    """One module. ``table``: the loaded embedding, so that a tied head is not read again."""
    if slot.kind == "linear":
        return _load_linear(files, checkpoint_format, slot, target, table)[0]
    return _load_tensor(files, slot, target)


def _load_tensor(files: SafetensorsFiles, slot: Slot, target: Target) -> Tensor:
    (part,) = slot.parts
    tensor = _checked(files, f"{part.name}.weight")
    if slot.kind == "embedding" and target.is_cpu:
        return tensor  # rows are converted when they are looked up
    return tensor.to(target.device, target.activation_dtype)


def _load_linear(
    files: SafetensorsFiles,
    checkpoint_format: Format,
    slot: Slot,
    target: Target,
    table: Tensor | None,
    round_head: RoundHead | None = None,
) -> tuple[Linear, list[LayerKernel], list[str]]:
    parts = [
        PackedWeight(table)
        if part.name == EMBEDDING and table is not None
        else load_part(files, checkpoint_format, slot, part)
        for part in slot.parts
    ]
    notes: list[str] = []
    if slot.name == LM_HEAD and round_head is not None:
        parts, notes = _rounded_head(parts, round_head)
    notes += [
        f"warning: {part.name}: the checkpoint says 2:4, but {reason}; {slot.name} is served without that"
        for part, weight in zip(slot.parts, parts, strict=True)
        if says_24(slot, checkpoint_format) and checkpoint_format.spec(part.name) is not None
        if (reason := weight.why_not_24()) is not None
    ]
    fused = PackedWeight.cat(parts)
    del parts
    linear = Linear.build(fused, target)
    layers = [
        LayerKernel(slot.name, choice.name, choice.refused, weight.spec, weight.values.numel())
        for choice, weight in zip(linear.choices, fused, strict=True)
    ]
    return linear, layers, notes


def says_24(slot: Slot, checkpoint_format: Format) -> bool:
    """Whether the checkpoint says that two of four weights are zero; it means the decoder's blocks."""
    return checkpoint_format.sparsity == "2:4" and slot.name != LM_HEAD


def _rounded_head(parts: list[PackedWeight], round_head: RoundHead) -> tuple[list[PackedWeight], list[str]]:
    """The output head and what became of it."""
    (head,) = parts
    if head.spec is not None:
        stored = spec_text(head.spec)
        return parts, [f"warning: --lm-head-bits has no effect: the output head is stored as {stored}"]
    rounded = round_head(head)
    stored = str(head.values.dtype).removeprefix("torch.")
    return [rounded], [
        f"output head: stored as {stored}, rounded to {spec_text(rounded.spec)} (--lm-head-bits)"
    ]


def load_part(files: SafetensorsFiles, checkpoint_format: Format, slot: Slot, part: Part) -> PackedWeight:
    """One module of the checkpoint in the canonical form, on the CPU."""
    wanted = part_tensors(slot, part, checkpoint_format)
    tensors = {name: _checked(files, name) for name in wanted if name in files.tensors}
    weight = part_format(slot, part, checkpoint_format).read(tensors, part.name)
    if (weight.out_features, weight.in_features) != (part.out_features, part.in_features):
        raise CheckpointError(
            f"{files.folder}: {part.name}: expected [{part.out_features}, {part.in_features}], found "
            f"{list(weight.values.shape)}"
        )
    return weight


def _checked(files: SafetensorsFiles, name: str) -> Tensor:
    tensor = files.get(name)
    if tensor.is_floating_point():
        # One pass without a temporary; the slow test only where the sum overflowed or something is wrong.
        finite = bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())
        if not finite:
            raise CheckpointError(
                f"{files.tensors[name].path}: tensor {name} holds NaN or infinite values; download it again"
            )
    return tensor


def load_model(
    folder: ModelFiles,
    config: EngineConfig,
    progress: Progress,
    target: Target | None = None,
    round_head: RoundHead | None = None,
) -> LoadedModel:
    """The model in ``folder``. ``progress(phase, done, total, line)`` is told of every module.

    ``round_head``: quantizes the output head if it is stored dense.
    Errors: UnsupportedModelError, CheckpointError that lists missing, wrong and unexpected tensors.
    """
    model_config = ModelConfig.from_dict(folder.config)
    checkpoint_format = format_of(folder)
    slots = weight_plan(model_config)
    weights: Weights = {}
    layers: list[LayerKernel] = []
    notes: list[str] = []
    with open_model(folder, checkpoint_format, slots) as files:
        chosen = target or resolve_target(config, checkpoint_format, files.tensors)
        table: Tensor | None = None
        for done, slot in enumerate(slots):
            progress("weights", done, len(slots), "")
            if slot.kind == "linear":
                weights[slot.name], kernels, found = _load_linear(
                    files, checkpoint_format, slot, chosen, table, round_head
                )
                layers += kernels
                notes += found
            else:
                weights[slot.name] = tensor = _load_tensor(files, slot, chosen)
                table = tensor if slot.kind == "embedding" else table
    if any(layer.kernel == "cpu-int8" for layer in layers) and (note := passed_over(chosen)) is not None:
        notes.append(note)
    sizes = [w.numel() * w.element_size() if isinstance(w, Tensor) else w.nbytes for w in weights.values()]
    report = LoadReport(tuple(layers), sum(sizes), tuple(notes))
    for line in ["", *report.lines()]:
        progress("weights", len(slots), len(slots), line)
    return LoadedModel(model_config, weights, report, chosen, checkpoint_format)
