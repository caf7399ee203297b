"""Which kernel computes what: one table, resolved once, when a model is loaded.

A candidate is ``"module:name"`` below this package, imported only when it is asked; the first that does
not refuse is taken. Adding a kernel is one file and one line in ``OPS``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .layout import PackedWeight, QuantSpec

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """Where a model runs and what its weights are computed in.

    ``dtype``: float32 is exact; float16 and bfloat16 are the weights' precision. Activations are fp32
    on a CPU in every case, else of ``dtype``.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    cpu_features: frozenset[str] = field(default_factory=frozenset)
    cpu_kernels: str = "torch"  # "auto" or an instruction set: compiled; "torch", "portable": docs/kernels.md
    cpu_activations: str = "fp32"  # what low-bit weights meet in compiled kernels: "int8", "bf16", "fp32"

    @property
    def activation_dtype(self) -> torch.dtype:
        """The dtype of the residual stream, of norms and of what a linear takes and gives."""
        return torch.float32 if self.is_cpu else self.dtype

    @property
    def is_cpu(self) -> bool:
        """Whether the device is the host's processor."""
        return torch.device(self.device).type == "cpu"


@dataclass(frozen=True, slots=True)
class WeightTraits:
    """What decides whether a linear kernel can take a weight.

    ``max_abs`` bounds the weights' magnitude; ``is_24``: see ``PackedWeight.is_24``, or floats of which every
    four consecutive inputs keep at most two; ``whole_zeros``: zero points are whole, 0 to min(2**bits, 255);
    ``scale_rounding``: largest relative change of a scale by rounding to fp16.
    """

    out_features: int
    in_features: int
    spec: QuantSpec | None
    dtype: torch.dtype
    max_abs: float
    has_g_idx: bool = False
    is_24: bool = False
    whole_zeros: bool = True
    has_outliers: bool = False
    scale_rounding: float = 0.0

    @staticmethod
    def of(weight: PackedWeight) -> "WeightTraits":
        """The traits of ``weight``; reads its values once."""
        if weight.spec is None:
            low, high = weight.values.aminmax()
            max_abs = max(-float(low), float(high))
        else:
            assert weight.scales is not None
            max_abs = float(weight.scales.float().abs().max()) * 2.0**weight.spec.num_bits
            if weight.outliers is not None and weight.outliers.values.numel():
                max_abs += float(weight.outliers.values.abs().max())
        return WeightTraits(
            weight.out_features,
            weight.in_features,
            weight.spec,
            weight.values.dtype,
            max_abs,
            weight.g_idx is not None,
            weight.is_24() if weight.spec is not None else _halves_24(weight.values),
            _whole_zeros(weight),
            weight.outliers is not None,
            _scale_rounding(weight),
        )


def _whole_zeros(weight: PackedWeight) -> bool:
    """Whether zero points are whole numbers from 0 to 2**bits (8 bits: 255), of which kernels hold a byte."""
    if weight.zeros is None or weight.spec is None:
        return True
    return torch.equal(weight.zeros, weight.zeros.round().clamp(0, min(2**weight.spec.num_bits, 255)))


def _scale_rounding(weight: PackedWeight) -> float:
    """The largest relative change of a scale by rounding to fp16; 1 where one becomes 0."""
    if weight.scales is None or weight.scales.dtype == torch.float16:
        return 0.0
    scales = weight.scales.float()
    change = (scales.half().float() - scales).abs() / scales.abs().clamp(min=torch.finfo(torch.float32).tiny)
    return float(change.max())


def _halves_24(values: Tensor) -> bool:
    """Whether of every 4 consecutive inputs at most 2 are not zero. Nearly free where it is not so."""
    for rows in (values[:16], values[16:]):
        kept = torch.nn.functional.pad(rows != 0, (0, -rows.shape[1] % 4))
        if bool((kept.view(-1, 4).sum(1, dtype=torch.uint8) > 2).any()):
            return False
    return True


class PackedLinear(Protocol):
    """A weight in one kernel's layout. Called with x [T, in] it gives [T, out] of x's dtype."""

    @property
    def nbytes(self) -> int:
        """Bytes that the packed weight holds."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in_features] -> [T, out_features]."""


class LinearKernel(Protocol):
    """A way to multiply by a weight: says whether it can, then packs it into its layout."""

    name: str

    def refuses(self, target: Target, *, weight: WeightTraits) -> str | None:
        """Why it cannot, or None."""

    def repack(self, weight: PackedWeight, target: Target) -> PackedLinear:
        """The weight in this kernel's layout, on the target's device."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A resolved op: the implementation, its name, and why each better candidate refused."""

    implementation: Any
    name: str
    refused: tuple[tuple[str, str], ...] = ()


OPS: dict[str, tuple[str, ...]] = {
    "linear": (
        ".cpu.numba_linear:sparse_24",
        ".cpu.numba_linear:low_bit_int8",
        ".cpu.numba_linear:low_bit_bf16",
        ".cpu.numba_linear:low_bit_fp32",
        ".cpu.numba_linear:dense",
        ".cpu.linear:dense_fp16",
        ".cpu.linear:dequant_fp16",
        ".cpu.portable:low_bit",
        ".triton.linear:sparse_24",
        ".triton.linear:low_bit",
        ".reference:linear",
    ),
    "sparse_product": (".triton.sparse_product:cusparselt", ".reference:sparse_product"),
    "embedding": (".reference:embedding",),
    "rms_norm": (".pointwise:rms_norm",),
    "add_rms_norm": (".pointwise:add_rms_norm",),
    "rope": (".pointwise:rope",),
    "silu_and_mul": (".reference:silu_and_mul",),
    "kv_write": (".attention:kv_write",),
    "paged_attention": (".attention:paged_attention",),
    "causal_attention": (".attention:causal_attention",),
}


def choose(op: str, target: Target, **traits: object) -> Choice:
    """The first candidate for ``op`` that does not refuse ``target`` and ``traits``.

    Raises LookupError that prints op, device, dtype, traits and each candidate's reason.
    """
    refused: list[tuple[str, str]] = []
    for candidate in OPS[op]:
        module_name, name = candidate.split(":")
        implementation = getattr(import_module(module_name, __package__), name)
        refuses = getattr(implementation, "refuses", None)
        reason = refuses(target, **traits) if refuses is not None else None
        if reason is None:
            return Choice(implementation, getattr(implementation, "name", name), tuple(refused))
        refused.append((getattr(implementation, "name", candidate), reason))
    lines = [f"no kernel for {op} on {target.device} with {target.dtype}, {traits}"]
    raise LookupError("\n".join(lines + [f"  {name}: {reason}" for name, reason in refused]))


def resolve(op: str, target: Target, **traits: object) -> Any:
    """``choose(...).implementation``."""
    return choose(op, target, **traits).implementation


@dataclass(frozen=True, slots=True)
class Ops:
    """The decoder's functions for one target, resolved together. Signatures: ``kernels/reference.py``."""

    embedding: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    rope: Callable[..., Tensor]
    silu_and_mul: Callable[..., Tensor]
    kv_write: Callable[..., None]
    paged_attention: Callable[..., Tensor]
    causal_attention: Callable[..., Tensor]

    @staticmethod
    def resolve(target: Target) -> "Ops":
        """All of them for ``target``."""
        return Ops(*(resolve(op.name, target) for op in fields(Ops)))
