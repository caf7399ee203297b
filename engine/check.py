"""Will this model load, and in how much memory? From configuration and headers alone: no tensor is read."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..kernels.dispatch import Choice, Target, WeightTraits, choose
from ..kernels.layout import PackedWeight, QuantSpec
from .config import EngineConfig
from .errors import CheckpointError, ConfigError
from .formats.base import Format
from .formats.overlay import is_extra
from .formats.registry import format_of
from .formats.safetensors_files import SafetensorsFiles, TensorInfo, find_shards, read_header
from .hardware import available_memory
from .memory import gib, plan_kv_cache, request_bytes, resolve_max_model_len
from .model.config import ModelConfig
from .model.loader import LayerKernel, LoadReport, resolve_target, says_24, spec_text
from .model.plan import EMBEDDING, LM_HEAD, Part, Slot, find_problems, part_format, part_tensors, weight_plan
from .model_files import ModelFiles
from .step_model import kv_cache_dtype, tape_refusal

_SAMPLE_ROWS = 128  # a multiple of any kernel's tile of rows
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(slots=True)
class CheckReport:
    """What a check found. Sizes in bytes; those of ``memory`` are 0 where problems kept them unknown.

    ``problems``: why it will not load or fit, all of them. ``notes``: worth knowing, no obstacle.
    """

    folder: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    architecture: str = ""
    quant_method: str = ""
    quantization: str = ""
    device: str = ""
    dtype: str = ""
    num_parameters: int = 0
    file_bytes: int = 0
    weight_bytes: int = 0
    max_model_len: int = 0
    max_num_seqs: int = 0
    kv_bytes_per_token: int = 0
    kv_bytes_one_request: int = 0
    kv_bytes_all_requests: int = 0
    kv_bytes_granted: int = 0
    free_bytes: int = 0
    kernels: list[str] = field(default_factory=list)

    @property
    def loads(self) -> bool:
        """Whether nothing stands against it."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"loads": self.loads, **asdict(self)}

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"{self.folder}: {'will load' if self.loads else 'will NOT load'}"]
        lines += [f"  problem: {problem}" for problem in self.problems]
        if self.weight_bytes:
            lines += [
                f"  {self.architecture}, {self.num_parameters:,} parameters, {self.quantization}; "
                f"computed in {self.dtype} on {self.device}",
                f"  weights: {gib(self.file_bytes)} on disk, {gib(self.weight_bytes)} as served",
                f"  KV cache: {gib(self.kv_bytes_one_request)} for a request of {self.max_model_len} tokens, "
                f"{gib(self.kv_bytes_all_requests)} for {self.max_num_seqs} of them; it would get "
                f"{gib(self.kv_bytes_granted)}",
                f"  memory free now: {gib(self.free_bytes)}",
            ]
        lines += [f"  kernel {line}" for line in self.kernels]
        return lines + [f"  note: {note}" for note in self.notes]


def check_model(folder: Path, config: EngineConfig | None = None) -> CheckReport:
    """Check the model in ``folder`` for the device, dtype, lengths and memory of ``config`` (or defaults)."""
    config = config or EngineConfig(str(folder))
    report = CheckReport(str(folder), max_num_seqs=config.max_num_seqs)
    files = ModelFiles(folder)
    extra: tuple[str, ...] = ()
    try:
        model_config = ModelConfig.from_dict(files.config)
        report.architecture = model_config.architecture
    except ConfigError as error:
        report.problems.append(error.message)
    try:
        checkpoint_format = format_of(files)
        extra = checkpoint_format.extra_files
        report.quant_method = checkpoint_format.quant_method
        report.quantization = spec_text(checkpoint_format.default_spec)
    except ConfigError as error:
        report.problems.append(error.message)
    found = _read_headers(folder, extra, report)
    if not report.problems:
        _check_tensors(report, files, model_config, checkpoint_format, found)
        _check_memory(report, files, config, model_config, (checkpoint_format, found))
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        report.notes.append("no tokenizer.json: only prompts of token ids could be served")
    return report


