"""One quantization, from a folder to a folder: which modules, provenance, the other files, the summary."""

import math
import re
import resource
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import __version__
from ...kernels.dispatch import Ops
from ...kernels.layout import PackedWeight, QuantSpec
from ..documents import Encoder, read_documents
from ..errors import ConfigError
from ..formats.base import Format
from ..formats.overlay import FILE, is_extra
from ..formats.safetensors_files import SafetensorsFiles
from ..hardware import available_memory
from ..model.plan import LM_HEAD
from ..model_files import PROVENANCE, resolve_model
from ..quality_page import page
from ..tokenizer import Tokenizer
from .calibrate import Calibration, load_calibration
from .head import describe_head, head_spec, quantize_head, with_head
from .methods import get_method
from .options import QuantizeOptions
from .pipeline import Method
from .provenance import describe, provenance
from .report import Report, main_figures, measure, read_held_out, verdict, with_modules
from .results import QuantizedModule, Stage
from .scratch import Scratch
from .source import TARGET, Source
from .storage import describe_groups, describe_zeros, general_spec, refuse_unlike, refused_shape, storage_for
from .work import Log, Progress, Work
from .writer import CheckpointWriter, refuse_existing

_WEIGHT_FILES = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|onnx|h5|msgpack)(\.index\.json)?", re.IGNORECASE
)
_REWRITTEN = ("config.json", "quantize_config.json", "quality.json", "quality.html")
LEAST_TOKENS = 64  # of calibration text


@dataclass(slots=True)
class Tally:
    """What became of the modules. dense: module -> why it stays so; done: tensors of the original."""

    dense: dict[str, str]
    done: set[str] = field(default_factory=set)
    modules: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    num_weights: int = 0
    num_bytes: int = 0

    def count(self, module: QuantizedModule, tensors: Iterable[Tensor]) -> None:
        """``tensors``: how the checkpoint stores it."""
        if module.weight is None:
            assert module.warning is not None
            self.dense[module.name] = module.warning
            return
        if module.warning is not None:
            self.warnings.append(f"{module.name}: {module.warning}")
        self.num_weights += module.weight.values.numel()
        self.num_bytes += sum(tensor.nbytes for tensor in tensors)
        self.modules.append(
            {
                "name": module.name,
                "weight_error": module.weight_error,
                "output_error": module.output_error,
                "damping": module.damping,
            }
        )


def quantize(
    options: QuantizeOptions, progress: Progress, log: Log, kept: Path | None = None
) -> dict[str, Any]:
    """Run it. Returns the summary, of JSON types only. kept: see Work.

    Errors: ConfigError and its children; then nothing new is at ``options.out``.
    """
    started = time.monotonic()
    method = get_method(options)
    out = Path(options.out).expanduser().absolute()
    refuse_existing(out, options.overwrite)
    folder = resolve_model(options.model, options.revision)  # perhaps a download
    if folder == out.resolve() or folder in out.resolve().parents or out.resolve() in folder.parents:
        raise ConfigError(f"OUT {out}: must be neither MODEL, nor inside it, nor around it; choose another")
    with Source(folder) as source:
        specs, dense = choose_modules(source, options)
        head = head_spec(source, options)
        log(describe_head(source, head))
        all_specs = [*specs.values(), *([] if head is None else [head])]
        longer = describe_groups(source.parts(), specs)
        for said in filter(None, (describe_zeros(options, all_specs), longer)):
            log(said)
        names = [name for module in (*specs, LM_HEAD) for name in _longest_names(module)]
        with CheckpointWriter(out, [*names, *source.files], options.overwrite) as writer:
            held = read_held_out(options, source) if options.report else None
            calibration = _calibration(options, method, source, log)
            _refuse_memory(method.peak_bytes(source.config, _tokens(calibration)))
            with Scratch(out, options, folder, log, source.config.num_layers) as scratch:
                ops = Ops.resolve(TARGET)
                work = Work(source, specs, calibration, scratch.folder, progress, log, ops, kept)
                stage = method.run(work)
                settings = _settings(method, calibration)
                meta = _provenance(options, settings, calibration)
                storage = with_head(storage_for(options, stage, dense, meta), head)
                tally = _write(stage, work, writer, storage, dense)
                tally.warnings += filter(None, (longer,))
                if head is not None:
                    _add(quantize_head(source, head, options.mse), work, writer, storage, tally)
                _add_rest(source.files, writer, tally.done)
                origin = provenance(options, settings, calibration, source)
                _copy_files(source, writer, storage, origin)
                made = writer.finish()
                summary = {"out": str(out), "seconds": time.monotonic() - started}
                summary |= _summary(source, writer, tally, meta)
                if held is not None:
                    report = _report(measure(options, work, stage, held, made), summary, started, origin)
                    if options.max_nll_increase is not None:
                        report["gate"] = summary["gate"] = verdict(report, options.max_nll_increase)
                    _add_report(report, source, writer, storage, origin)
                    summary["report"] = {key: value for key, value in report.items() if key != "modules"}
                writer.commit()
        summary["peak_rss_bytes"] = _peak_rss_bytes()
        return summary


