"""Codes of 1 to 8 bits in int32 words, as one little-endian, least-significant-bit-first stream per row.

Where 32 is a multiple of the width this is "element j at bit ``b * j`` of its word"; for 3 bits it is the
96-bit stream of the GPTQ family (32 codes in 3 words, two of them straddling). The work is done on bytes,
in the smallest units of whole codes and whole bytes: 2 codes in 1 byte for 4 bits, 8 in 3 for 3 bits.
"""

import math
import sys

import torch
from torch import Tensor


def unpack(words: Tensor, num_bits: int, count: int) -> Tensor:
    """[rows, count * num_bits / 32] int32 -> codes [rows, count] uint8."""
    assert sys.byteorder == "little", "checkpoints are little-endian; this host is not"
    assert words.dtype == torch.int32
    assert words.shape[1] * 32 == count * num_bits
    codes_per_unit, bytes_per_unit = _unit(num_bits)
    stream = words.contiguous().view(torch.uint8).view(words.shape[0], -1, bytes_per_unit)
    codes = torch.empty(*stream.shape[:2], codes_per_unit, dtype=torch.uint8, device=words.device)
    for j in range(codes_per_unit):
        byte, shift = divmod(j * num_bits, 8)
        field = stream[:, :, byte] >> shift
        if shift + num_bits > 8:
            field |= stream[:, :, byte + 1] << (8 - shift)
        codes[:, :, j] = field & (2**num_bits - 1)
    return codes.view(words.shape[0], count)


def pack(codes: Tensor, num_bits: int) -> Tensor:
    """Codes [rows, count] uint8, each below 2**num_bits -> [rows, count * num_bits / 32] int32."""
    assert sys.byteorder == "little", "checkpoints are little-endian; this host is not"
    rows, count = codes.shape
    assert codes.dtype == torch.uint8
    assert count * num_bits % 32 == 0
    codes_per_unit, bytes_per_unit = _unit(num_bits)
    grouped = codes.reshape(rows, -1, codes_per_unit)
    stream = torch.zeros(*grouped.shape[:2], bytes_per_unit, dtype=torch.uint8, device=codes.device)
    for j in range(codes_per_unit):
        byte, shift = divmod(j * num_bits, 8)
        stream[:, :, byte] |= grouped[:, :, j] << shift
        if shift + num_bits > 8:
            stream[:, :, byte + 1] |= grouped[:, :, j] >> (8 - shift)
    return stream.view(rows, -1).view(torch.int32)


def _unit(num_bits: int) -> tuple[int, int]:
    """Codes and bytes of the smallest unit that ends on a byte's border."""
    common = math.gcd(num_bits, 8)
    return 8 // common, num_bits // common
