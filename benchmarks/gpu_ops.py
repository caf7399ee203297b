"""The linears that are timed: ours by the dispatch table, and what else the machine has.

An op makes a ``Linear`` of one shape: calls to rotate through and the bytes that each must read. What cannot
be had (an op that torch or the machine lacks) raises; the reason is kept in the results.
"""

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from nybble.kernels.dispatch import Target, WeightTraits, choose
from nybble.kernels.layout import PackedWeight, QuantSpec, SparseOverlay
from torch import Tensor

GROUP = 128
OUTLIERS = 0.005


class Unavailable(Exception):
    """Why an op cannot be timed here."""


@dataclass(frozen=True)
class Linear:
    """calls: the linear over several copies of its weights; exact: float64 weights for the check, or None."""

    kernel: str
    calls: list[Callable[[Tensor], Tensor]]
    num_bytes: int
    exact: Tensor | None


@dataclass(frozen=True)
class Shape:
    """Of one weight, on one device."""

    outputs: int
    inputs: int
    target: Target
    copies_of: Callable[[int], int]  # bytes of one copy -> how many

    def copies(self, num_bytes: int, make: Callable[[], Any]) -> list[Any]:
        """As many as fill more than the caches."""
        return [make() for _ in range(self.copies_of(num_bytes))]


def _codes(shape: Shape, bits: int) -> Tensor:
    size = (shape.outputs, shape.inputs)
    return torch.randint(0, 2**bits, size, dtype=torch.uint8, device=shape.target.device)


