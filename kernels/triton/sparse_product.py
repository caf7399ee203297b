"""Many tokens through a 2:4 matrix: by cuSPARSELt, at twice the dense rate of tensor cores.

A candidate of the dispatch table. The matrix comes from the packed weight for each call and is
gone after it: kept, it would take 1.125 bytes a weight beside the 0.39 (4-bit codes) or 1.125 (halves) of the
packed one. Making it reads and writes some 5 bytes a weight, which a product of few tokens does not repay:
``launch`` says from how many on.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Target
from .launch import Machine

_TOKENS = 16  # cuSPARSELt takes multiples of 8 halves; torch pads to them


@dataclass(frozen=True, slots=True)
class CuSparseLt:
    """torch's cuSPARSELt operators."""

    name: str = "cusparselt"

    def refuses(self, target: Target) -> str | None:
        """Why it cannot run, or None."""
        if target.is_cpu:
            return f"runs on a GPU, not on {target.device}"
        if target.dtype not in (torch.float16, torch.bfloat16):
            return f"takes float16 or bfloat16, not {str(target.dtype).removeprefix('torch.')}"
        if not Machine.of(target.device).is_cuda:
            return "is NVIDIA's"
        if not torch.backends.cusparselt.is_available():
            return f"torch {torch.__version__} has no cuSPARSELt that works here"
        return None

    def __call__(self, x: Tensor, matrix: Tensor, out_features: int, bias: Tensor | None) -> Tensor:
        """As of ``reference.sparse_product``; N and K are multiples of 16."""
        compressed = torch._cslt_compress(matrix)
        padded = F.pad(x, (0, 0, 0, -len(x) % _TOKENS))
        out = torch._cslt_sparse_mm(compressed, padded.t(), transpose_result=True)[: len(x), :out_features]
        return out.contiguous() if bias is None else out + bias.to(x.dtype)


cusparselt = CuSparseLt()
