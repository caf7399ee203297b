"""What a checkpoint format is: how it stores one module. ``registry.FORMATS`` names them all."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ...kernels.layout import PackedWeight, QuantSpec

FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Expected:
    """What a tensor must be: one of ``dtypes`` (safetensors' names) and exactly ``shape``."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    required: bool = True

    def __str__(self) -> str:
        return f"{'/'.join(self.dtypes)} {list(self.shape)}"


class Format(Protocol):
    """Reads and writes one module at a time; the checkpoint's dialect stays inside.

    ``out`` and ``in_`` are the module's features. Module and tensor names are the checkpoint's.
    """

    @property
    def quant_method(self) -> str:
        """The key in ``registry.FORMATS``."""

    @property
    def default_spec(self) -> QuantSpec | None:
        """What most modules have; None: dense."""

    @property
    def extra_files(self) -> tuple[str, ...]:
        """Files with tensors of its modules that the index of the shards does not list."""

    @property
    def sparsity(self) -> str | None:
        """What the checkpoint says of zeros, "2:4" or None; the loader verifies every four inputs."""

    def spec(self, module: str) -> QuantSpec | None:
        """How ``module`` is quantized; None: stored dense."""

    def expressible(self, out: int, in_: int, spec: QuantSpec) -> str | None:
        """Why a module of this shape cannot be stored with ``spec``, or None."""

    def tensors(self, module: str, out: int, in_: int, bias: bool) -> dict[str, Expected]:
        """The tensors of ``module``: name -> what it must be. CheckpointError for a shape it cannot hold."""

    def read(self, tensors: Mapping[str, Tensor], module: str) -> PackedWeight:
        """The module from its tensors, which agree with ``tensors()``; absent optional ones are left out."""

    def write(self, module: str, weight: PackedWeight) -> dict[str, Tensor]:
        """The module's tensors. ValueError if the format or its configuration cannot express ``weight``."""

    def config_entries(self) -> dict[str, Any]:
        """What config.json has to say about it, by key; {}: nothing."""


class ConfiguredFormat(Format, Protocol):
    """A format that a quantization_config describes."""

    @classmethod
    def from_config(cls, quantize_config: Mapping[str, Any] | None) -> "ConfiguredFormat":
        """From the checkpoint's quantization_config. UnsupportedModelError, CheckpointError."""
