"""Floats of which every four consecutive inputs keep two: compressed-tensors' "sparse-24-bitmask".

Source: compressed-tensors 0.14 (sparse_24_bitmask.py), the last release that has it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...kernels.layout import PackedWeight
from ..errors import CheckpointError
from .base import FLOATS, Expected


def _bits() -> Tensor:
    return torch.tensor([1 << j for j in range(8)], dtype=torch.uint8)


def bitmask_tensors(module: str, out: int, in_: int) -> dict[str, Expected]:
    """What they must be. CheckpointError: inputs that are not whole fours."""
    if in_ % 4:
        raise CheckpointError(
            f"{module}: {in_} inputs are not whole fours; list it in the checkpoint's ignore"
        )
    return {
        f"{module}.compressed": Expected(FLOATS, (out, in_ // 2)),
        f"{module}.bitmask": Expected(("U8",), (out, -(-in_ // 8))),
        f"{module}.shape": Expected(("I64",), (2, 1)),
    }


def read_bitmask(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    """The dense [out, in] of the stored dtype."""
    values, bitmask = tensors[f"{module}.compressed"], tensors[f"{module}.bitmask"]
    out, in_ = len(values), values.shape[1] * 2
    stated = tensors[f"{module}.shape"].flatten().tolist()
    if stated != [out, in_]:
        raise CheckpointError(f"{module}.shape: {stated}, but compressed holds [{out}, {in_}]")
    kept = (bitmask[:, :, None] & _bits() != 0).view(out, -1)[:, :in_]
    counts = kept.reshape(out, -1, 4).sum(2)
    if bool((counts != 2).any()):
        row, quad = (counts != 2).nonzero()[0].tolist()
        raise CheckpointError(
            f"{module}.bitmask: row {row}, inputs {4 * quad} to {4 * quad + 3}: expected 2 kept, found "
            f"{int(counts[row, quad])}"
        )
    dense = torch.zeros(out, in_, dtype=values.dtype)
    dense[kept] = values.flatten()
    return dense


def write_bitmask(module: str, weight: PackedWeight) -> dict[str, Tensor]:
    """``compressed``, ``bitmask`` and ``shape`` of a dense weight. ValueError where it is not 2:4."""
    if weight.spec is not None:
        raise ValueError(f"{module}: quantized, but the configuration says 2:4 floats")
    dense = weight.values
    out, in_ = dense.shape
    if in_ % 4:
        raise ValueError(f"{module}: {in_} inputs are not whole fours")
    quads = (dense != 0).view(out, -1, 4)
    counts = quads.sum(2)
    if bool((counts > 2).any()):
        row, quad = (counts > 2).nonzero()[0].tolist()
        raise ValueError(
            f"{module}: not 2:4: row {row} has {int(counts[row, quad])} weights in inputs {4 * quad} to "
            f"{4 * quad + 3}"
        )
    # What is not zero, and then the first zeros, until there are two.
    order = torch.argsort(quads.to(torch.uint8), dim=2, descending=True, stable=True)
    kept = torch.zeros_like(quads).scatter_(2, order[:, :, :2], True).view(out, in_)
    padded = torch.nn.functional.pad(kept, (0, -in_ % 8)).view(out, -1, 8)
    return {
        f"{module}.compressed": dense[kept].view(out, in_ // 2),
        f"{module}.bitmask": (padded * _bits()).sum(2, dtype=torch.uint8),
        f"{module}.shape": torch.tensor([[out], [in_]]),
    }
