"""What is compiled ahead of time to prove the kernels without a GPU: each kernel as it is launched.

``kernels/triton/launch.py`` makes the launches; a variant states one, and what its machine code must show.
"""

from dataclasses import dataclass, field
from typing import Any

NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100")


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel with its launch constants, for ``triton.compile``.

    kernel: "module:function" below this package. signature: every runtime argument's type, in order; pointers
    and ``aligned`` integers are divisible by 16. mma: machine instruction that must be there, by target.
    decode: the main loop must have no shuffles, no int-to-float and 16-byte (3 bits: 8-byte) copies.
    weights: of a thread in one pass of the main loop; budget: main-loop instructions per weight, at most.
    bits: read per weight.
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


_HMMA = {
    "sm_80": "HMMA.16816", "sm_86": "HMMA.16816", "sm_89": "HMMA.16816", "sm_90": "HMMA.16816",
    "sm_100": "HMMA.16816",
}  # fmt: skip
_TILE_MMA = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}


def _signature(dtype: str, scales: str = "fp16") -> dict[str, str]:
    return {
        "x": f"*{dtype}", "words": "*i32", "scales": f"*{scales}", "zeros": "*u8", "bias": "*fp32",
        "starts": "*i32", "values": f"*{dtype}", "rows": "*u8", "cols": "*i16",
        "out": f"*{dtype}", "partial": "*fp32", "locks": "*i32",
        "M": "i32", "N": "i32", "K": "i32", "splits": "i32", "num_bias": "i32",
    }  # fmt: skip


def _linear(name: str, targets: tuple[str, ...], dtype: str, budget: float, **given: Any) -> Variant:
    """A variant of one of the linear kernels. ``given``: constants that differ from a 4-bit decode's."""
    gluon = given.pop("gluon", True)
    warps = given.pop("warps", 4)
    constants: dict[str, Any] = {
        "BITS": 4, "GROUP": 128, "ZEROS": False, "SPARSE": False, "SCALE_WEIGHTS": False, "BM": 8,
        "BN": 64, "STAGES": 4,
    } | given  # fmt: skip
    decode = constants["BM"] <= 64
    constants |= {"WARPS": warps} if gluon else {"ASM": targets[0].startswith("sm")}
    bits = constants["BITS"] + (16 + constants["BITS"] * constants["ZEROS"]) / (constants["GROUP"] or 4096)
    return Variant(
        name,
        "mma_linear:mma_linear" if gluon else "tile_linear:tile_linear",
        targets,
        _signature(dtype),
        constants,
        warps,
        constants["STAGES"],
        _HMMA if gluon else _TILE_MMA,
        decode,
        constants["BN"] * 128 / (32 * warps),
        budget,
        bits,
    )


def variants() -> list[Variant]:
    """All of them."""
    mma_sync = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
    found = []
    for dtype in ("fp16", "bf16"):
        for bits, budget in ((2, 2.6), (3, 2.9), (4, 2.7), (8, 3.3)):
            found.append(_linear(f"decode-w{bits}-{dtype}", mma_sync, dtype, budget, BITS=bits, BM=8))
        found += [
            _linear(f"decode-w4-{dtype}-asym-g32", mma_sync, dtype, 3.6, GROUP=32, ZEROS=True),
            _linear(f"decode-w4-{dtype}-wide", mma_sync, dtype, 2.3, BN=128, BM=16),
            _linear(f"decode-w4-{dtype}-wgmma", ("sm_90",), dtype, 4.0, gluon=False, BM=64, BN=128,
                    warps=8, STAGES=3),
            _linear(f"prefill-w4-{dtype}-mma", ("sm_80", "sm_86", "sm_89"), dtype, 12.0, BM=128, BN=128,
                    warps=8, STAGES=2, SCALE_WEIGHTS=True, ZEROS=True),
            _linear(f"prefill-w4-{dtype}-wgmma", ("sm_90", "sm_100"), dtype, 8.0, gluon=False, BM=128,
                    BN=128, warps=8, STAGES=3, SCALE_WEIGHTS=True, ZEROS=True),
            _linear(f"decode-w4-{dtype}-mfma", ("gfx942",), dtype, 99.0, gluon=False, BM=16, STAGES=2,
                    ZEROS=True),
            _linear(f"prefill-w4-{dtype}-mfma", ("gfx942",), dtype, 99.0, gluon=False, BM=64, BN=128,
                    STAGES=2, SCALE_WEIGHTS=True, ZEROS=True),
        ]  # fmt: skip
    return found
