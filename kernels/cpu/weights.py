"""Linear weights in the CPU kernels' layouts, repacked from the canonical form."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..layout import PackedWeight
from .l16 import GROUP, ROWS, pack_codes, pack_per_group, padded
from .overlay_slices import OverlayWeight, pack_overlay
from .sparse24 import ZERO, pack_24
from .vectors import BFLOAT16, FLOAT16, FLOAT32

KINDS = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}


@dataclass(frozen=True, slots=True, eq=False)
class LowBitWeight:
    """codes: L16 bytes, or those of ``sparse24`` if ``sparse``; bias: fp32 [padded N].

    scales, zeros: fp16 [N / 16, groups, 16].

    perm: int32 [32 * groups], the input at each place, or -1 for padding; None: as they come.
    """

    num_bits: int
    out_features: int
    in_features: int
    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    zeros: NDArray[np.float16] | None
    perm: NDArray[np.int32] | None
    bias: NDArray[np.float32] | None
    overlay: OverlayWeight | None = None
    sparse: bool = False

    @property
    def groups(self) -> int:
        """Groups of 32 inputs, padding included."""
        return self.codes.shape[1]

    @property
    def blocks(self) -> int:
        """Blocks of 16 outputs."""
        return padded(self.out_features, ROWS) // ROWS

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        arrays = (self.codes, self.scales, self.zeros, self.perm, self.bias)
        overlay = 0 if self.overlay is None else self.overlay.nbytes
        return sum(a.nbytes for a in arrays if a is not None) + overlay


@dataclass(frozen=True, slots=True, eq=False)
class DenseWeight:
    """values: [N / 16, padded K, 16] of fp32, fp16 or bf16."""

    out_features: int
    in_features: int
    values: Tensor
    bias: NDArray[np.float32] | None

    @property
    def kind(self) -> int:
        """The storage kind."""
        return KINDS[self.values.dtype]

    @property
    def groups(self) -> int:
        """Groups of 32 inputs."""
        return padded(self.in_features, GROUP) // GROUP

    @property
    def blocks(self) -> int:
        """Blocks of 16 outputs."""
        return padded(self.out_features, ROWS) // ROWS

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.values.nbytes + (0 if self.bias is None else self.bias.nbytes)


def pack_low_bit(weight: PackedWeight, sparse: bool = False) -> LowBitWeight:
    """Lay out a quantized weight; ``sparse``: by ``sparse24``, for weights that are.

    Every group is padded to whole groups of 32 inputs, whatever its size. Scales and zero points become fp16
    (as GPTQ checkpoints have them).
    """
    spec = weight.spec
    assert spec is not None
    assert weight.scales is not None
    perm, group = _input_order(weight)
    rows, cols = padded(weight.out_features, ROWS), len(perm)
    per_32 = torch.from_numpy(group[::GROUP])
    real = perm >= 0
    codes = np.full((rows, cols), ZERO if sparse else 0, np.uint8)
    codes[: weight.out_features, real] = weight.values.numpy()[:, perm[real]]
    identity = np.array_equal(perm[: weight.in_features], np.arange(weight.in_features))
    return LowBitWeight(
        spec.num_bits,
        weight.out_features,
        weight.in_features,
        _aligned(pack_24(codes) if sparse else pack_codes(codes, spec.num_bits)),
        _aligned(pack_per_group(_padded_rows(weight.scales[:, per_32], rows))),
        None
        if weight.zeros is None
        else _aligned(pack_per_group(_padded_rows(weight.zeros[:, per_32], rows))),
        None if identity else perm,
        _bias(weight, rows),
        None if weight.outliers is None else pack_overlay(weight.outliers, weight.in_features),
        sparse,
    )


def _input_order(weight: PackedWeight) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """([padded K] input at each place or -1, [padded K] its group): groups in order, each padded to 32."""
    group = weight.group_of_inputs().numpy()
    order = np.argsort(group, kind="stable")
    counts = np.bincount(group)
    places = np.full(int(sum(padded(int(count), GROUP) for count in counts)), -1, np.int32)
    groups = np.zeros(len(places), np.int64)
    start = taken = 0
    for index, count in enumerate(counts):
        size = padded(int(count), GROUP)
        places[start : start + count] = order[taken : taken + count]
        groups[start : start + size] = index
        start, taken = start + size, taken + count
    return places, groups


def pack_dense(weight: PackedWeight, dtype: torch.dtype) -> DenseWeight:
    """Lay out the weights as floats of ``dtype``."""
    rows, cols = padded(weight.out_features, ROWS), padded(weight.in_features, GROUP)
    full = torch.zeros(rows, cols, dtype=dtype)
    full[: weight.out_features, : weight.in_features] = weight.dequantize(dtype)
    values = full.view(rows // ROWS, ROWS, cols).transpose(1, 2).contiguous()
    return DenseWeight(weight.out_features, weight.in_features, values, _bias(weight, rows))


def _padded_rows(values: Tensor, rows: int) -> NDArray[np.float16]:
    out = np.zeros((rows, values.shape[1]), np.float16)
    out[: values.shape[0]] = values.to(torch.float16).numpy()
    return out


def _bias(weight: PackedWeight, rows: int) -> NDArray[np.float32] | None:
    if weight.bias is None:
        return None
    out = np.zeros(rows, np.float32)
    out[: weight.out_features] = weight.bias.float().numpy()
    return out


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """A copy that begins at a cache line."""
    raw = np.empty(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    view = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view
