"""What only a device can confirm of the PTX ISA as we read it; run first by ``make gpu-check``.

The same kernels run in the interpreter where there is no GPU: so the test itself is tested.
"""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
INTERPRETED = bool(triton.knobs.runtime.interpret)
if INTERPRETED:
    import triton_interpreter  # noqa: F401
from triton.experimental import gluon  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402

SEED = int(os.environ.get("NYBBLE_TEST_SEED", "0"))
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_device = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device and no interpreter"
)
needs_sparse_mma = pytest.mark.skipif(torch.version.hip is not None, reason="AMD's GPUs have no mma.sp")
# Outputs $0-3; A $4-7, B $8-11, metadata $12-15 (the first is read), C $16-19.
ASM = gl.constexpr(
    "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, "
    "{$8,$9,$10,$11}, {$16,$17,$18,$19}, $12, SELECTOR;"
)
CLASSES = gl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f")
SELECT_0 = gl.constexpr(ASM.value.replace("SELECTOR", "0"))
SELECT_1 = gl.constexpr(ASM.value.replace("SELECTOR", "1"))


@gluon.jit
def multiply(a, b, meta, out, SELECTOR: gl.constexpr):
    """One mma.sp. a, b: int32 [1, 32, 4], a warp's registers; meta: int32 [32]; out: fp32 [16, 8]."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [1, 1, 1], [2, 1, 0])
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    lane = gl.expand_dims(gl.expand_dims(lane, 0), 2)
    r = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    r = gl.expand_dims(gl.expand_dims(r, 0), 1)
    place = lane * 4 + r
    zero = gl.zeros([1, 32, 4], gl.float32, layout)
    asm: gl.constexpr = SELECT_1 if SELECTOR else SELECT_0
    d = gl.inline_asm_elementwise(
        asm, CLASSES, [gl.load(a + place), gl.load(b + place), gl.load(meta + lane + r * 0), zero],
        dtype=gl.float32, is_pure=True, pack=4,
    )  # fmt: skip
    gl.store(out + (lane // 4 + 8 * (r // 2)) * 8 + 2 * (lane % 4) + r % 2, d)


def registers(tile: torch.Tensor) -> torch.Tensor:
    """int32 [1, 32, 4] of A's kept values [16, 16] or of B transposed [8, 32], both fp16."""
    lane = torch.arange(32)
    group, thread = lane // 4, lane % 4
    words = tile.contiguous().view(torch.int32)  # pairs along the row
    if tile.shape == (16, 16):
        found = [words[group + 8 * (i % 2), thread + 4 * (i // 2)] for i in range(4)]
    else:
        found = [words[group, thread + 4 * i] for i in range(4)]
    return torch.stack(found, -1)[None].contiguous()


def metadata(places: torch.Tensor, selector: int, filler: torch.Tensor) -> torch.Tensor:
    """int32 [32]: of positions [16, 8, 2]; the lanes that are not selected hold ``filler``."""
    bits = (places.flatten(1) << 2 * torch.arange(16)).view(16, 2, 8).sum(-1)  # [row, half], each of 16 bits
    halves = bits >> torch.tensor([0, 16])
    out = filler.clone()
    for odd in range(2):
        for row in range(8):
            out[4 * row + 2 * selector + odd] = int(halves[row, odd]) | int(halves[row + 8, odd]) << 16
    return torch.where(out >= 2**31, out - 2**32, out).int()


@needs_device
@needs_sparse_mma
@pytest.mark.gpu
@pytest.mark.parametrize("selector", [0, 1])
def test_metadata_order_of_sparse_mma(selector: int) -> None:
    check(selector)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU is here: the test above runs on it")
@pytest.mark.parametrize("selector", [0, 1])
def test_metadata_order_as_emulated(selector: int) -> None:
    check(selector)


def check(selector: int) -> None:
    rng = torch.Generator().manual_seed(SEED + selector)
    kept = torch.randn(16, 16, generator=rng).half()
    b = torch.randn(8, 32, generator=rng).half()
    places = torch.rand(16, 8, 4, generator=rng).argsort(-1)[..., :2].sort(-1).values
    filler = torch.randint(0, 2**32, (32,), generator=rng)
    dense = torch.zeros(16, 8, 4, dtype=torch.float64)
    dense.scatter_(2, places, kept.double().view(16, 8, 2))
    out = torch.full((16, 8), float("nan"), device=DEVICE)
    operands = (registers(kept), registers(b), metadata(places, selector, filler))
    multiply[(1,)](*(t.to(DEVICE) for t in operands), out, SELECTOR=selector, num_warps=1)
    expected = dense.view(16, 32) @ b.double().T
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-4, atol=1e-4)