def _read_headers(folder: Path, extra: tuple[str, ...], report: CheckReport) -> Mapping[str, TensorInfo]:
    try:
        with SafetensorsFiles(folder, extra) as files:
            return files.tensors
    except CheckpointError as error:
        first = error.message
    report.problems.append(first)
    try:
        shards, _ = find_shards(folder)
    except CheckpointError:
        return {}
    for path in [*shards, *(folder / name for name in extra)]:
        try:
            read_header(path)
        except CheckpointError as error:
            if error.message != first:
                report.problems.append(error.message)
    return {}


def _check_tensors(
    report: CheckReport,
    files: ModelFiles,
    model_config: ModelConfig,
    checkpoint_format: Format,
    found: Mapping[str, TensorInfo],
) -> None:
    slots = weight_plan(model_config)
    report.problems += find_problems(slots, checkpoint_format, found)
    report.file_bytes = sum(info.nbytes for info in found.values())
    sizes = {part.name: part.out_features * max(1, part.in_features) for s in slots for part in s.parts}
    report.num_parameters = sum(sizes.values())
    default = checkpoint_format.default_spec
    if default is None:
        return
    for slot in slots:
        for part in slot.parts:
            dense = part_format(slot, part, checkpoint_format).spec(part.name) is None
            if slot.kind == "linear" and dense and part.name not in (EMBEDDING, LM_HEAD):
                reason = checkpoint_format.expressible(part.out_features, part.in_features, default)
                report.notes.append(f"{part.name} is dense ({reason or 'the checkpoint excludes it'})")


def _check_memory(
    report: CheckReport,
    files: ModelFiles,
    config: EngineConfig,
    model_config: ModelConfig,
    checkpoint: tuple[Format, Mapping[str, TensorInfo]],
) -> None:
    try:
        target = resolve_target(config, *checkpoint)
        report.max_model_len = resolve_max_model_len(config, files.max_model_len())
        report.device, report.dtype = target.device, str(target.dtype).removeprefix("torch.")
        if report.problems:
            return
        estimate = estimate_weights(weight_plan(model_config), *checkpoint, target)
        report.weight_bytes, report.kernels = estimate.weight_bytes, estimate.lines()
        refusal = tape_refusal(
            [layer.kernel for layer in estimate.layers], config.block_size, model_config.head_dim
        )
        specs = model_config.kv_specs(kv_cache_dtype(target, compiled=refusal is None))
        report.kv_bytes_per_token = sum(spec.bytes_per_token for spec in specs)
        report.kv_bytes_one_request = request_bytes(specs, config.block_size, report.max_model_len)
        report.kv_bytes_all_requests = report.kv_bytes_one_request * config.max_num_seqs
        report.free_bytes = free_memory(target)
        if config.memory_bytes is not None:
            report.free_bytes = min(report.free_bytes, config.memory_bytes)
        rest = check_weights_fit(report.weight_bytes, report.free_bytes)
        report.kv_bytes_granted = plan_kv_cache(specs, config, report.max_model_len, rest).bytes
    except ConfigError as error:
        report.problems.append(error.message)


def free_memory(target: Target) -> int:
    """Bytes free where the model will live."""
    if target.is_cpu:
        return available_memory()
    return int(torch.cuda.mem_get_info(target.device)[0])


def check_weights_fit(weight_bytes: int, free_bytes: int) -> int:
    """What is left of ``free_bytes`` after the weights. ConfigError if they do not fit."""
    if weight_bytes > free_bytes:
        raise ConfigError(
            f"the weights need {gib(weight_bytes)}, but {gib(free_bytes)} are free; free memory, raise the "
            "limit, or take a smaller or more quantized model"
        )
    return free_bytes - weight_bytes


