"""A packed low-bit weight as a linear on a GPU: picks a launch by the number of tokens, and makes it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arrange import arrange
from .dequantize import add_overlay, dequantize
from .fragments import STEP
from .launch import Launch, Machine, choose
from .mma_linear import mma_linear
from .packing import FragmentWeight
from .tile_linear import tile_linear

_ARRANGED = 1024  # inputs that one program moves
_OVERLAY = 64  # tokens up to which the kernels add an overlay; a dense product takes more


class LowBitLinear:
    """Takes x [T, in_features] fp16 or bf16, gives [T, out_features] of its type.

    One launch; one more where inputs are reordered or padded. Results do not depend on the order in which
    programs run. Not for two streams at once: launches of one linear share locks.
    """

    def __init__(self, weight: FragmentWeight, machine: Machine) -> None:
        self.weight = weight
        self._machine = machine
        rows = int(weight.words.shape[0]) * 64
        self._shape = (rows, weight.inputs)
        locks = max(rows // 64, machine.multiprocessors)  # tiles that are split, at most
        self._locks = torch.zeros(locks, dtype=torch.int32, device=weight.words.device)

    @property
    def nbytes(self) -> int:
        """Bytes that the packed weight holds."""
        return self.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in_features] -> [T, out_features]."""
        w = self.weight
        out = x.new_empty(len(x), w.out_features)
        if len(x) == 0:
            return out
        x = self._arranged(x)
        launch = choose(self._machine, w.bits, self._shape, len(x))
        if launch.kernel == "dense" or (w.overlay is not None and len(x) > _OVERLAY):
            return F.linear(x, self.dense(x.dtype), None if w.bias is None else w.bias.to(x.dtype))
        self._launch(launch, x, out)
        return out

    def _arranged(self, x: Tensor) -> Tensor:
        """The activations as the weight's inputs stand, in rows of 16-byte units."""
        w = self.weight
        x = x.contiguous()
        if w.order is None:
            return x if x.data_ptr() % 16 == 0 else x.clone()
        out = x.new_empty(len(x), w.inputs)
        grid = (-(-w.inputs // _ARRANGED), len(x))
        arrange[grid](x, w.order, out, w.in_features, w.inputs, BLOCK=_ARRANGED)
        return out

    def _launch(self, launch: Launch, x: Tensor, out: Tensor) -> None:
        w = self.weight
        tiles_m, tiles_n = -(-len(x) // launch.BM), self._shape[0] // launch.BN
        tiles = tiles_m * tiles_n
        splits = 1
        if tiles <= len(self._locks):
            splits = launch.splits(self._machine, tiles, w.inputs // STEP.value)
        unused = w.words
        partial = unused
        if splits > 1:
            partial = x.new_empty(tiles * splits * launch.BM * launch.BN, dtype=torch.float32)
        overlay = w.overlay
        arguments = (
            x,
            w.words,
            w.scales,
            unused if w.zeros is None else w.zeros,
            unused if w.bias is None else w.bias,
            *((unused,) * 4 if overlay is None else overlay.tensors),
            out,
            partial,
            self._locks,
            len(x),
            w.out_features,
            w.inputs,
            splits,
            0 if w.bias is None else w.out_features,
        )
        constants: dict[str, Any] = {
            "BITS": w.bits, "GROUP": w.group, "ZEROS": w.zeros is not None, "SPARSE": overlay is not None,
            "SCALE_WEIGHTS": launch.scales_weights(w.group), "BM": launch.BM, "BN": launch.BN,
            "STAGES": launch.stages, "num_warps": launch.warps, "num_stages": launch.stages,
        }  # fmt: skip
        if launch.kernel == "mma":
            mma_linear[tiles_n, splits, tiles_m](*arguments, **constants, WARPS=launch.warps)
        else:
            tile_linear[tiles_n * tiles_m, splits](*arguments, **constants, ASM=self._machine.is_cuda)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight as a matrix [out_features, K] of ``dtype``, its inputs arranged."""
        w = self.weight
        out = torch.empty(self._shape, dtype=dtype, device=w.words.device)
        zeros = w.words if w.zeros is None else w.zeros
        grid = (self._shape[0] // 64, w.inputs // STEP.value)
        dequantize[grid](
            w.words, w.scales, zeros, out, w.out_features, w.inputs,
            BITS=w.bits, GROUP=w.group, ZEROS=w.zeros is not None, ASM=self._machine.is_cuda,
        )  # fmt: skip
        if w.overlay is not None:
            add_overlay[grid[:1]](*w.overlay.tensors, out, w.inputs)
        return out[: w.out_features]
