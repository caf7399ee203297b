"""YAQA's sketch B (arXiv 2505.22988): the Fisher information F of a weight [m, n] as H_O x H_I.

One pass over the calibration: with G = g^T x the gradient [m, n] of a whole sequence's loss, its tokens drawn
from the model itself, H_I = E[G^T G] / m and H_O = E[G G^T] / n: one step of power iteration from the
identity. The paper's budget is 65,536 sequences of 2,048 tokens; ours is the calibration, which shrinkage
makes up for.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError
from ..model.config import ModelConfig
from ..model.plan import Part, Slot, layer_plan
from .gradients import GradientModel, Sampled
from .store import Store
from .work import Work


class Sketches:
    """The factors of every module of a model, one file per decoder block in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, module: str) -> tuple[Tensor, Tensor]:
        """H_O [m, m] and H_I [n, n] of ``module``."""
        with safe_open(self._path(int(module.split(".")[2])), "pt") as file:
            return file.get_tensor(f"{module}/outputs"), file.get_tensor(f"{module}/inputs")

    def _path(self, layer: int) -> Path:
        return self._folder / f"sketch-{layer:05d}.safetensors"

    def gather(self, work: Work, seed: int) -> None:
        """Compute what is not there. ConfigError where the folder cannot be written."""
        config = work.source.config
        if all(self._path(layer).exists() for layer in range(config.num_layers)):
            return
        names = set(work.specs)
        with Store.for_bytes(work.folder, sketch_bytes(config, names)) as store:
            sums = _Sums((part for _, part in work.source.parts() if part.name in names), store)
            model = GradientModel(work)
            work.progress("sketch", 0, len(model.sequences))
            done = 0
            for portion, _ in model.run(sums.take, targets=Sampled(seed)):
                done += portion
                work.progress("sketch", done, len(model.sequences))
            for layer in range(config.num_layers):
                self._save(layer, sums.factors(layer, len(model.sequences)))

    def _save(self, layer: int, factors: dict[str, Tensor]) -> None:
        path = self._path(layer)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(factors, path.with_suffix(".partial"))
            os.replace(path.with_suffix(".partial"), path)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{self._folder}: cannot be written ({error}); free some space") from error


class _Sums:
    """Of G G^T [m, m] and G^T G [n, n] by module."""

    def __init__(self, parts: Iterable[Part], store: Store) -> None:
        self._parts = {part.name: part for part in parts}
        self._outputs = {n: store.zeros((p.out_features, p.out_features)) for n, p in self._parts.items()}
        self._inputs = {n: store.zeros((p.in_features, p.in_features)) for n, p in self._parts.items()}

    def take(self, slot: Slot, x: Tensor, g: Tensor, lengths: Sequence[int]) -> None:
        """See gradients.Take."""
        sizes = [part.out_features for part in slot.parts]
        for inputs, outputs in zip(torch.split(x, list(lengths)), torch.split(g, list(lengths)), strict=True):
            for part, gradient in zip(slot.parts, torch.split(outputs.T @ inputs, sizes), strict=True):
                if part.name in self._parts:
                    self._outputs[part.name].addmm_(gradient, gradient.T)
                    self._inputs[part.name].addmm_(gradient.T, gradient)

    def factors(self, layer: int, num_sequences: int) -> dict[str, Tensor]:
        """The means of one decoder block."""
        found: dict[str, Tensor] = {}
        for name, part in self._parts.items():
            if int(name.split(".")[2]) == layer:
                found[f"{name}/outputs"] = self._outputs[name] / (num_sequences * part.in_features)
                found[f"{name}/inputs"] = self._inputs[name] / (num_sequences * part.out_features)
        return found


def sketch_bytes(config: ModelConfig, names: Iterable[str] | None = None) -> int:
    """fp32 bytes of all factors, or of those of the modules ``names``."""
    wanted = None if names is None else set(names)
    parts = [
        part
        for layer in range(config.num_layers)
        for slot in layer_plan(config, layer)
        for part in slot.parts
        if slot.kind == "linear" and (wanted is None or part.name in wanted)
    ]
    return 4 * sum(part.out_features**2 + part.in_features**2 for part in parts)
