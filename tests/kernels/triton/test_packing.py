"""Packed weights are read back with a fragment's definition, which shares no code with the packing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nybble.kernels.layout import PackedWeight, QuantSpec, SparseOverlay

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("a GPU is here: kernels are compiled, not interpreted", allow_module_level=True)
import triton_interpreter  # noqa: E402, F401
from nybble.kernels.triton import fragments, packing  # noqa: E402


def weight(
    shape: tuple[int, int], bits: int = 4, group: int = 128, symmetric: bool = False, shuffled: bool = False
) -> PackedWeight:
    rng = torch.Generator().manual_seed(bits + shape[0])
    spec = QuantSpec(bits, group, symmetric, "group" if shuffled else "none")
    groups = spec.num_groups(shape[1])
    order = torch.randperm(shape[1], generator=rng)
    return PackedWeight(
        torch.randint(0, 2**bits, shape, generator=rng, dtype=torch.uint8),
        spec,
        torch.rand(shape[0], groups, generator=rng).half(),
        None
        if symmetric
        else torch.randint(0, 2**bits, (shape[0], groups), generator=rng, dtype=torch.uint8),
        (torch.arange(shape[1]) // group)[order].int() if shuffled else None,
    )


def code_at(words: torch.Tensor, bits: int, n: int, k: int) -> int:
    """The code of output n and input k, by the fragment of m16n8k16 and the table in ``packing``."""
    per_unit, v = fragments.fragments_per_unit(bits), fragments.vector(bits)
    fragment, column = k % 128 // 16, k % 16
    unit = fragment // per_unit
    register = 4 * (fragment % per_unit) + 2 * (column // 8) + n % 16 // 8
    g, t, half = n % 8, column % 8 // 2, column % 2
    lane = words[n // 64, k // 128, unit // v, :, n % 64 // 16, g, t, unit % v].tolist()
    if bits == 3 and register == 15:
        return sum((lane[j] >> (15 + 16 * half) & 1) << j for j in range(3))
    per_word = 16 // bits
    return int(lane[register // per_word] >> (bits * (register % per_word) + 16 * half) & (2**bits - 1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_stand_where_the_fragment_has_them(bits: int) -> None:
    w = weight((80, 256), bits)
    words = packing.pack(w, "cpu", torch.float16).words
    assert words.numel() * 32 == 128 * 256 * bits
    rng = torch.Generator().manual_seed(0)
    for _ in range(300):
        n, k = (int(torch.randint(0, size, (1,), generator=rng)) for size in w.values.shape)
        assert code_at(words, bits, n, k) == int(w.values[n, k])


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([-1, 8, 32, 40, 64, 96, 128, 256]),
    outs=st.integers(1, 70),
    ins=st.integers(1, 600),
    shuffled=st.booleans(),
)
def test_every_input_keeps_its_scale_and_zero(
    bits: int, group: int, outs: int, ins: int, shuffled: bool
) -> None:
    w = weight((outs, ins), bits, group if group > 0 else ins, shuffled=shuffled)
    packed = packing.pack(w, "cpu", torch.float16)
    order = torch.arange(ins) if packed.order is None else packed.order.long()
    assert len(order) == packed.inputs
    real = order < ins
    assert order[real].sort().values.tolist() == list(range(ins))
    part = torch.arange(len(order)) // packed.group if packed.group else torch.zeros(len(order)).long()
    g = w.group_of_inputs()[order[real]]
    assert w.scales is not None and w.zeros is not None and packed.zeros is not None
    assert torch.equal(packed.scales[part[real], :outs].T, w.scales[:, g])
    assert torch.equal(packed.zeros[part[real], :outs].T, w.zeros[:, g])
    assert not packed.scales[:, outs:].any()
    n, at = outs - 1, int(real.nonzero()[-1])
    assert code_at(packed.words, packed.bits, n, at) == int(w.values[n, order[at]])


@pytest.mark.parametrize(
    ("bits", "group", "ins", "expected"),
    [
        *((4, group, 512, part) for group, part in ((128, 128), (256, 128), (64, 64), (32, 32), (512, 0))),
        *((4, group, ins, part) for group, ins, part in ((48, 480, 64), (128, 4128, 128), (160, 640, 32))),
        (3, 32, 256, 32),
    ],
)
def test_parts_are_as_large_as_groups_allow(bits: int, group: int, ins: int, expected: int) -> None:
    packed = packing.pack(weight((16, ins), bits, group), "cpu", torch.float16)
    assert packed.group == expected
    assert packed.bits == (4 if (bits, group) == (3, 32) else bits)


def test_inputs_move_only_where_they_must() -> None:
    assert packing.pack(weight((16, 256)), "cpu", torch.float16).order is None
    for w in (weight((16, 250)), weight((16, 256), group=48), weight((16, 256), shuffled=True)):
        assert packing.pack(w, "cpu", torch.float16).order is not None


def test_scales_keep_the_narrowest_type_that_is_exact() -> None:
    for value, dtype in ((0.5, torch.float16), (2.0**100, torch.bfloat16), (1 + 2**-20, torch.float32)):
        w = weight((16, 128))
        exact = PackedWeight(w.values, w.spec, torch.full((16, 1), value), w.zeros)
        packed = packing.pack(exact, "cpu", torch.bfloat16)
        assert packed.scales.dtype == dtype
        assert float(packed.scales[0, 0]) == torch.tensor(value).item()


def test_an_overlay_is_the_same_matrix_in_chunks() -> None:
    rng = torch.Generator().manual_seed(3)
    dense = torch.randn(150, 300, generator=rng) * (torch.rand(150, 300, generator=rng) < 0.02)
    dense[70] = 1.0  # heavy
    w = weight((150, 300), shuffled=True)
    w = PackedWeight(w.values, w.spec, w.scales, w.zeros, w.g_idx, None, SparseOverlay.of(dense))
    packed = packing.pack(w, "cpu", torch.float16)
    assert packed.overlay is not None and packed.order is not None
    starts, values, rows, cols = packed.overlay.tensors
    assert values.dtype == torch.float16
    found = torch.zeros(192, packed.inputs)
    for block in range(3):
        for chunk in range(int(starts[block]), int(starts[block + 1])):
            for group in range(4):
                row = 64 * block + 16 * group + rows[chunk, group].long()
                found.index_put_(
                    (row, cols[chunk, group].long()), values[chunk, group].float(), accumulate=True
                )
    arranged = torch.nn.functional.pad(dense.half().float(), (0, 1))[:, packed.order.long()]
    assert torch.equal(found[:150], arranged)
    assert int(starts[-1]) <= -(-(300 + 0.02 * 300 * 16) // 32) + 3 * 6


def test_bytes_are_those_of_the_bits() -> None:
    packed = packing.pack(weight((4096, 4096), symmetric=True), "cpu", torch.float16)
    assert packed.nbytes == 4096 * 4096 // 2 + 4096 * 32 * 2
