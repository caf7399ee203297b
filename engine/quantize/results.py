"""What quantizing gives: modules and blocks of them, kept on disk until the checkpoint is written.

A ``Stage`` is one pass over the model: a file per decoder block, complete or not there at all. So a run can
go on where another ended, several rounds can read each other, and no more than a block is in memory.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...kernels.layout import PackedWeight, QuantSpec, SparseOverlay
from ..errors import ConfigError

Specs = Mapping[str, QuantSpec]  # by module name; modules that are not in it stay dense
_PARTS = ("values", "scales", "zeros", "g_idx")
_OVERLAY = ("rowptr", "cols", "values")


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


@dataclass(frozen=True, slots=True)
class Rescale:
    """A change that leaves the block's function as it is: outputs divided, and whoever reads them multiplied.

    producer: a norm's or a linear slot's name; rows: which of its outputs, from ``first_row`` on, are divided
    by ``divisors`` [n]. consumer: a linear slot's name; its inputs are multiplied by ``factors`` [in].
    """

    producer: str
    first_row: int
    divisors: Tensor
    consumer: str
    factors: Tensor


@dataclass(frozen=True, slots=True)
class QuantizedBlock:
    """One decoder block. edits: applied, in order, before anything was rounded.

    dense: fp32 tensors of the checkpoint, by name, that the edits changed and that are not quantized.
    """

    index: int
    modules: tuple[QuantizedModule, ...]
    edits: tuple[Rescale, ...] = ()
    dense: Mapping[str, Tensor] = field(default_factory=dict)


class Stage:
    """The blocks of one pass, in ``folder``. Errors: ConfigError where it cannot be written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        """Blocks that are finished, from the first on."""
        done = 0
        while self._path(done).exists():
            done += 1
        return done

    def __iter__(self) -> Iterator[QuantizedBlock]:
        """All finished blocks, one in memory."""
        for index in range(len(self)):
            yield self.load(index)

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def save(self, block: QuantizedBlock) -> None:
        """Write a block; it is there as a whole or not at all."""
        tensors: dict[str, Tensor] = {f"dense.{name}": tensor for name, tensor in block.dense.items()}
        for number, edit in enumerate(block.edits):
            tensors |= {
                f"edit.{number}.divisors": edit.divisors,
                f"edit.{number}.factors": edit.factors.clone(),
            }
        for module in block.modules:
            tensors |= _tensors(module)
        described = {
            "modules": [_describe(m) for m in block.modules],
            "edits": [_edit(e) for e in block.edits],
        }
        path = self._path(block.index)
        partial = path.with_suffix(".partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, partial, {"block": json.dumps(described)})
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{self.folder}: cannot be written ({error}); free some space") from error

    def specs(self) -> dict[str, QuantSpec | None]:
        """How each finished module is quantized; None: stays dense. Reads headers only."""
        return {entry["name"]: _spec(entry) for entry in self._described()}

    def changed(self) -> list[str]:
        """Modules that have a new weight, rounded or only pruned."""
        return [entry["name"] for entry in self._described() if entry["has_weight"]]

    def residuals(self) -> dict[str, int]:
        """How many single weights each module has residuals for, where it has an overlay."""
        return {e["name"]: e["residuals"] for e in self._described() if e["residuals"] is not None}

    def _described(self) -> Iterator[dict[str, Any]]:
        for index in range(len(self)):
            with safe_open(self._path(index), "pt") as file:
                yield from _metadata(file)["modules"]

    def load(self, index: int) -> QuantizedBlock:
        """A finished block."""
        with safe_open(self._path(index), "pt") as file:
            described = _metadata(file)
            names = list(file.keys())
            dense = {n.removeprefix("dense."): file.get_tensor(n) for n in names if n.startswith("dense.")}
            edits = tuple(
                Rescale(
                    edit["producer"],
                    edit["first_row"],
                    file.get_tensor(f"edit.{number}.divisors"),
                    edit["consumer"],
                    file.get_tensor(f"edit.{number}.factors"),
                )
                for number, edit in enumerate(described["edits"])
            )
            modules = []
            for entry in described["modules"]:
                mine = f"module.{entry['name']}/"
                tensors = {n.removeprefix(mine): file.get_tensor(n) for n in names if n.startswith(mine)}
                modules.append(_module(entry, tensors))
        return QuantizedBlock(index, tuple(modules), edits, dense)


def _metadata(file: Any) -> dict[str, Any]:
    described: dict[str, Any] = json.loads(file.metadata()["block"])
    return described


def _edit(edit: Rescale) -> dict[str, Any]:
    return {"producer": edit.producer, "first_row": edit.first_row, "consumer": edit.consumer}


def _tensors(module: QuantizedModule) -> dict[str, Tensor]:
    weight = module.weight
    if weight is None:
        return {}
    assert weight.bias is None
    parts = {name: getattr(weight, name) for name in _PARTS}
    if weight.g_idx is not None:
        parts["g_idx"] = weight.g_idx.clone()  # modules of one slot share it, which the library refuses
    if weight.outliers is not None:
        parts |= {f"outliers.{name}": getattr(weight.outliers, name) for name in _OVERLAY}
    return {f"module.{module.name}/{name}": tensor for name, tensor in parts.items() if tensor is not None}


def _describe(module: QuantizedModule) -> dict[str, Any]:
    spec = None if module.weight is None else module.weight.spec
    outliers = None if module.weight is None else module.weight.outliers
    return {
        "name": module.name,
        "has_weight": module.weight is not None,
        "spec": None if spec is None else asdict(spec),
        "residuals": None if outliers is None else outliers.values.numel(),
        "weight_error": module.weight_error,
        "output_error": module.output_error,
        "damping": module.damping,
        "warning": module.warning,
    }


def _spec(described: Mapping[str, Any]) -> QuantSpec | None:
    return None if described["spec"] is None else QuantSpec(**described["spec"])


def _module(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QuantizedModule:
    weight = None
    if described["has_weight"]:
        overlay = [tensors.get(f"outliers.{name}") for name in _OVERLAY]
        outliers = None if overlay[0] is None else SparseOverlay(*(t for t in overlay if t is not None))
        scales, zeros, g_idx = (tensors.get(name) for name in _PARTS[1:])
        weight = PackedWeight(tensors["values"], _spec(described), scales, zeros, g_idx, outliers=outliers)
    return QuantizedModule(
        described["name"],
        weight,
        described["weight_error"],
        described["output_error"],
        described["damping"],
        described["warning"],
    )
