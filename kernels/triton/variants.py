"""What is compiled ahead of time to prove the kernels without a GPU: each kernel as it is launched.

The launches are those of ``launch``; a variant states one, and what its machine code must show.
"""

from dataclasses import dataclass, field
from typing import Any

from .launch import Launch, Machine, choose

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942")
TOKENS = (8, 16, 32, 64, 128)
NARROW_ROWS = 4096 + 64  # no multiple of 128: tiles of outputs are made narrower to fit
_MATRIX = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel with its launch constants, for ``triton.compile``.

    kernel: "module:function" below this package. signature: every runtime argument's type, in order;
    pointers and ``aligned`` integers are divisible by 16. mma: machine instruction that must be there, by
    target; empty for kernels that multiply nothing. decode: the main loop must have no shuffles, no
    int-to-float and 16-byte (3 bits: 8-byte) copies. weights: of a thread in one pass of the main loop;
    budget: main-loop instructions per weight, at most. bits: read per weight.
    """

    name: str
    kernel: str
    targets: tuple[str, ...]
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    mma: dict[str, str]
    decode: bool
    weights: float
    budget: float
    bits: float
    aligned: tuple[str, ...] = ("N", "K")
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of weight."""

    bits: int = 4
    dtype: str = "fp16"
    group: int = 128
    zeros: bool = False
    sparse: bool = False

    def __str__(self) -> str:
        words = [f"w{self.bits}", self.dtype]
        words += [f"g{self.group}"] * (self.group != 128) + ["asym"] * self.zeros + ["sparse"] * self.sparse
        return "-".join(words)


# Instructions per weight in the main loop, at most, by kernel and tokens of a tile: the most seen of any
# target with 2 to 4 bits in fp16 and one scale per 128, and at most a tenth more. gfx942 has no such count.
_BUDGET = {
    "mma": {8: 2.2, 16: 2.3, 32: 2.8, 64: 4.0, 128: 6.3},
    "tile": {16: 0.0, 64: 3.2, 128: 4.9},
    "sparse24": {8: 1.7, 16: 1.65, 32: 2.05, 64: 3.5},
}
_SOME = ("sm_80", "sm_90", "gfx942")
_WORKSTATION = ("sm_120",)  # mma.sync within 99 KiB, as sm_89: the tiles of 4 bits only


def variants() -> list[Variant]:
    """All of them: 4 bits at every number of tokens; every bits and type; other kinds on some targets."""
    plain = _Kind()
    found = [v for tokens in TOKENS for v in _launched(plain, tokens)]
    for dtype in ("fp16", "bf16"):
        for bits in (2, 3, 4, 8):
            found += _launched(_Kind(bits, dtype), 8)
    found += _launched(_Kind(4, "fp16", 32, zeros=True), 8, _SOME)
    found += _launched(_Kind(3, "bf16", 64, zeros=True), 8, _SOME)
    found += _launched(_Kind(2, "fp16", 0, zeros=True), 8, _SOME)
    found += _launched(_Kind(4, "bf16", sparse=True), 8, _SOME)
    found += _launched(_Kind(4, "fp16", sparse=True), 64, _SOME)
    for kind in (_Kind(4, "bf16", zeros=True), _Kind(3, "fp16", 64, zeros=True)):
        found += _launched(kind, 64, _SOME) + _launched(kind, 128, _SOME)
    for tokens in (16, 64, 128):
        found += _launched(_Kind(2), tokens, ("sm_90",)) + _launched(_Kind(8), tokens, ("sm_90",))
    for tokens in TOKENS:
        found += _launched(plain, tokens, _WORKSTATION)
    for tokens in (16, 32, 64):
        found += _launched(_Kind(8), tokens, ("sm_89",))  # tiles of their own: 99 KiB
    found += _launched(plain, 64, ("sm_90",), rows=NARROW_ROWS)
    for tokens in (64, 128):
        found += _launched(_Kind(4, "fp16", 32, zeros=True), tokens, ("sm_90",))
    for bits in (4, 16):
        for dtype in ("fp16", "bf16"):
            found += _sparse24(bits, dtype, 8, TARGETS[:5])
    for tokens in (16, 32, 64):
        found += _sparse24(4, "fp16", tokens, ("sm_80", "sm_90"))
    found += _sparse24(4, "fp16", 8, _WORKSTATION)
    found += _sparse24(4, "fp16", 8, ("sm_90",), group=32)
    found += _helpers()
    return list({v.name + str(v.targets): v for v in found}.values())


def _launched(
    kind: _Kind, tokens: int, targets: tuple[str, ...] = TARGETS, rows: int = 4096
) -> list[Variant]:
    """The launches of a weight of ``rows`` outputs, targets with the same one together."""
    by_launch: dict[Launch, list[str]] = {}
    for target in targets:
        sparsity = "overlay" if kind.sparse else None
        launch = choose(Machine("", target, 100), kind.bits, (rows, 4096), tokens, sparsity)
        by_launch.setdefault(launch, []).append(target)
    fitted = f"-n{rows}" if rows != 4096 else ""
    return [_variant(kind, launch, found, fitted) for launch, found in by_launch.items()]


