"""Unpacking as PTX: every code with every zero point, exactly."""

import itertools
from typing import Any

import numpy as np
import ptx
import pytest

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("a GPU is here: kernels are compiled, not interpreted", allow_module_level=True)
import triton_interpreter  # noqa: E402, F401
from nybble.kernels.triton import fragments  # noqa: E402

KINDS = list(itertools.product((2, 3, 4, 8), (False, True)))


def words_of(codes: "np.ndarray[Any, Any]", bits: int) -> list["np.ndarray[Any, Any]"]:
    """codes: [n, registers, 2] -> the words of n units."""
    words = np.zeros((fragments.words_per_unit(bits), len(codes)), np.uint32)
    for register in range(codes.shape[1]):
        for half in range(2):
            code = codes[:, register, half].astype(np.uint32)
            if bits == 3 and register == 15:
                for bit in range(3):
                    words[bit] |= (code >> bit & 1) << (15 + 16 * half)
            else:
                word, first = fragments.fields(bits)[register]
                words[word] |= code << (first + 16 * half)
    return list(words)


def floats(registers: list["np.ndarray[Any, Any]"], bf16: bool) -> "np.ndarray[Any, Any]":
    """[n, registers, 2]."""
    raw = np.stack(registers, 1).astype(np.uint32).view(np.uint16).reshape(len(registers[0]), -1, 2)
    return ptx.bits_to_bf16(raw) if bf16 else raw.view(np.float16).astype(np.float32)


@pytest.mark.parametrize(("bits", "bf16"), KINDS)
def test_every_code_meets_every_zero_exactly(bits: int, bf16: bool) -> None:
    rng = np.random.default_rng(bits)
    registers = 4 * fragments.fragments_per_unit(bits)
    # A zero point of 2**bits comes from checkpoints that store it minus one.
    zeros = np.arange(2**bits + (bits < 8))
    codes = rng.integers(0, 2**bits, (len(zeros) * 2**bits, registers, 2))
    codes[:, 0, 0] = np.tile(np.arange(2**bits), len(zeros))
    zero = np.repeat(zeros, 2**bits)
    other = rng.permutation(zero)
    operands = [*words_of(codes, bits), zero.astype(np.uint32), other.astype(np.uint32)]
    found = floats(ptx.run(fragments.dequant_ptx(bits, bf16, True, False), operands, registers), bf16)
    by_row = np.where(np.arange(registers)[None, :, None] % 2, other[:, None, None], zero[:, None, None])
    np.testing.assert_array_equal(found, codes - by_row)


@pytest.mark.parametrize(("bits", "bf16"), KINDS)
def test_without_zeros_codes_are_centred(bits: int, bf16: bool) -> None:
    registers = 4 * fragments.fragments_per_unit(bits)
    codes = np.random.default_rng(0).integers(0, 2**bits, (500, registers, 2))
    text = fragments.dequant_ptx(bits, bf16, False, False)
    found = floats(ptx.run(text, words_of(codes, bits), registers), bf16)
    np.testing.assert_array_equal(found, codes - 2 ** (bits - 1))


@pytest.mark.parametrize(("bits", "bf16"), KINDS)
def test_scales_round_once(bits: int, bf16: bool) -> None:
    registers = 4 * fragments.fragments_per_unit(bits)
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 2**bits, (200, registers, 2))
    scales = rng.random((2, 200)).astype(np.float32) * 0.02
    halves = (
        ptx.bf16_to_bits(scales) if bf16 else scales.astype(np.float16).view(np.uint16)
    ).astype(np.uint32)  # fmt: skip
    operands = [*words_of(codes, bits), *(halves * 0x10001)]
    found = floats(ptx.run(fragments.dequant_ptx(bits, bf16, False, True), operands, registers), bf16)
    exact = (
        ptx.bits_to_bf16(halves.astype(np.uint16)) if bf16 else scales.astype(np.float16).astype(np.float32)
    )
    product = (codes - 2 ** (bits - 1)) * exact[np.arange(registers) % 2].T[:, :, None]
    rounded = ptx.round_bf16(product) if bf16 else product.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(found, rounded)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_step_is_eight_fragments(bits: int) -> None:
    units = fragments.vector(bits) * fragments.vectors(bits)
    assert units * fragments.fragments_per_unit(bits) == 8
    assert units * fragments.words_per_unit(bits) * 32 == 8 * 8 * bits  # bits of a lane's codes
