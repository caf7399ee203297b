"""fbgemm's fp16-packed linear: weights fp16, activations and sums fp32 (relative error 2e-4, that of fp16).

On AVX2 it beats torch's fp32 and bf16 linears at every batch size; it is the CPU's way to compute half
precision checkpoints, and quantized ones (dequantized when loaded) until a low-bit kernel takes them.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..dispatch import Target, WeightTraits
from ..layout import PackedWeight

_FP16_MAX = 65504.0


@functools.cache
def _few_rows_sum_apart() -> bool:
    """Whether this CPU's fbgemm sums one or two rows in another order than three.

    Its AVX2 kernels do, and cut rows into sixes with what is left as a block of its own, so that a row's bits
    hang on how many come with it; its AVX-512 kernels do not.
    """
    generator = torch.Generator().manual_seed(0)
    packed = torch.ops.quantized.linear_prepack_fp16(torch.randn(32, 64, generator=generator), None)
    x = torch.randn(3, 64, generator=generator)
    one, two, three = (torch.ops.quantized.linear_dynamic_fp16(x[:rows], packed) for rows in (1, 2, 3))
    return not (torch.equal(one, three[:1]) and torch.equal(two, three[:2]))


class Fp16PackedLinear:
    """One weight in fbgemm's packed layout, bias included."""

    __slots__ = ("_packed", "nbytes")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: [out, in] fp32, bias: [out] fp32."""
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        self.nbytes = weight.numel() * 2 + (0 if bias is None else bias.numel() * 4)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] fp32 -> [T, out] fp32; a row's bits do not hang on T."""
        rows = len(x)
        if rows % 6 in (1, 2) and _few_rows_sum_apart():
            x = pad(x, (0, 0, 0, 3 - rows % 6))  # one token takes 1.1 to 1.6 times as long (Zen 3)
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return out[:rows]


@dataclass(frozen=True, slots=True)
class Fp16PackedKernel:
    """Takes dense weights, or quantized ones if ``quantized``: two names, so that a report says which."""

    name: str
    quantized: bool

    def refuses(self, target: Target, *, weight: WeightTraits) -> str | None:
        """Why it cannot take the weight, or None."""
        if not target.is_cpu:
            return f"runs on a CPU, not on {target.device}"
        if target.cpu_kernels == "portable":
            return "--cpu-kernels portable was asked for"
        if (weight.spec is not None) != self.quantized:
            return f"takes {'quantized' if self.quantized else 'dense'} weights only"
        if target.dtype != torch.float16:
            return f"computes in float16, asked for {str(target.dtype).removeprefix('torch.')}"
        if self.quantized and target.cpu_activations == "fp32" and target.cpu_kernels != "torch":
            return "rounds weights to fp16, exact fp32 was asked for"
        if not weight.max_abs <= _FP16_MAX:
            return f"fp16 would overflow: a weight's magnitude is up to {weight.max_abs:.4g}"
        if "fbgemm" not in torch.backends.quantized.supported_engines:
            return "this torch was built without fbgemm"
        return None

    def repack(self, weight: PackedWeight, target: Target) -> Fp16PackedLinear:
        """Dequantize to fp32 and pack."""
        bias = None if weight.bias is None else weight.bias.float().contiguous()
        return Fp16PackedLinear(weight.dequantize(torch.float32).contiguous(), bias)


dense_fp16 = Fp16PackedKernel("dense-fp16", quantized=False)
dequant_fp16 = Fp16PackedKernel("dequant-fp16", quantized=True)