def choose_modules(source: Source, options: QuantizeOptions) -> tuple[dict[str, QuantSpec], dict[str, str]]:
    """Modules to quantize, and those that stay dense with the reason: the shape, which the format cannot
    express, or ``options.dynamic``."""
    specs: dict[str, QuantSpec] = {}
    dense: dict[str, str] = {}
    for _, part in source.parts():
        spec = _override(part.name, options)
        if spec is None:
            dense[part.name] = "left out by --dynamic"
        elif reason := refused_shape(part.out_features, part.in_features, spec, options):
            dense[part.name] = reason
        else:
            specs[part.name] = spec
    _refuse_unmatched(options, [*specs, *dense])
    refuse_unlike(options, specs)
    if not specs:
        name, reason = next(iter(dense.items()))
        raise ConfigError(f"MODEL {source.model.folder}: no module can be quantized ({name}: {reason})")
    return specs, dense


def _override(module: str, options: QuantizeOptions) -> QuantSpec | None:
    """How ``module`` is to be quantized: the first pattern of ``options.dynamic`` that matches decides."""
    for pattern, override in (options.dynamic or {}).items():
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), module):
            if pattern.startswith("-:"):
                return None
            named = {"bits": "num_bits"}
            return replace(
                general_spec(options), **{named.get(key, key): value for key, value in override.items()}
            )
    return general_spec(options)


def _refuse_unmatched(options: QuantizeOptions, modules: list[str]) -> None:
    """ConfigError for a pattern that no module begins with: a slip, or another model's."""
    for pattern in options.dynamic or {}:
        left_out = pattern.startswith("-:")  # as the head is, unless --lm-head-bits says otherwise
        names = [*modules, LM_HEAD] if left_out else modules
        if not any(re.match(pattern.removeprefix("-:").removeprefix("+:"), name) for name in names):
            raise ConfigError(
                f"--dynamic {pattern[:100]!r}: matches no module; names begin as {modules[0]} does "
                "(begin the pattern with .* to find it anywhere)"
            )


def _longest_names(module: str) -> list[str]:
    return [f"{module}.{suffix}" for suffix in ("weight_of_any_kind", "zeros_of_any_kind", "scales", "g_idx")]


def _calibration(options: QuantizeOptions, method: Method, source: Source, log: Log) -> Calibration | None:
    if not method.statistics:
        if options.calibration is not None:
            read_documents(options.calibration, "--calibration")
            log(f"{options.method} gathers no statistics: the calibration text has no effect")
        return None
    encoder = Encoder(source.model.folder, Tokenizer.from_folder(source.model.folder))
    seq_len = min(options.seq_len, source.model.max_model_len())
    found = load_calibration(options.calibration, encoder, options.num_samples, seq_len, options.seed)
    highest = max(map(max, found.sequences))
    if highest >= source.config.vocab_size:
        raise ConfigError(
            f"MODEL {source.model.folder}: its tokenizer gives id {highest}, but the vocabulary has "
            f"{source.config.vocab_size}; the tokenizer belongs to another model"
        )
    if found.num_tokens < LEAST_TOKENS:
        raise ConfigError(
            f"--calibration {found.name}: {found.num_tokens} tokens are too few to tell inputs apart; give "
            f"{LEAST_TOKENS} at the least (some thousand are usual), or use --method rtn"
        )
    log(f"calibration: {len(found.sequences)} sequences, {found.num_tokens} tokens of {found.name}")
    if found.num_tokens < 4 * source.config.hidden_size:
        log("few tokens for so wide a model: more text (--calibration, --num-samples) would be better")
    return found


def _tokens(calibration: Calibration | None) -> int:
    return 0 if calibration is None else calibration.num_tokens


def _refuse_memory(needed: int) -> None:
    free = available_memory()
    if needed > free:
        raise ConfigError(
            f"--num-samples: quantizing needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "lower --num-samples or --seq-len, or use --method rtn"
        )


