"""The compiled linears as candidates of the dispatch table. numba is imported when one of them is taken."""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from ..dispatch import PackedLinear, Target, WeightTraits
from ..layout import PackedWeight
from .amx_permission import amx_refusal

_FP16_MAX = 65504.0
_FP16_ROUNDING = 2.0**-11  # of a scale that is no subnormal of fp16
_AVX2 = frozenset({"avx2", "fma", "f16c"})
_VNNI = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_vnni"}) | _AVX2
_AMX = frozenset({"amx_tile", "amx_int8", "gfni"}) | _VNNI


def instruction_set(target: Target) -> str | None:
    """The best of "amx", "vnni" and "avx2" that the CPU has and ``target.cpu_kernels`` allows."""
    features = target.cpu_features
    if target.cpu_kernels in ("auto", "amx") and features >= _AMX and amx_refusal() is None:
        return "amx"
    if target.cpu_kernels in ("auto", "vnni") and features >= _VNNI:
        return "vnni"
    if target.cpu_kernels in ("auto", "avx2") and features >= _AVX2:
        return "avx2"
    return None


def passed_over(target: Target) -> str | None:
    """What to tell of a better instruction set that the CPU has and the operating system withholds."""
    if target.cpu_kernels != "auto" or not target.cpu_features >= _AMX or (reason := amx_refusal()) is None:
        return None
    return f"AMX is not used: {reason}"


def why_not(target: Target) -> str | None:
    """Why compiled kernels cannot run on a target, or None."""
    if not target.is_cpu:
        return f"runs on a CPU, not on {target.device}"
    if target.cpu_kernels in ("torch", "portable"):
        return f"--cpu-kernels {target.cpu_kernels} was asked for"
    if find_spec("numba") is None:
        return "numba is not installed"
    if instruction_set(target) is None:
        if target.cpu_kernels == "amx" and target.cpu_features >= _AMX:
            return amx_refusal()
        return f"the CPU lacks what --cpu-kernels {target.cpu_kernels} needs"
    return None


def bf16_refusal(target: Target) -> str | None:
    """Why low-bit weights cannot meet bf16 activations on a target, or None; each says what would help."""
    reason = why_not(target)
    if reason is not None:
        return reason
    if "avx512_bf16" not in target.cpu_features:
        return "the CPU lacks AVX512-BF16 (avx512_bf16)"
    if instruction_set(target) not in ("amx", "vnni"):
        return f"it needs AVX-512, --cpu-kernels {target.cpu_kernels} excludes that"
    return None


@dataclass(frozen=True, slots=True)
class LowBitKernel:
    """Takes quantized weights of any bits, groups, order and shape."""

    name: str
    activations: str

    def refuses(self, target: Target, *, weight: WeightTraits) -> str | None:
        """Why it cannot take the weight, or None."""
        if weight.spec is None:
            return "takes quantized weights only"
        if self.activations != target.cpu_activations:
            return f"--cpu-activations {target.cpu_activations} was asked for"
        if not weight.max_abs <= _FP16_MAX * 2.0**weight.spec.num_bits:
            return "a scale overflows fp16"
        if self.activations == "fp32" and weight.scale_rounding > 0:
            return "scales are kept in fp16, which would round them"
        if weight.scale_rounding > _FP16_ROUNDING:
            return f"fp16 would change a scale by {weight.scale_rounding:.1e}"
        return bf16_refusal(target) if self.activations == "bf16" else why_not(target)

    def repack(self, weight: PackedWeight, target: Target) -> PackedLinear:
        """Lay out in L16."""
        linear: PackedLinear = _compiled().compile_low_bit(weight, instruction_set(target), self.activations)
        return linear


@dataclass(frozen=True, slots=True)
class Sparse24Kernel:
    """Takes int4 weights of which every four consecutive inputs keep two, over int8 activations."""

    name: str = "cpu-int8-24"

    def refuses(self, target: Target, *, weight: WeightTraits) -> str | None:
        """Why it cannot take the weight, or None."""
        if not weight.is_24:
            return "takes symmetric 4-bit weights with 2:4 sparsity only"
        return low_bit_int8.refuses(target, weight=weight)

    def repack(self, weight: PackedWeight, target: Target) -> PackedLinear:
        """Keep two codes of four and their positions."""
        linear: PackedLinear = _compiled().compile_24(weight, instruction_set(target))
        return linear


@dataclass(frozen=True, slots=True)
class DenseKernel:
    """Takes dense weights, kept in their own type (fp16, bf16, fp32); activations and sums are fp32."""

    name: str = "cpu-dense"

    def refuses(self, target: Target, *, weight: WeightTraits) -> str | None:
        """Why it cannot take the weight, or None."""
        if weight.spec is not None:
            return "takes dense weights only"
        return why_not(target)

    def repack(self, weight: PackedWeight, target: Target) -> PackedLinear:
        """Lay out by blocks of 16 outputs. ``--dtype float32`` widens; nothing narrows."""
        dtype = torch.float32 if target.dtype == torch.float32 else weight.values.dtype
        linear: PackedLinear = _compiled().compile_dense(weight, instruction_set(target), dtype)
        return linear


def _compiled() -> Any:
    return import_module(".compiled", __package__)


low_bit_int8 = LowBitKernel("cpu-int8", "int8")
low_bit_bf16 = LowBitKernel("cpu-bf16", "bf16")
low_bit_fp32 = LowBitKernel("cpu-fp32", "fp32")
sparse_24 = Sparse24Kernel()
dense = DenseKernel()
