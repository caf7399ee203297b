"""Residuals of single weights on top of any quantized format: ReQuant's, GWQ's and other outliers.

Beside the tensors of the base format a module NAME with N outputs and E residuals has, in a file of its own,
  NAME.sparse_rowptr  int32 [N + 1]: the entries of output n are rowptr[n] to rowptr[n + 1]
  NAME.sparse_cols    uint16 stored as int16, or int32 where K > 65536, [E]: inputs, ascending within a row
  NAME.sparse_vals    fp16 or bf16 [E]: what is *added* to the base's weight there
  NAME.sparse_kind    uint8 [E], optional, for people: 0 an outlier, 1 significant; not read
and config.json a block "requant": {"version": 1, "values": "residual", "modules": {NAME: E, ...}} with the
quantizer's settings beside. The file is not in the index of the shards and the block is no
quantization_config, so that a reader which knows neither loads the base model. The schema is ours: the paper
(arXiv 2503.01901) publishes none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.layout import PackedWeight, QuantSpec, SparseOverlay
from ..errors import CheckpointError, UnsupportedModelError
from .base import Expected, Format

FILE = "requant.safetensors"
KEY = "requant"
_PREFIX = "sparse_"
_OURS = ("version", "values", "modules")


@dataclass(frozen=True)
class OverlayFormat:
    """``base`` plus residuals. entries: module -> how many; settings: what else the block says."""

    base: Format
    entries: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    extra_files = (FILE,)

    @classmethod
    def over(cls, base: Format, block: object) -> "OverlayFormat":
        """From the block of config.json. CheckpointError, UnsupportedModelError."""
        if not isinstance(block, dict):
            raise CheckpointError(f"config.json: {KEY}: expected an object, found {_short(block)}")
        if block.get("version") != 1 or block.get("values") != "residual":
            raise UnsupportedModelError(
                f"config.json: {KEY}: expected version 1 and values 'residual', found version "
                f"{_short(block.get('version'))} and values {_short(block.get('values'))}; use a newer nybble"
            )
        if base.default_spec is None:
            raise CheckpointError(f"config.json: {KEY}: residuals need a quantization_config to be added to")
        entries = block.get("modules")
        counts = entries.values() if isinstance(entries, dict) else ()
        if not isinstance(entries, dict) or not all(type(n) is int and 0 <= n < 1 << 31 for n in counts):
            raise CheckpointError(f"config.json: {KEY}: modules must map names to numbers of residuals")
        for module in entries:
            if base.spec(module) is None:
                raise CheckpointError(
                    f"config.json: {KEY}: modules names {module[:200]!r}, which is not quantized"
                )
        return cls(base, entries, {key: value for key, value in block.items() if key not in _OURS})

    @property
    def quant_method(self) -> str:
        """The base's."""
        return self.base.quant_method

    @property
    def default_spec(self) -> QuantSpec | None:
        """The base's."""
        return self.base.default_spec

    @property
    def sparsity(self) -> str | None:
        """The base's."""
        return self.base.sparsity

    def spec(self, module: str) -> QuantSpec | None:
        """The base's."""
        return self.base.spec(module)

    def expressible(self, out: int, in_: int, spec: QuantSpec) -> str | None:
        """The base's."""
        return self.base.expressible(out, in_, spec)

    def tensors(self, module: str, out: int, in_: int, bias: bool) -> dict[str, Expected]:
        """The base's, and the residuals of a module that has some."""
        found = dict(self.base.tensors(module, out, in_, bias))
        count = self.entries.get(module)
        if count is not None:
            cols = ("I16", "U16") if in_ <= 1 << 16 else ("I32",)
            found[f"{module}.{_PREFIX}rowptr"] = Expected(("I32",), (out + 1,))
            found[f"{module}.{_PREFIX}cols"] = Expected(cols, (count,))
            found[f"{module}.{_PREFIX}vals"] = Expected(("F16", "BF16"), (count,))
            found[f"{module}.{_PREFIX}kind"] = Expected(("U8",), (count,), required=False)
        return found

    def read(self, tensors: Mapping[str, Tensor], module: str) -> PackedWeight:
        """The base's weight with its residuals, if there are any."""
        weight = self.base.read(tensors, module)
        if module not in self.entries:
            return weight
        rowptr, cols, values = (tensors[f"{module}.{_PREFIX}{name}"] for name in ("rowptr", "cols", "vals"))
        if cols.dtype == torch.int16:
            cols = cols.view(torch.uint16)
        _check(module, rowptr, cols.long(), weight.in_features)
        halves = values.to(torch.float16)
        if not bool(torch.isfinite(halves).all()):
            raise CheckpointError(
                f"{module}.{_PREFIX}vals: residuals up to {float(values.abs().max()):g} overflow fp16"
            )
        if not len(cols):
            return weight  # some kernels take no overlay, not even an empty one
        return replace(weight, outliers=SparseOverlay(rowptr, cols, halves))

    def write(self, module: str, weight: PackedWeight) -> dict[str, Tensor]:
        """The base's tensors and, where ``weight`` has residuals, theirs (``is_extra``)."""
        found = self.base.write(module, replace(weight, outliers=None))
        if weight.outliers is not None:
            cols = weight.outliers.cols
            if weight.in_features <= 1 << 16:
                cols = cols.to(torch.int32).to(torch.uint16).view(torch.int16)
            found[f"{module}.{_PREFIX}rowptr"] = weight.outliers.rowptr
            found[f"{module}.{_PREFIX}cols"] = cols
            found[f"{module}.{_PREFIX}vals"] = weight.outliers.values
        return found

    def config_entries(self) -> dict[str, Any]:
        """The base's, and the block."""
        ours = {"version": 1, "values": "residual", **self.settings, "modules": dict(self.entries)}
        return self.base.config_entries() | {KEY: ours}


def is_extra(tensor: str) -> bool:
    """Whether a tensor's place is in FILE, not in the shards."""
    return tensor.rpartition(".")[2].startswith(_PREFIX)


def _check(module: str, rowptr: Tensor, cols: Tensor, in_features: int) -> None:
    counts = rowptr.diff()
    falls = (counts < 0).nonzero().flatten().tolist()
    if int(rowptr[0]) != 0 or int(rowptr[-1]) != len(cols) or falls:
        raise CheckpointError(
            f"{module}.{_PREFIX}rowptr: expected to ascend from 0 to {len(cols)}, found "
            f"{int(rowptr[0])} to {int(rowptr[-1])}" + (f", descending at output {falls[0]}" if falls else "")
        )
    if not len(cols):
        return
    if int(cols.min()) < 0 or int(cols.max()) >= in_features:
        raise CheckpointError(
            f"{module}.{_PREFIX}cols: inputs {int(cols.min())} to {int(cols.max())}, "
            f"but there are {in_features}"
        )
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts.long())
    wrong = (rows.diff() == 0) & (cols.diff() <= 0)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise CheckpointError(
            f"{module}.{_PREFIX}cols: expected to ascend within a row, found {int(cols[at])} before "
            f"{int(cols[at + 1])} in row {int(rows[at])}"
        )


def _short(value: object) -> str:
    return repr(value)[:100]
