"""The GPU's low-bit linears as a candidate of the dispatch table. Triton is imported when it is taken."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from ..dispatch import PackedLinear, Target, WeightTraits, resolve
from ..layout import PackedWeight
from .launch import Machine, supports

_FP16_MAX = 65504.0


@dataclass(frozen=True, slots=True)
class LowBitKernel:
    """Takes quantized weights of any shape, groups and order of inputs, with whole zero points."""

    name: str = "triton-low-bit"

    def refuses(self, target: Target, *, weight: WeightTraits) -> str | None:
        """Why it cannot take the weight, or None."""
        if weight.spec is None:
            return "takes quantized weights only"
        if weight.spec.num_bits not in (2, 3, 4, 8):
            return f"takes 2, 3, 4 or 8 bits, not {weight.spec.num_bits}"
        if not weight.whole_zeros:
            return "takes zero points that are whole numbers from 0 to 2**bits, at most 255"
        return _unfit(target, weight)

    def repack(self, weight: PackedWeight, target: Target) -> PackedLinear:
        """Pack in the order of tensor cores' fragments."""
        packing = import_module(".packing", __package__)
        low_bit = import_module(".low_bit", __package__)
        packed = packing.pack(weight, target.device, target.dtype)
        linear: PackedLinear = low_bit.LowBitLinear(packed, Machine.of(target.device))
        return linear


@dataclass(frozen=True, slots=True)
class Sparse24Kernel:
    """Takes weights of which every four consecutive inputs keep two: symmetric 4-bit codes, or halves."""

    name: str = "triton-24"

    def refuses(self, target: Target, *, weight: WeightTraits) -> str | None:
        """Why it cannot take the weight, or None."""
        if not weight.is_24:
            return "takes 2:4 sparsity only, of symmetric 4-bit codes or of halves"
        if weight.spec is not None and weight.has_outliers:
            return "takes no overlay"
        reason = _unfit(target, weight)
        if reason is None and not supports(Machine.of(target.device), "2:4"):
            reason = f"has no launches for {Machine.of(target.device).name}: needs mma.sp"
        return reason

    def repack(self, weight: PackedWeight, target: Target) -> PackedLinear:
        """Keep two of four and their positions."""
        packing = import_module(".packing24", __package__)
        low_bit = import_module(".low_bit", __package__)
        packed = packing.pack24(weight, target.device, target.dtype)
        product = resolve("sparse_product", target)
        linear: PackedLinear = low_bit.Sparse24Linear(packed, Machine.of(target.device), product)
        return linear


def warm(linears: Iterable[object], target: Target, max_tokens: int, threads: int) -> int:
    """Compile ahead what the linears made here may launch; returns how many kernels. See ``low_bit.warm``."""
    if target.is_cpu or find_spec("triton") is None:
        return 0
    count: int = import_module(".low_bit", __package__).warm(linears, target.dtype, max_tokens, threads)
    return count


def keep_compiled(root: Path) -> Path | None:
    """Keep machine code below ``root``, in a folder named by Triton's version; TRITON_CACHE_DIR comes first.

    The folder in use; None without Triton. Its own key has the kernels' sources, options and target.
    """
    if find_spec("triton") is None:
        return None
    triton = import_module("triton")
    knobs = triton.knobs.cache
    if knobs.dir == knobs.get_triton_dir("cache"):  # not set
        knobs.dir = str(root / f"triton-{triton.__version__}")
    return Path(knobs.dir)


def _unfit(target: Target, weight: WeightTraits) -> str | None:
    """Why no kernel here can take the weight, or None."""
    if target.is_cpu:
        return f"runs on a GPU, not on {target.device}"
    if target.dtype not in (torch.float16, torch.bfloat16):
        return f"computes in float16 or bfloat16, asked for {str(target.dtype).removeprefix('torch.')}"
    if target.dtype == torch.float16 and not weight.max_abs <= _FP16_MAX:
        return f"fp16 would overflow: a weight's magnitude is up to {weight.max_abs:.4g}"
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        machine = Machine.of(target.device)
    except LookupError as error:
        return str(error)
    if not supports(machine):
        return f"has no launches for {machine.name} ({machine.architecture})"
    return None


low_bit = LowBitKernel()
sparse_24 = Sparse24Kernel()
