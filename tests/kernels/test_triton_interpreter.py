"""The interpreter that proves the GPU kernels: every mistake that it is to find is planted, and found."""

from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("a GPU is here: kernels are compiled, not interpreted", allow_module_level=True)

import gluon_emulation  # noqa: E402
import ptx  # noqa: E402
import triton.language as tl  # noqa: E402
import triton_interpreter  # noqa: E402
from triton.experimental import gluon  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2  # noqa: E402

SPARSE_MMA = tl.constexpr(
    "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, "
    "{$8,$9,$10,$11}, {$16,$17,$18,$19}, $12, 0x1;"
)


@triton.jit
def arithmetic(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    b = tl.load(y + i)
    tl.store(out + i, a * b + a)


@triton.jit
def narrow(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def copy(x, out, n, B: tl.constexpr, MASKED: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(out + i, tl.load(x + i, mask=i < n) if MASKED else tl.load(x + i), mask=i < n)


@triton.jit
def overrun(out, n, B: tl.constexpr, ATOMIC: tl.constexpr):
    i = tl.arange(0, B)
    if ATOMIC:
        tl.atomic_add(out + i, 1)
    else:
        tl.store(out + i, i)


@triton.jit
def arrive(counter, order):
    place = tl.atomic_add(counter, 1)
    tl.store(order + place, tl.program_id(0) * tl.num_programs(1) + tl.program_id(1))


@triton.jit
def multiply(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m = tl.arange(0, M)
    n = tl.arange(0, N)
    k = tl.arange(0, K)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(left, right).to(c.dtype.element_ty))


@triton.jit
def magic(q, out, N: tl.constexpr):
    i = tl.arange(0, N)
    (low, high) = tl.inline_asm_elementwise(
        """{ .reg .b32 t, u; // two of eight codes
        lop3.b32 t, $2, 0x000f000f, 0x64006400, 0xea; sub.f16x2 $0, t, $3;
        shr.u32 u, $2, 4; lop3.b32 u, u, 0x000f000f, 0x64006400, 0xea;
        sub.f16x2 $1, u, $3; }""",
        "=r,=r,r,r",
        [tl.load(q + i), tl.full((N,), 0x64086408, tl.int32)],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    tl.store(out + 2 * i, low)
    tl.store(out + 2 * i + 1, high)


@gluon.jit
def staged(x, out, WAIT: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    i = gl.arange(0, 128, layout)
    memory = gl.allocate_shared_memory(x.dtype.element_ty, [2, 128], shared)
    for stage in gl.static_range(2):
        async_copy.async_copy_global_to_shared(memory.index(stage), x + stage * 128 + i)
        async_copy.commit_group()
    async_copy.wait_group(WAIT)
    gl.store(out + i, memory.index(0).load(layout) + memory.index(1).load(layout))


@gluon.jit
def tile(a, b, c, K: gl.constexpr):
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    rows = gl.arange(0, 16, gl.SliceLayout(1, mma))
    cols = gl.arange(0, 8, gl.SliceLayout(0, mma))
    k = gl.arange(0, K, gl.SliceLayout(0, mma))
    left = gl.load(a + rows[:, None] * K + k[None, :])
    right = gl.load(b + gl.arange(0, K, gl.SliceLayout(1, mma))[:, None] * 8 + cols[None, :])
    product = mma_v2(left, gl.convert_layout(right, mma), gl.zeros([16, 8], gl.float32, mma))
    gl.store(c + rows[:, None] * 8 + cols[None, :], product)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic_rounds_after_every_operation_as_torch_does(dtype: torch.dtype) -> None:
    x, y = random(4096, dtype=dtype), random(4096, dtype=dtype, seed=1)
    out = torch.empty_like(x)
    arithmetic[(1,)](x, y, out, 4096)
    assert torch.equal(out, x * y + x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_round_to_nearest_even(dtype: torch.dtype) -> None:
    x = torch.cat([random(4096), torch.tensor([3.4e38, -3.4e38, 1e-45, 0.0, float("inf"), float("nan")])])
    x = torch.cat([x, random(8192 - len(x)) * 1e-38])
    out = torch.empty(len(x), dtype=dtype)
    narrow[(1,)](x, out, len(x))
    assert torch.equal(out.isnan(), x.isnan())
    finite = ~x.isnan()
    assert torch.equal(out[finite].view(torch.int16), x[finite].to(dtype).view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot_sums_in_fp32(dtype: torch.dtype) -> None:
    a, b = random(16, 512, dtype=dtype), random(512, 32, dtype=dtype, seed=1)
    c = torch.empty(16, 32)
    multiply[(1,)](a, b, c, 16, 32, 512)
    exact = a.double() @ b.double()
    assert float((c.double() - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("part", ["whole", "view"])
def test_a_load_without_its_mask_is_found(part: str) -> None:
    storage = random(1000)
    x = storage[:100] if part == "view" else storage[:100].clone()
    out = torch.zeros(100)
    before = triton_interpreter.accesses()["load"]
    copy[(2,)](x, out, 100, B=64, MASKED=True)
    assert torch.equal(out, x)
    assert triton_interpreter.accesses()["load"] == before + 100
    with pytest.raises(Exception, match=r"OutOfBounds.*load: 28 of 64"):
        copy[(2,)](x, out, 100, B=64, MASKED=False)


@pytest.mark.parametrize(("atomic", "kind"), [(False, "store"), (True, "atomic")])
def test_a_store_or_atomic_past_the_end_is_found(atomic: bool, kind: str) -> None:
    memory = torch.zeros(64, dtype=torch.int32)
    overrun[(1,)](memory, 64, B=64, ATOMIC=atomic)
    with pytest.raises(Exception, match=f"OutOfBounds.*{kind}: 1 of 64"):
        overrun[(1,)](memory[:63], 63, B=64, ATOMIC=atomic)


def test_programs_run_in_a_random_order_each_once() -> None:
    orders = []
    triton_interpreter.shuffle(7)
    for _ in range(3):
        counter, order = torch.zeros(1, dtype=torch.int32), torch.full((24,), -1, dtype=torch.int32)
        arrive[(6, 4)](counter, order)
        orders.append(order.tolist())
    triton_interpreter.shuffle(7)
    counter, order = torch.zeros(1, dtype=torch.int32), torch.full((24,), -1, dtype=torch.int32)
    arrive[(6, 4)](counter, order)
    assert all(sorted(found) == list(range(24)) and found != sorted(found) for found in orders)
    assert orders[0] != orders[1] != orders[2]
    assert order.tolist() == orders[0]


def test_uninitialized_memory_is_poison() -> None:
    with triton_interpreter.poisoned_memory():
        assert torch.empty(5, dtype=torch.bfloat16).isnan().all()
        assert (torch.empty(5, dtype=torch.int32) == 2**31 - 1).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_inline_assembly_runs() -> None:
    q = torch.tensor([0x76543210, -0x01234568, 0, -1] * 16, dtype=torch.int32)
    out = torch.empty(64, 2, dtype=torch.int32)
    magic[(1,)](q, out, 64)
    words = q.numpy().view(np.uint32)[:, None, None] >> np.array([[0, 16], [4, 20]], np.uint32)
    expected = (words & 15).astype(np.float32) - 8
    assert np.array_equal(out.view(torch.float16).view(64, 2, 2).float().numpy(), expected)


def test_lop3_and_prmt_by_their_definitions() -> None:
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(0, 2**32, (3, 50), dtype=np.uint64).astype(np.uint32)
    for table, function in {
        0xEA: lambda a, b, c: (a & b) | c,
        0x96: lambda a, b, c: a ^ b ^ c,
        0xCA: lambda a, b, c: (a & b) | (~a & c),
        0x6A: lambda a, b, c: (a & b) ^ c,
    }.items():
        (found,) = ptx.run(f"lop3.b32 $0, $1, $2, $3, {table:#x};", [a, b, c], 1)
        assert np.array_equal(found, function(a, b, c)), hex(table)
    pair = (int(a[0]) | int(b[0]) << 32).to_bytes(8, "little")
    (found,) = ptx.run("prmt.b32 $0, $1, $2, 0x5140;", [a, b], 1)
    assert int(found[0]).to_bytes(4, "little") == bytes(pair[n] for n in (0, 4, 1, 5))
    (found,) = ptx.run("prmt.b32 $0, $1, $2, 0x9180;", [a, b], 1)
    signs = [255 if pair[n] & 128 else 0 for n in (0, 1)]
    assert int(found[0]).to_bytes(4, "little") == bytes([pair[0], signs[0], pair[1], signs[1]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packed_multiply_add_rounds_once(dtype: torch.dtype) -> None:
    a, b, c = (random(200, dtype=dtype, seed=n) for n in range(3))
    words = [t.view(torch.int32).numpy().view(np.uint32) for t in (a, b, c)]
    suffix = "bf16x2" if dtype == torch.bfloat16 else "f16x2"
    (found,) = ptx.run(f"fma.rn.{suffix} $0, $1, $2, $3;", words, 1)
    exact = (a.double() * b.double() + c.double()).to(dtype)
    assert np.array_equal(found, exact.view(torch.int32).numpy().view(np.uint32))


@pytest.mark.parametrize("text", ["vadd4.u32 $0, $1, $1;", "@p mov.b32 $0, $1;", "mov.b32 $0, q;"])
def test_what_is_not_emulated_raises(text: str) -> None:
    with pytest.raises(NotImplementedError, match="PTX"):
        ptx.run(text, [np.zeros(4, np.uint32)], 1)


def fragments(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> list[np.ndarray]:
    """Registers of a warp by the figures of the PTX ISA, lane by lane: A [16, 16], B [K, 8], C [16, 8]."""
    found: list[list[int]] = [[0] * 32 for _ in range(4 + len(b) // 8 + 4)]
    for lane in range(32):
        group, thread = divmod(lane, 4)
        for i in range(4):
            row, col = group + 8 * (i % 2), 2 * thread + 8 * (i // 2)
            found[i][lane] = int(np.float16(a[row, col : col + 2]).view(np.uint32)[0])
        for i in range(len(b) // 8):
            row = 2 * thread + 8 * i
            found[4 + i][lane] = int(np.ascontiguousarray(b[row : row + 2, group]).view(np.uint32)[0])
        for i in range(4):
            value = c[group + 8 * (i // 2), 2 * thread + i % 2]
            found[-4 + i][lane] = int(np.float32(value).view(np.uint32))
    return [np.array(register, np.uint32) for register in found]


def gathered(registers: list[np.ndarray]) -> np.ndarray:
    """[16, 8] from the accumulator's four registers."""
    out = np.zeros((16, 8), np.float32)
    for lane in range(32):
        for i in range(4):
            out[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2] = registers[i][lane : lane + 1].view(
                np.float32
            )[0]
    return out


def test_mma_multiplies() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((16, 16)).astype(np.float16), rng.standard_normal((16, 8)).astype(np.float16)
    c = rng.standard_normal((16, 8)).astype(np.float32)
    text = (
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, "
        "{$10,$11,$12,$13};"
    )
    found = gathered(ptx.run(text, fragments(a, b, c), 4))
    np.testing.assert_allclose(found, a.astype(np.float64) @ b.astype(np.float64) + c, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="32 lanes"):
        ptx.run(text, [r[:16] for r in fragments(a, b, c)], 4)


@pytest.mark.parametrize("selector", [0, 1])
def test_sparse_mma_multiplies(selector: int) -> None:
    rng = np.random.default_rng(2)
    kept, b = (
        rng.standard_normal((16, 16)).astype(np.float16),
        rng.standard_normal((32, 8)).astype(np.float16),
    )
    c = rng.standard_normal((16, 8)).astype(np.float32)
    places = np.sort(rng.random((16, 8, 4)).argsort(-1)[..., :2], -1)
    dense = np.zeros((16, 8, 4))
    np.put_along_axis(dense, places, kept.reshape(16, 8, 2).astype(np.float64), -1)
    metadata = rng.integers(0, 2**32, 32, dtype=np.uint64)  # lanes that are not selected hold garbage
    for row in range(8):
        for odd in range(2):
            part = places[:, 4 * odd : 4 * odd + 4].reshape(16, 8)
            halves = [sum(int(p) << 2 * i for i, p in enumerate(part[r])) for r in (row, row + 8)]
            metadata[4 * row + 2 * selector + odd] = halves[0] | halves[1] << 16
    registers = fragments(kept, b, c)
    text = SPARSE_MMA.value.replace("0x1;", f"{selector};").replace("$16,$17,$18,$19", "$13,$14,$15,$16")
    inputs = [*registers[:8], metadata.astype(np.uint32), *registers[8:]]
    found = gathered(ptx.run(text, inputs, 4))
    expected = dense.reshape(16, 32) @ b.astype(np.float64) + c
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    inputs[8] = np.zeros(32, np.uint32)  # both values of a pair at position 0
    with pytest.raises(ValueError, match="ascend"):
        ptx.run(text, inputs, 4)


def test_an_asynchronous_copy_lands_when_it_is_waited_for() -> None:
    x, out = random(256), torch.empty(128)
    staged[(1,)](x, out, WAIT=0)
    assert torch.equal(out, x[:128] + x[128:])
    staged[(1,)](x, out, WAIT=1)
    assert out.isnan().all()


def test_shared_memory_has_an_end() -> None:
    memory = gluon_emulation.SharedMemory.allocate(tl.float16, [2, 8], None)
    with pytest.raises(IndexError, match="2 of 2"):
        memory.index(2)


def test_gluon_multiplies() -> None:
    a, b = random(16, 64, dtype=torch.bfloat16), random(64, 8, dtype=torch.bfloat16, seed=1)
    c = torch.empty(16, 8)
    tile[(1,)](a, b, c, K=64)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_a_kernel_compiled_before_is_refused(monkeypatch: Any) -> None:
    """Its launches would need a GPU, or worse, would not be checked."""
    module = type(triton)("nybble.kernels.triton.early")
    module.early = triton.runtime.JITFunction(copy.fn)
    monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
    with pytest.raises(RuntimeError, match=r"early\.early"):
        triton_interpreter._install()