def _scales(shape: Shape, group: int = GROUP) -> Tensor:
    groups = 1 if group == -1 else -(-shape.inputs // group)
    return (torch.rand(shape.outputs, groups, device=shape.target.device) * 0.02 + 0.01).half()


def low_bit(bits: int, group: int = GROUP, symmetric: bool = True) -> Callable[[Shape], PackedWeight]:
    """Random codes and scales."""

    def make(shape: Shape) -> PackedWeight:
        scales = _scales(shape, group)
        zeros = None if symmetric else torch.randint_like(scales, 0, 2**bits, dtype=torch.uint8)
        return PackedWeight(_codes(shape, bits), QuantSpec(bits, group, symmetric), scales, zeros)

    return make


def with_outliers(shape: Shape) -> PackedWeight:
    """4 bits, with 0.5 % fp16 residuals at random places."""
    weight = low_bit(4)(shape)
    chosen = torch.rand(weight.values.shape, device=shape.target.device) < OUTLIERS
    residuals = torch.randn(weight.values.shape, device=shape.target.device, dtype=torch.float16) * chosen
    return replace(weight, outliers=SparseOverlay.of(residuals))


def _kept(shape: Shape) -> Tensor:
    """[outputs, inputs] bool: two of each four."""
    quads = torch.rand(shape.outputs, shape.inputs // 4, 4, device=shape.target.device)
    return (quads.argsort(-1) < 2).view(shape.outputs, shape.inputs)


def int4_24(shape: Shape) -> PackedWeight:
    """4 bits, of which two of four are 8, that is zero."""
    weight = low_bit(4)(shape)
    return replace(weight, values=torch.where(_kept(shape), weight.values, 8).to(torch.uint8))


def half_24(shape: Shape) -> PackedWeight:
    """Dense halves with 2:4 zeros."""
    size = (shape.outputs, shape.inputs)
    values = torch.randn(size, device=shape.target.device, dtype=shape.target.dtype)
    return PackedWeight(values * _kept(shape))


def ours(make: Callable[[Shape], PackedWeight]) -> Callable[[Shape], Linear]:
    """The kernel that the dispatch table takes for the weight; torch's own is not one of ours."""

    def build(shape: Shape) -> Linear:
        weight = make(shape)
        choice = choose("linear", shape.target, weight=WeightTraits.of(weight))
        if choice.name == "torch":
            raise Unavailable("; ".join(f"{name}: {why}" for name, why in choice.refused))
        packed = choice.implementation.repack(weight, shape.target)
        others = shape.copies(packed.nbytes, lambda: copy.deepcopy(packed))
        return Linear(choice.name, [packed, *others[1:]], packed.nbytes, weight.dequantize().double())

    return build


def dense(shape: Shape) -> Linear:
    """cuBLAS through torch."""
    size = (shape.outputs, shape.inputs)
    num_bytes = size[0] * size[1] * 2

    def make() -> Callable[[Tensor], Tensor]:
        weight = torch.randn(size, device=shape.target.device, dtype=shape.target.dtype)
        return lambda x: F.linear(x, weight)

    return Linear("cublas", shape.copies(num_bytes, make), num_bytes, None)


def tinygemm(shape: Shape) -> Linear:
    """torch's int4 linear, bf16 activations only."""
    if shape.inputs % GROUP or shape.outputs % 8:
        raise Unavailable(f"{shape.outputs}x{shape.inputs}: not whole tiles")
    device, bf16 = shape.target.device, torch.bfloat16
    pairs = torch.rand(shape.inputs // GROUP, shape.outputs, 2, device=device, dtype=bf16)

    def make() -> Callable[[Tensor], Tensor]:
        size = (shape.outputs, shape.inputs // 2)
        codes = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        return lambda x: torch.ops.aten._weight_int4pack_mm(x.to(bf16), packed, GROUP, pairs)

    num_bytes = shape.outputs * shape.inputs // 2 + pairs.numel() * 2
    return Linear("tinygemm", shape.copies(num_bytes, make), num_bytes, None)


def cusparselt(shape: Shape) -> Linear:
    """2:4 halves through torch's cuSPARSELt; tokens padded to 16."""
    weight = half_24(shape).values
    compressed = torch._cslt_compress(weight)

    def call(packed: Tensor) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            padded = F.pad(x, (0, 0, 0, -len(x) % 16))
            return torch._cslt_sparse_mm(packed, padded.t()).t()[: len(x)]

        return run

    num_bytes = compressed.numel() * compressed.element_size()
    packs = shape.copies(num_bytes, compressed.clone)
    return Linear("cusparselt", [call(p) for p in packs], num_bytes, weight.double())


def gemlite(shape: Shape) -> Linear:
    """gemlite's W4 linear, where its package is."""
    core = importlib.import_module("gemlite.core")
    kind = core.DType.FP16 if shape.target.dtype == torch.float16 else core.DType.BF16
    device = shape.target.device

    def make() -> Callable[[Tensor], Tensor]:
        linear = core.GemLiteLinear(
            4, group_size=GROUP, in_features=shape.inputs, out_features=shape.outputs,
            input_dtype=kind, output_dtype=kind,
        )  # fmt: skip
        scales = _scales(shape).to(shape.target.dtype)
        zeros = torch.full_like(scales, 8)
        linear.pack(_codes(shape, 4), scales.view(-1, 1), zeros.view(-1, 1), None)
        forward: Callable[[Tensor], Tensor] = linear.to(device).forward
        return forward

    num_bytes = shape.outputs * shape.inputs // 2 + shape.outputs * (shape.inputs // GROUP) * 4
    return Linear("gemlite", shape.copies(num_bytes, make), num_bytes, None)


OPS: dict[str, Callable[[Shape], Linear]] = {
    "cublas": dense,
    "w4": ours(low_bit(4)),
    "w4 asym g64": ours(low_bit(4, 64, symmetric=False)),
    "w4 + outliers": ours(with_outliers),
    "w4 2:4": ours(int4_24),
    "16 bit 2:4": ours(half_24),
    "w3": ours(low_bit(3)),
    "w2": ours(low_bit(2)),
    "w8": ours(low_bit(8)),
    "tinygemm": tinygemm,
    "cusparselt": cusparselt,
    "gemlite": gemlite,
}
