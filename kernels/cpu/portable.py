"""Low-bit weights in plain torch: kept packed, dequantized tile by tile into an fp32 GEMM.

For CPUs without AVX2 and Pythons without numba. Weights are exactly ``PackedWeight.dequantize``, activations
and sums are fp32. Tokens go through in eights, the last ones padded: for other numbers MKL has kernels
that sum in another order (for fewer than eight everywhere, for more on some CPUs). So a row is the same bits
in any batch, as measured with MKL; torch itself promises no order.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Target, WeightTraits
from ..layout import PackedWeight, SparseOverlay

_TOKENS = 8  # of a GEMM
_TILE_BYTES = 1 << 20  # of fp32 weights: what a core's cache holds
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}  # bits of a code, lowest first


@dataclass(frozen=True, slots=True, eq=False)
class PortableLinear:
    """planes: uint8 [out, bytes], one for each of ``_PLANES``; byte j holds codes j, j + bytes and so on.

    scales, zeros: [out, groups], zeros None: the middle. group: [in] int64 of each input, None: equal shares.
    """

    num_bits: int
    in_features: int
    planes: tuple[Tensor, ...]
    scales: Tensor
    zeros: Tensor | None
    group: Tensor | None
    bias: Tensor | None
    outliers: SparseOverlay | None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        tensors = (*self.planes, self.scales, self.zeros, self.group, self.bias)
        overlay = 0 if self.outliers is None else self.outliers.nbytes
        return sum(tensor.nbytes for tensor in tensors if tensor is not None) + overlay

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] fp32 -> [T, out] fp32."""
        rows = F.pad(x.float(), (0, 0, 0, -x.shape[0] % _TOKENS)).split(_TOKENS)
        out_features = self.scales.shape[0]
        step = max(16, _TILE_BYTES // (4 * self.in_features))
        parts = []
        for start in range(0, out_features, step):
            stop = min(start + step, out_features)
            bias = None if self.bias is None else self.bias[start:stop]
            weights = self._weights(start, stop)
            parts.append(torch.cat([F.linear(eight, weights, bias) for eight in rows]))
        return torch.cat(parts, 1)[: x.shape[0]]

    def _weights(self, start: int, stop: int) -> Tensor:
        """The outputs [start, stop) as fp32."""
        weights = self._codes(start, stop).float()
        by_group = weights
        if self.group is None:
            by_group = weights.view(stop - start, self.scales.shape[1], -1)
        by_group -= 2 ** (self.num_bits - 1) if self.zeros is None else self._spread(self.zeros[start:stop])
        by_group *= self._spread(self.scales[start:stop])
        if self.outliers is not None:
            self.outliers.rows(start, stop).add_to(weights)
        return weights

    def _codes(self, start: int, stop: int) -> Tensor:
        codes = None
        for bits, plane in zip(_PLANES[self.num_bits], self.planes, strict=True):
            packed = plane[start:stop]
            if bits < 8:
                fields = [packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)]
                packed = torch.stack(fields, 1).flatten(1)
            codes = packed if codes is None else codes | packed << 2
        assert codes is not None
        return codes[:, : self.in_features]

    def _spread(self, values: Tensor) -> Tensor:
        """[rows, groups] to fp32 that broadcasts over the inputs of each group, or of each input."""
        wide = values.float()
        return wide[:, :, None] if self.group is None else wide[:, self.group]


class PortableKernel:
    """Takes quantized weights of any bits, groups, order and shape."""

    name = "portable"

    def refuses(self, target: Target, *, weight: WeightTraits) -> str | None:
        """Why it cannot take the weight, or None."""
        if not target.is_cpu:
            return f"runs on a CPU, not on {target.device}"
        if weight.spec is None:
            return "takes quantized weights only"
        if target.cpu_kernels == "torch":
            return "--cpu-kernels torch was asked for"
        return None

    def repack(self, weight: PackedWeight, target: Target) -> PortableLinear:
        """Pack the codes; everything else stays as it is."""
        spec = weight.spec
        assert spec is not None
        assert weight.scales is not None
        codes = F.pad(weight.values, (0, -weight.in_features % 8))
        planes: list[Tensor] = []
        for bits in _PLANES[spec.num_bits]:
            fields = (codes & 2**bits - 1).view(codes.shape[0], 8 // bits, -1)
            shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
            planes.append((fields << shifts).sum(1, dtype=torch.uint8))
            codes = codes >> bits
        group = weight.group_of_inputs()
        counts = group.bincount()
        even = bool((group.diff() >= 0).all()) and bool((counts == counts[0]).all())
        even = even and len(counts) == weight.scales.shape[1]
        return PortableLinear(
            spec.num_bits,
            weight.in_features,
            tuple(planes),
            weight.scales,
            weight.zeros,
            None if even else group,
            None if weight.bias is None else weight.bias.float(),
            weight.outliers,
        )


low_bit = PortableKernel()
