"""Linears over compiled kernels. Imports numba: reached through the dispatch table only."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..layout import PackedWeight
from .amx_permission import amx_refusal
from .isa import AMX, AVX2, VNNI
from .pool import Pool
from .recorder import Kernels, Recorder
from .tape import Inputs
from .weights import DenseWeight, LowBitWeight, pack_dense, pack_low_bit


@lru_cache(maxsize=3)
def kernels_for(isa: str) -> Kernels:
    """The compiled kernels for "amx", "vnni" or "avx2", shared by all that run in this process."""
    if isa == "amx" and (reason := amx_refusal()) is not None:
        raise RuntimeError(reason)
    return Kernels({"amx": AMX, "vnni": VNNI, "avx2": AVX2}[isa])


@dataclass(frozen=True, slots=True, eq=False)
class CompiledLinear:
    """A weight in the compiled kernels' layout. A tape records ``weight``; a call computes it by itself."""

    weight: LowBitWeight | DenseWeight
    isa: str
    activations: str  # what low-bit weights meet: "int8", "bf16" or "fp32"

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] fp32 -> [T, out] fp32, on the calling thread."""
        rows = x.float().contiguous()
        inputs = Inputs(max(1, x.shape[0]))
        inputs.tokens[0] = x.shape[0]
        recorder = Recorder(kernels_for(self.isa), inputs, num_threads=1)
        tape = recorder.finish(recorder.linear([self.weight], rows, self.activations))
        tape.run(Pool(1))
        return tape.output[: x.shape[0]].clone()


def compile_low_bit(weight: PackedWeight, isa: str, activations: str) -> CompiledLinear:
    """A quantized weight in L16, over "int8", "bf16" (AVX512-BF16) or "fp32" activations."""
    return CompiledLinear(pack_low_bit(weight), isa, activations)


def compile_24(weight: PackedWeight, isa: str) -> CompiledLinear:
    """An int4 weight with 2:4 sparsity, over int8 activations."""
    return CompiledLinear(pack_low_bit(weight, sparse=True), isa, "int8")


def compile_dense(weight: PackedWeight, isa: str, dtype: torch.dtype) -> CompiledLinear:
    """A dense weight of ``dtype`` in blocks of 16 outputs."""
    return CompiledLinear(pack_dense(weight, dtype), isa, "fp32")
