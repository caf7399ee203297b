"""What one quantization works on: the model, the calibration, where results go, whom to tell."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ...kernels.dispatch import Ops
from .calibrate import Calibration
from .results import Specs, Stage
from .source import TARGET, Source

Log = Callable[[str], None]


class Progress(Protocol):
    """``done`` of ``total`` modules (or passes) in ``phase``; the decoder block at hand and what it lost."""

    def __call__(
        self, phase: str, done: int, total: int, layer: int | None = None, loss: float | None = None, /
    ) -> None:
        """Called often; raising ends the run."""


@dataclass(frozen=True, slots=True)
class Work:
    """specs: how each module is to be quantized; a method may decide otherwise (``with_specs``).

    calibration: None where the method gathers nothing. folder: scratch that outlives a killed process when
    the run is resumable: one ``Stage`` per pass, and whatever else a method caches under its own name. kept:
    where what depends on the original and the calibration alone is kept, None: in folder.
    """

    source: Source
    specs: Specs
    calibration: Calibration | None
    folder: Path
    progress: Progress
    log: Log
    ops: Ops
    kept: Path | None = None

    @staticmethod
    def on(source: Source, specs: Specs, calibration: Calibration | None, folder: Path) -> "Work":
        """Without anyone to tell."""
        return Work(source, specs, calibration, folder, lambda *_: None, lambda _: None, Ops.resolve(TARGET))

    def with_specs(self, specs: Specs) -> "Work":
        """The same with modules quantized otherwise."""
        return replace(self, specs=specs)

    def stage(self, name: str) -> Stage:
        """The pass ``name``, with the blocks of it that are finished."""
        return Stage(self.folder / name)

    @property
    def num_weights(self) -> int:
        """Weights of all modules in ``specs``."""
        return sum(
            math.prod((part.out_features, part.in_features))
            for _, part in self.source.parts()
            if part.name in self.specs
        )
