"""One quantization, from a folder to a folder: which modules, provenance, the other files, the summary."""

import math
import re
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ... import __version__
from ...kernels.layout import QuantSpec
from ..documents import read_text
from ..errors import ConfigError
from ..formats.gptq import GPTQFormat
from ..hardware import available_memory
from ..model_files import resolve_model
from ..tokenizer import Tokenizer
from .calibrate import Calibration, load_calibration
from .methods import get_method
from .options import QuantizeOptions
from .pipeline import Method, QuantizedModule
from .source import Source
from .writer import CheckpointWriter

Progress = Callable[[str, int, int], None]
Log = Callable[[str], None]

_WEIGHT_FILES = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|onnx|h5|msgpack)(\.index\.json)?", re.IGNORECASE
)
_REWRITTEN = ("config.json", "quantize_config.json")


@dataclass(slots=True)
class Tally:
    """What became of the modules. dense: module -> why it stays dense."""

    dense: dict[str, str]
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


def quantize(options: QuantizeOptions, progress: Progress, log: Log) -> dict[str, Any]:
    """Run it. ``progress(phase, done, total)``. Returns the summary, of JSON types only.

    Errors: ConfigError and its children; then nothing new is at ``options.out``.
    """
    started = time.monotonic()
    method = get_method(options)
    folder, out = resolve_model(options.model, options.revision), Path(options.out).expanduser().absolute()
    if folder == out.resolve() or folder in out.resolve().parents or out.resolve() in folder.parents:
        raise ConfigError(f"OUT {out}: must be neither MODEL, nor inside it, nor around it; choose another")
    storage = GPTQFormat(options.spec, options.storage)
    with Source(folder) as source:
        specs, dense = choose_modules(source, storage, options.spec)
        names = [name for module in specs for name in _longest_names(module)]
        with CheckpointWriter(out, [*names, *source.files], options.overwrite) as writer:
            calibration = _calibration(options, method, source, log)
            _refuse_memory(method.peak_bytes(source.config, _tokens(calibration)))
            tally = Tally(dense)
            progress("quantize", 0, len(specs))
            for done, module in enumerate(method.run(source, calibration, specs), 1):
                tensors = _stored(storage, module)
                for name, tensor in tensors.items():
                    writer.add(name, tensor)
                tally.count(module, tensors.values())
                progress("quantize", done, len(specs))
            _copy_dense(source, writer, {name for name in specs if name not in tally.dense})
            meta = _provenance(options, method, calibration)
            _copy_files(source, writer, _final(storage, tally.dense, meta))
            writer.commit()
        return {"out": str(out), "seconds": time.monotonic() - started} | _summary(
            source, writer, tally, meta
        )


def choose_modules(
    source: Source, storage: GPTQFormat, spec: QuantSpec
) -> tuple[dict[str, QuantSpec], dict[str, str]]:
    """Modules to quantize, and those whose shape the format cannot express with the reason."""
    specs: dict[str, QuantSpec] = {}
    dense: dict[str, str] = {}
    for _, part in source.parts():
        reason = storage.expressible(part.out_features, part.in_features, spec)
        if reason is None:
            specs[part.name] = spec
        else:
            dense[part.name] = reason
    if not specs:
        name, reason = next(iter(dense.items()))
        raise ConfigError(f"MODEL {source.model.folder}: no module can be quantized ({name}: {reason})")
    return specs, dense


def _longest_names(module: str) -> list[str]:
    return [f"{module}.{suffix}" for suffix in ("weight_of_any_kind", "zeros_of_any_kind", "scales", "g_idx")]


def _calibration(options: QuantizeOptions, method: Method, source: Source, log: Log) -> Calibration | None:
    path = None if options.calibration is None else Path(options.calibration).expanduser()
    if not method.statistics:
        if path is not None:
            read_text(path, "--calibration")
            log(f"{options.method} gathers no statistics: the calibration text has no effect")
        return None
    tokenizer = Tokenizer.from_folder(source.model.folder)
    seq_len = min(options.seq_len, source.model.max_model_len())
    found = load_calibration(path, tokenizer, options.num_samples, seq_len, options.seed)
    highest = max(map(max, found.sequences))
    if highest >= source.config.vocab_size:
        raise ConfigError(
            f"MODEL {source.model.folder}: its tokenizer gives id {highest}, but the vocabulary has "
            f"{source.config.vocab_size}; the tokenizer belongs to another model"
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


def _stored(storage: GPTQFormat, module: QuantizedModule) -> dict[str, Tensor]:
    if module.weight is None:
        return {}
    try:
        return storage.write(module.name, module.weight)
    except ValueError as error:
        raise ConfigError(f"--checkpoint-format {storage.version}: {error}") from error


def _copy_dense(source: Source, writer: CheckpointWriter, quantized: set[str]) -> None:
    """Everything that was not quantized, biases too, as it is stored."""
    for name in source.files:
        module, _, kind = name.rpartition(".")
        if module not in quantized or kind != "weight":
            writer.add(name, source.files.get(name))


def _final(storage: GPTQFormat, dense: dict[str, str], meta: dict[str, Any]) -> GPTQFormat:
    return replace(storage, dynamic={f"-:{re.escape(name)}$": {} for name in dense}, meta=meta)


def _copy_files(source: Source, writer: CheckpointWriter, storage: GPTQFormat) -> None:
    folder, block = source.model.folder, storage.config_block()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in _REWRITTEN and not _WEIGHT_FILES.fullmatch(path.name):
            writer.add_file(path)
    writer.add_json("config.json", source.model.config | {"quantization_config": block})
    writer.add_json("quantize_config.json", block)


def _provenance(options: QuantizeOptions, method: Method, calibration: Calibration | None) -> dict[str, Any]:
    meta: dict[str, Any] = {"quantizer": [f"nybble:{__version__}"], "method": options.method}
    meta |= method.settings()
    if calibration is not None:
        meta["calibration"] = {
            "name": calibration.name,
            "sha256": calibration.sha256,
            "sequences": len(calibration.sequences),
            "tokens": calibration.num_tokens,
            "seed": options.seed,
        }
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
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