def estimate_weights(
    slots: list[Slot], checkpoint_format: Format, found: Mapping[str, TensorInfo], target: Target
) -> LoadReport:
    """What a load would report, from the headers of a checkpoint that fits its plan.

    A kernel's own repack of a few zero rows tells how many bytes it takes. Values are unknown, so a weight
    too large for fp16 or a trivial ``g_idx`` is found out only by loading, and residuals count as stored.
    """
    total = sum(info.nbytes for name, info in found.items() if is_extra(name))
    layers: list[LayerKernel] = []
    sizes: dict[tuple[object, ...], int] = {}
    for slot in slots:
        if slot.kind != "linear":
            info = found[f"{slot.parts[0].name}.weight"]
            as_stored = slot.kind == "embedding" and target.is_cpu
            total += info.nbytes if as_stored else _numel(info) * target.activation_dtype.itemsize
            continue
        for out, in_, spec, dtype in _fused(slot, checkpoint_format, found):
            has_g_idx = spec is not None and spec.actorder == "group"
            plain = spec is not None and (spec.num_bits, spec.symmetric, has_g_idx) == (4, True, False)
            floats = checkpoint_format.default_spec is None
            is_24 = (plain or floats) and says_24(slot, checkpoint_format)
            traits = WeightTraits(out, in_, spec, dtype, 0.0, has_g_idx, is_24)
            choice = choose("linear", target, weight=traits)
            key = (choice.name, out, in_, spec, dtype)
            if key not in sizes:
                sizes[key] = _packed_bytes(choice, target, out, in_, spec, dtype)
            total += sizes[key]
            layers.append(LayerKernel(slot.name, choice.name, choice.refused, spec, out * in_))
    return LoadReport(tuple(layers), total)


def _fused(
    slot: Slot, checkpoint_format: Format, found: Mapping[str, TensorInfo]
) -> list[tuple[int, int, QuantSpec | None, torch.dtype]]:
    """(out, in, spec, dtype of values) of the slot's parts, neighbours of one form taken together."""
    forms: list[tuple[int, int, QuantSpec | None, torch.dtype]] = []
    for part in slot.parts:
        spec = part_format(slot, part, checkpoint_format).spec(part.name)
        dtype = torch.uint8 if spec is not None else _float_dtype(slot, part, checkpoint_format, found)
        if forms and forms[-1][1:] == (part.in_features, spec, dtype):
            forms[-1] = (forms[-1][0] + part.out_features, *forms[-1][1:])
        else:
            forms.append((part.out_features, part.in_features, spec, dtype))
    return forms


def _float_dtype(
    slot: Slot, part: Part, checkpoint_format: Format, found: Mapping[str, TensorInfo]
) -> torch.dtype:
    """Of the values: the largest tensor of the module."""
    stored = [found[name] for name in part_tensors(slot, part, checkpoint_format) if name in found]
    return _DTYPES[max(stored, key=lambda info: info.nbytes).dtype]


def _packed_bytes(
    choice: Choice, target: Target, out: int, in_: int, spec: QuantSpec | None, dtype: torch.dtype
) -> int:
    """Bytes of the kernel's layout: measured for few rows, else continued in a straight line."""

    def measured(rows: int) -> int:
        return int(choice.implementation.repack(_zero_weight(rows, in_, spec, dtype), target).nbytes)

    if out <= 2 * _SAMPLE_ROWS:
        return measured(out)
    small, large = measured(_SAMPLE_ROWS), measured(2 * _SAMPLE_ROWS)
    return small + (large - small) * (out - _SAMPLE_ROWS) // _SAMPLE_ROWS


def _zero_weight(rows: int, in_: int, spec: QuantSpec | None, dtype: torch.dtype) -> PackedWeight:
    if spec is None:
        return PackedWeight(torch.zeros(rows, in_, dtype=dtype))
    values = torch.full((rows, in_), 2 ** (spec.num_bits - 1), dtype=dtype)
    scales = torch.zeros(rows, spec.num_groups(in_), dtype=torch.float16)
    zeros = None if spec.symmetric else torch.zeros_like(scales, dtype=torch.uint8)
    plain = PackedWeight(values, spec, scales, zeros)
    if spec.actorder == "none":
        return plain
    return replace(plain, g_idx=plain.group_of_inputs().flip(0).to(torch.int32))


def _numel(info: TensorInfo) -> int:
    return info.nbytes // _DTYPES[info.dtype].itemsize