def _write(
    stage: Stage, work: Work, writer: CheckpointWriter, storage: Format, dense: dict[str, str]
) -> "Tally":
    """What is quantized, or changed to that end; one block in memory."""
    tally = Tally(dense)
    for block in stage:
        for module in block.modules:
            _add(module, work, writer, storage, tally)
        for name, tensor in block.dense.items():
            writer.add(name, tensor.to(work.source.files.get(name).dtype))
            tally.done.add(name)
        work.source.files.close()  # mapped pages that were read count as this process's memory
    return tally


def _add(
    module: QuantizedModule, work: Work, writer: CheckpointWriter, storage: Format, tally: Tally
) -> None:
    tensors: dict[str, Tensor] = {}
    if module.weight is not None:
        dtype = work.source.files.get(f"{module.name}.weight").dtype
        tensors = _stored(storage, module.name, module.weight, dtype)
    for name, tensor in tensors.items():
        writer.add(name, tensor, FILE if is_extra(name) else None)
    if tensors:
        tally.done.add(f"{module.name}.weight")
    tally.count(module, tensors.values())


def _add_rest(files: SafetensorsFiles, writer: CheckpointWriter, done: set[str]) -> None:
    """Everything else, as it is stored."""
    for name in files:
        if name not in done:
            writer.add(name, files.get(name))


def _stored(storage: Format, name: str, weight: PackedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """dtype: of the original, which weights that are only pruned keep."""
    if weight.spec is None:
        weight = PackedWeight(weight.values.to(dtype))
    try:
        return storage.write(name, weight)
    except ValueError as error:
        raise ConfigError(f"--checkpoint-format: {error}") from error


def _copy_files(source: Source, writer: CheckpointWriter, storage: Format, origin: dict[str, Any]) -> None:
    for path in sorted(source.model.folder.iterdir()):
        if path.is_file() and path.name not in _REWRITTEN and not _WEIGHT_FILES.fullmatch(path.name):
            writer.add_file(path)
    entries = storage.config_entries()
    writer.add_json("config.json", source.model.config | entries | {PROVENANCE: origin})
    if "quantization_config" in entries:
        writer.add_json("quantize_config.json", entries["quantization_config"])


def _report(measured: Report, summary: dict[str, Any], started: float, origin: dict[str, Any]) -> Report:
    """With the modules' own figures, how they were made, and what it took. seconds: up to the measurement."""
    run = {
        "nybble": __version__,
        **{key: origin[key] for key in ("method", "options", "calibration")},
        "seconds": summary["seconds"],
        "report_seconds": time.monotonic() - started - summary["seconds"],
        "peak_rss_bytes": _peak_rss_bytes(),
    }
    return with_modules(measured, summary["modules"]) | {"run": run}


def _add_report(
    report: Report, source: Source, writer: CheckpointWriter, storage: Format, origin: dict[str, Any]
) -> None:
    origin = origin | {"quality": main_figures(report), "gate": report.get("gate")}
    writer.add_json("config.json", source.model.config | storage.config_entries() | {PROVENANCE: origin})
    writer.add_json("quality.json", report)
    writer.add_text("quality.html", page(report))


def _settings(method: Method, calibration: Calibration | None) -> dict[str, Any]:
    """The method's, as they came to be: no more sequences are differentiated than there are."""
    found: dict[str, Any] = dict(method.settings())
    for key in ("pqi_samples", "gradient_samples"):
        if key in found and calibration is not None:
            found[key] = min(found[key], len(calibration.sequences))
    return found


def _provenance(
    options: QuantizeOptions, settings: dict[str, Any], calibration: Calibration | None
) -> dict[str, Any]:
    meta: dict[str, Any] = {"quantizer": [f"nybble:{__version__}"], "method": options.method}
    meta |= settings
    if calibration is not None:
        meta["calibration"] = describe(calibration) | {"seed": options.seed}
    return meta


def _summary(source: Source, writer: CheckpointWriter, tally: Tally, meta: dict[str, Any]) -> dict[str, Any]:
    infos = source.files.tensors.values()
    num_params = sum(math.prod(info.shape) for info in infos)
    return {
        "meta": meta,
        "modules": tally.modules,
        "dense": tally.dense,
        "warnings": tally.warnings,
        "bytes_before": sum(info.nbytes for info in infos),
        "bytes_after": writer.nbytes,
        "bits_per_weight": writer.nbytes * 8 / num_params,
        "bits_per_quantized_weight": tally.num_bytes * 8 / tally.num_weights if tally.num_weights else None,
    }


def _peak_rss_bytes() -> int:
    """Of this process, from its start."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