def _sparse24(
    bits: int, dtype: str, tokens: int, targets: tuple[str, ...], group: int = 128
) -> list[Variant]:
    """The launch of a weight with 2:4 sparsity: 4-bit codes with groups, or halves."""
    launch = choose(Machine("", targets[0], 100), bits, (4096, 4096), tokens, sparsity="2:4")
    signature = {
        "x": f"*{dtype}", "words": "*i32", "meta": "*i32", "scales": "*fp16", "bias": "*fp32",
        "out": f"*{dtype}", "partial": "*fp32", "locks": "*i32",
        "M": "i32", "N": "i32", "K": "i32", "splits": "i32", "num_bias": "i32",
    }  # fmt: skip
    constants = {
        "BITS": bits, "GROUP": group if bits == 4 else 0, "BM": launch.BM, "BN": launch.BN,
        "STAGES": launch.stages, "WARPS": launch.warps,
    }  # fmt: skip
    return [
        Variant(
            name=f"sparse24-m{launch.BM}-{'w4' if bits == 4 else 'half'}-{dtype}"
            + (f"-g{group}" if group != 128 else ""),
            kernel="sparse24_linear:sparse24_linear",
            targets=targets,
            signature=signature,
            constexprs=constants,
            num_warps=launch.warps,
            num_stages=launch.stages,
            mma=dict.fromkeys(targets, "HMMA.SP.16832"),
            decode=True,
            weights=launch.BN * 128 / (32 * launch.warps),
            budget=round(_BUDGET["sparse24"][launch.BM] - 0.4 * (bits == 16) + 0.2 * (128 / group - 1), 2),
            bits=3 + 16 / group if bits == 4 else 9,
        )
    ]


def _helpers() -> list[Variant]:
    """What arranges activations, and what makes dense matrices."""
    packed = {"words": "*i32", "scales": "*fp16", "zeros": "*u8", "out": "*bf16", "N": "i32", "K": "i32"}
    overlay = {"starts": "*i32", "values": "*bf16", "rows": "*u8", "cols": "*i16", "out": "*bf16", "K": "i32"}
    moved = {"x": "*bf16", "order": "*i32", "out": "*bf16", "K_IN": "i32", "K": "i32"}
    sparse = {"words": "*i32", "meta": "*i32", "scales": "*fp16", "out": "*bf16", "N": "i32", "K": "i32"}
    found = [
        _helper("arrange:arrange", TARGETS, moved, {"BLOCK": 1024}),
        _helper("dequantize:add_overlay", TARGETS, overlay, {}),
        _helper("dequantize:expand24", TARGETS[:5], sparse, {"BITS": 4, "GROUP": 128}),
    ]
    for targets in (TARGETS[:5], TARGETS[5:]):
        constants = {"BITS": 4, "GROUP": 128, "ZEROS": True, "ASM": targets[0].startswith("sm")}
        found.append(_helper("dequantize:dequantize", targets, packed, constants))
    return found


def _helper(
    kernel: str, targets: tuple[str, ...], signature: dict[str, str], constants: dict[str, Any]
) -> Variant:
    name = kernel.rpartition(":")[2]
    return Variant(name, kernel, targets, signature, constants, 4, 3, {}, False, 1, 0, 0)


def _variant(kind: _Kind, launch: Launch, targets: list[str], fitted: str) -> Variant:
    constants = {
        "BITS": kind.bits, "GROUP": kind.group, "ZEROS": kind.zeros, "SPARSE": kind.sparse,
        "SCALE_WEIGHTS": launch.scales_weights(kind.group), "BM": launch.BM, "BN": launch.BN,
        "STAGES": launch.stages,
    }  # fmt: skip
    gluon = launch.kernel == "mma"
    constants |= {"WARPS": launch.warps} if gluon else {"ASM": targets[0].startswith("sm")}
    signature = {
        "x": f"*{kind.dtype}", "words": "*i32", "scales": "*fp16", "zeros": "*u8", "bias": "*fp32",
        "starts": "*i32", "values": f"*{kind.dtype}", "rows": "*u8", "cols": "*i16",
        "out": f"*{kind.dtype}", "partial": "*fp32", "locks": "*i32",
        "M": "i32", "N": "i32", "K": "i32", "splits": "i32", "num_bias": "i32",
    }  # fmt: skip
    per_group = 16 + kind.bits * kind.zeros
    # bf16 has three shifts more in a word, 8-bit bf16 two mantissas; scales and zeros cost by the group.
    extra = 0.3 * (kind.dtype == "bf16") * (2 if kind.bits == 8 else 1)
    extra += 0.3 * (kind.bits == 8 and gluon)
    if launch.BM == 64:
        extra += (0.2 if gluon else 0.27) * (256 / launch.BN - 1)  # fewer weights for the same activations
        extra += 0.75 * (kind.bits == 3 and not gluon)  # words of two thirds of the copies' width
    scale, zero = (0.2, 0.15) if gluon else (0.3, 0.3)
    extra += (scale + zero * kind.zeros) * (128 / kind.group - 1 if kind.group else 0) + 0.1 * kind.zeros
    return Variant(
        name=f"{launch.kernel}-m{launch.BM}-{kind}{fitted}",
        kernel=f"{launch.kernel}_linear:{launch.kernel}_linear",
        targets=tuple(targets),
        signature=signature,
        constexprs=constants,
        num_warps=launch.warps,
        num_stages=launch.stages,
        mma={target: "HMMA.16816" if gluon else _MATRIX[target] for target in targets},
        decode=launch.BM <= 64,
        weights=launch.BN * 128 / (32 * launch.warps),
        budget=round(_BUDGET[launch.kernel][launch.BM] + extra, 2),
        bits=kind.bits + (per_group / kind.group if kind.group else 0),
    )
