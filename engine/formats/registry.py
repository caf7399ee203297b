"""The formats by quant method. A new one is a file and a line here."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, cast

from ..errors import CheckpointError, UnsupportedModelError
from ..model_files import ModelFiles
from .base import ConfiguredFormat, Format
from .overlay import FILE, KEY, OverlayFormat
from .safetensors_files import SafetensorsFiles

FORMATS: dict[str, str] = {
    "none": ".dense:DenseFormat",
    "gptq": ".gptq:GPTQFormat",
    "awq": ".awq:AWQFormat",
    "compressed-tensors": ".compressed_tensors:CompressedTensorsFormat",
}


def format_class(quant_method: str) -> type[ConfiguredFormat]:
    """The format of ``quant_method``. UnsupportedModelError names those there are."""
    where = FORMATS.get(quant_method)
    if where is None:
        known = ", ".join(name for name in FORMATS if name != "none")
        raise UnsupportedModelError(
            f"quant_method {quant_method!r} is not supported (supported: {known}, and unquantized); "
            "take another checkpoint of this model, or quantize the original with nybble quantize"
        )
    module, name = where.split(":")
    return cast(type[ConfiguredFormat], getattr(import_module(module, __package__), name))


def get_format(quantize_config: Mapping[str, Any] | None) -> Format:
    """The format that a checkpoint's quantization_config states; None or {}: dense.

    Old AutoGPTQ files name no method; a block with ``bits`` and ``group_size`` is theirs.
    """
    if not quantize_config:
        return format_class("none").from_config(None)
    method = quantize_config.get("quant_method") or quantize_config.get("method")
    if method is None and "bits" in quantize_config:
        method = "gptq"
    return format_class(str(method)).from_config(quantize_config)


def format_of(files: ModelFiles) -> Format:
    """The format of a model's folder: what its quantization config states, and an overlay's over it."""
    base = get_format(files.quantize_config)
    block = files.config.get(KEY)
    if block is not None:
        return OverlayFormat.over(base, block)
    if (files.folder / FILE).exists():
        raise CheckpointError(
            f"{files.folder}: {FILE} holds residuals, but config.json has no {KEY!r} block; restore it, or "
            f"delete {FILE} to take the model without them"
        )
    return base


def open_tensors(files: ModelFiles, checkpoint_format: Format) -> SafetensorsFiles:
    """The tensors of a model's folder, those outside the shards among them."""
    return SafetensorsFiles(files.folder, checkpoint_format.extra_files)
