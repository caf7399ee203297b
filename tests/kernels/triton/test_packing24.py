"""Compressed weights are read back by the PTX ISA's definition of an MMA with sparsity."""

import pytest
import torch
from nybble.kernels.layout import PackedWeight, QuantSpec

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("a GPU is here: kernels are compiled, not interpreted", allow_module_level=True)
import triton_interpreter  # noqa: E402, F401
from nybble.kernels.triton import packing24  # noqa: E402


def sparse(rows: int, cols: int, most: int, dtype: torch.dtype | None = None) -> PackedWeight:
    """At most ``most`` of every four inputs are not zero; ``dtype`` None: 4-bit codes."""
    rng = torch.Generator().manual_seed(rows + most)
    kept = torch.rand(rows, -(-cols // 4), 4, generator=rng).argsort(-1) < most
    kept = kept.flatten(1)[:, :cols]
    if dtype is not None:
        return PackedWeight((torch.randn(rows, cols, generator=rng) * kept).to(dtype))
    codes = torch.where(kept, torch.randint(0, 16, (rows, cols), generator=rng), 8).to(torch.uint8)
    spec = QuantSpec(4, 128, True)
    return PackedWeight(codes, spec, torch.rand(rows, spec.num_groups(cols), generator=rng).half())


def element(packed: packing24.Sparse24Weight, n: int, k: int) -> float:
    """The value (or code minus 8) of output n and input k; 0 where it is not kept."""
    block, step, nt, upper, g = n // 64, k // 128, n % 64 // 16, n % 16 // 8, n % 8
    mma, column = k % 128 // 32, k % 32
    t = mma % 2 * 2 + column // 16
    fields = int(packed.meta[block, step, nt, g, t, mma // 2]) >> (16 * upper) & 0xFFFF
    for i in range(2):
        if fields >> (column % 16 // 4 * 4 + 2 * i) & 3 == column % 4:
            place = column // 4 * 2 + i  # of 16 kept ones
            register, lane = place // 8 * 2 + upper, place % 8 // 2
            if packed.bits == 4:
                word = int(packed.words[block, step, 0, nt, g, lane, mma])
                return (word >> (4 * register + place % 2 * 16) & 15) - 8
            pair = packed.words[block, step, register, nt, g, lane, mma].view(1).view(torch.float16)
            return float(pair[place % 2])
    return 0.0


@pytest.mark.parametrize("most", [0, 1, 2])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_every_value_stands_where_the_mma_has_it(dtype: torch.dtype | None, most: int) -> None:
    weight = sparse(70, 250, most, dtype)
    packed = packing24.pack24(weight, "cpu", torch.float16)
    values = weight.values.double() - (8 if dtype is None else 0)
    rng = torch.Generator().manual_seed(1)
    for _ in range(400):
        n, k = (int(torch.randint(0, size, (1,), generator=rng)) for size in values.shape)
        assert element(packed, n, k) == float(values[n, k])


def test_positions_ascend_as_ordered_metadata_must() -> None:
    for most in (0, 1, 2):
        packed = packing24.pack24(sparse(64, 128, most), "cpu", torch.float16)
        fields = packed.meta.long().flatten()[:, None] >> 4 * torch.arange(8)
        assert ((fields & 3) < (fields >> 2 & 3)).all()


def test_more_than_two_of_four_is_a_mistake() -> None:
    weight = sparse(64, 128, 2)
    weight.values[5, 4:8] = 1
    with pytest.raises(AssertionError):
        packing24.pack24(weight, "cpu", torch.float16)


def test_bytes_are_three_and_nine_bits_a_weight() -> None:
    codes = packing24.pack24(sparse(128, 1024, 2), "cpu", torch.float16)
    assert codes.nbytes * 8 == 128 * 1024 * 3 + 128 * 8 * 16
    halves = packing24.pack24(sparse(128, 1024, 2, torch.float16), "cpu", torch.float16)
    assert halves.nbytes * 8 == 128 * 1024 * 9
