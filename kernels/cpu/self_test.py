"""A tiny known answer for every linear kernel that a model uses, asked before it serves.

LLVM intrinsics change between releases, and a cache can be damaged: better no server than a wrong one.
"""

from collections.abc import Iterable

import torch

from ..layout import PackedWeight, QuantSpec, SparseOverlay
from .compiled import CompiledLinear, compile_24, compile_dense, compile_low_bit
from .weights import LowBitWeight

# Whole tiles of 16, 8 and 4 tokens; without the first 3 as 4; strips of groups and a shorter one; AMX: an odd
# block, and one behind the four that one token reads at once.
_ROWS, _COLS, _TOKENS = 80, 544, 28
_OUTLIERS = 0.05
# Of the largest output: int8 is off by up to 1 / 254 of a group's largest activation, bf16 by 1 / 256 of any.
_TOLERANCE = {"int8": 0.02, "bf16": 0.005, "fp32": 1e-5}


def wrong_kernels(linears: Iterable[CompiledLinear]) -> list[str]:
    """Names of the kernels among those of ``linears`` that fail; each kind is asked once."""
    kinds: dict[tuple[object, ...], CompiledLinear] = {}
    for linear in linears:
        kinds.setdefault(_kind(linear), linear)
    return [" ".join(str(trait) for trait in kind) for kind, linear in kinds.items() if not _passes(linear)]


def _kind(linear: CompiledLinear) -> tuple[object, ...]:
    weight = linear.weight
    if not isinstance(weight, LowBitWeight):
        return linear.isa, str(weight.values.dtype).removeprefix("torch.")
    zeros = "sym" if weight.zeros is None else "asym"
    pattern = "2:4" if weight.sparse else "dense"
    kind = (linear.isa, f"{weight.num_bits}-bit", zeros, pattern, linear.activations)
    if weight.overlay is None:
        return kind
    return *kind, "with outliers" + (", 32-bit columns" if weight.overlay.wide else "")


def _passes(linear: CompiledLinear) -> bool:
    generator = torch.Generator().manual_seed(0)
    weight, cols = linear.weight, _COLS
    if isinstance(weight, LowBitWeight):
        if weight.overlay is not None and weight.overlay.wide:
            cols += 1 << 16
        known = _low_bit(weight, cols, generator)
        if weight.sparse:
            made = compile_24(known, linear.isa)
        else:
            made = compile_low_bit(known, linear.isa, linear.activations)
    else:
        known = PackedWeight(torch.randn(_ROWS, cols, generator=generator).to(weight.values.dtype))
        made = compile_dense(known, linear.isa, weight.values.dtype)
    x = torch.randn(_TOKENS, cols, generator=generator)
    expected = x.double() @ known.dequantize().double().T
    # One token by itself: linears with outliers have a kernel of their own for it.
    found = torch.stack([made(x), torch.cat([made(x[:1]), made(x[1:])])])
    error = (found - expected).abs().max() / expected.abs().max()
    return bool(error < _TOLERANCE[linear.activations])


def _low_bit(weight: LowBitWeight, cols: int, generator: torch.Generator) -> PackedWeight:
    top, middle = 2**weight.num_bits, 2 ** (weight.num_bits - 1)
    codes = torch.randint(0, top, (_ROWS, cols), generator=generator, dtype=torch.uint8)
    if weight.sparse:
        codes.view(_ROWS, -1, 4)[:, :, ::2] = middle
    scales = (torch.rand(_ROWS, cols // 32, generator=generator) + 0.5).half()
    zeros = None
    if weight.zeros is not None:
        zeros = torch.randint(0, top, scales.shape, generator=generator, dtype=torch.uint8)
    outliers = None
    if weight.overlay is not None:
        chosen = torch.rand(_ROWS, cols, generator=generator) < _OUTLIERS
        chosen[-1] = True  # a row so heavy that most of it is its tail, see ``overlay_slices``
        # As large as the weights beneath: without them the answer is off by far more than the tolerance.
        outliers = SparseOverlay.of(torch.randn(_ROWS, cols, generator=generator) * top * chosen)
    spec = QuantSpec(weight.num_bits, 32, zeros is None)
    return PackedWeight(codes, spec, scales, zeros, outliers=outliers)
