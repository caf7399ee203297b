"""Unquantized modules: ``NAME.weight`` [out, in] in fp32, fp16 or bf16, and ``NAME.bias`` [out]."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...kernels.layout import PackedWeight, QuantSpec
from .base import FLOATS, Expected


class DenseFormat:
    """Quant method "none"."""

    quant_method = "none"
    default_spec: QuantSpec | None = None
    extra_files = ()
    sparsity: str | None = None

    @classmethod
    def from_config(cls, quantize_config: Mapping[str, Any] | None) -> "DenseFormat":
        """There is nothing to read."""
        assert quantize_config is None
        return cls()

    def spec(self, module: str) -> QuantSpec | None:
        """Always dense."""
        return None

    def expressible(self, out: int, in_: int, spec: QuantSpec) -> str | None:
        """Never quantized."""
        return "dense checkpoints hold no quantized modules"

    def tensors(self, module: str, out: int, in_: int, bias: bool) -> dict[str, Expected]:
        """``weight`` [out, in] and, with ``bias``, ``bias`` [out]."""
        found = {f"{module}.weight": Expected(FLOATS, (out, in_))}
        if bias:
            found[f"{module}.bias"] = Expected(FLOATS, (out,))
        return found

    def read(self, tensors: Mapping[str, Tensor], module: str) -> PackedWeight:
        """As stored."""
        return PackedWeight(tensors[f"{module}.weight"], bias=tensors.get(f"{module}.bias"))

    def write(self, module: str, weight: PackedWeight) -> dict[str, Tensor]:
        """As held."""
        if weight.spec is not None:
            raise ValueError(f"{module}: a dense checkpoint cannot hold codes; dequantize it first")
        found = {f"{module}.weight": weight.values}
        if weight.bias is not None:
            found[f"{module}.bias"] = weight.bias
        return found

    def config_entries(self) -> dict[str, Any]:
        """Nothing is said."""
        return {}
