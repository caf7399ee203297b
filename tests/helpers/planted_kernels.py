"""Kernels that the compile gate must not let pass: each has one of the faults it looks for."""

import triton
import triton.language as tl
from nybble.kernels.triton.variants import Variant


@triton.jit
def faulty(
    x, words, out, M, N, K, CONVERT: tl.constexpr, REDUCE: tl.constexpr, REFUSE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BITS: tl.constexpr = 4,
):  # fmt: skip
    """out[n, m] of halves (or 4-bit codes, CONVERT), by dot or, REDUCE, by sums over lanes."""
    tl.static_assert(not REFUSE, "planted")
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    k = tl.arange(0, BK)
    acc = tl.zeros((BN, BM), tl.float32)
    for start in range(0, K, BK):
        if CONVERT:
            q = tl.load(words + n[:, None] * (K // 8) + (start + k[None, :]) // 8)
            w = ((q >> (k[None, :] % 8 * 4)) & 15).to(tl.float16)
        else:
            w = tl.load(words + n[:, None] * K + start + k[None, :])
        v = tl.load(x + (start + k[:, None]) + m[None, :] * K)
        if REDUCE:
            acc += tl.sum(w.to(tl.float32), 1)[:, None]
        acc = tl.dot(w, v, acc)
    tl.store(out + n[:, None] * M + m[None, :], acc)


@triton.jit
def scalar(
    x, words, out, M, N, K, CONVERT: tl.constexpr, REDUCE: tl.constexpr, REFUSE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BITS: tl.constexpr = 4,
):  # fmt: skip
    """Without a matrix instruction."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros((BN,), tl.float32)
    for k in range(0, K):
        acc += tl.load(words + n * K + k).to(tl.float32) * tl.load(x + k).to(tl.float32)
    tl.store(out + n, acc)


def variants() -> list[Variant]:
    """The name says the fault."""

    def planted(name: str, target: str = "sm_80", kernel: str = "faulty", **given: object) -> Variant:
        convert = bool(given.get("CONVERT"))
        warps, stages = (int(str(given.pop(key, value))) for key, value in (("warps", 4), ("stages", 2)))
        budget, aligned = given.pop("budget", 99.0), given.pop("aligned", ("M", "N", "K"))
        constants = {
            "CONVERT": False, "REDUCE": False, "REFUSE": False, "BM": 16, "BN": 64, "BK": 64, "BITS": 4,
        } | given  # fmt: skip
        signature = {"x": "*fp16", "words": "*i32" if convert else "*fp16", "out": "*fp32"}
        mma = {"sm_80": "HMMA.16816", "sm_90": "HGMMA", "gfx942": "v_mfma"}
        return Variant(
            name, f"planted_kernels:{kernel}", (target,),
            signature | dict.fromkeys("MNK", "i32"), constants, warps, stages, mma, True,
            64 * 64 / 128, budget, 4.125, aligned,  # type: ignore[arg-type]
        )  # fmt: skip

    return [
        planted("sound"),
        planted("sound-amd", "gfx942"),
        planted("spills", BM=256, BN=256),
        planted("shared-memory", BM=256, BK=128, stages=4, warps=8),
        planted("shared-memory-amd", "gfx942", BM=256, BN=128, BK=128, warps=8),
        planted("conversions", CONVERT=True),
        planted("shuffles", REDUCE=True),
        planted("narrow", aligned=()),
        planted("budget", budget=0.5),
        planted("no-mma", kernel="scalar"),
        planted("wrong-mma", "sm_90", BN=16),
        planted("refused", REFUSE=True),
    ]
