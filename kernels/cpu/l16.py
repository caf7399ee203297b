"""L16: the packed layout of low-bit weights for CPU kernels, one for AVX2 and AVX-512.

Blocks of 16 output rows x groups of 32 inputs. A vector is 64 bytes, byte 4 * r + t belongs to row r of 16;
a *quad* q (0..7) is the inputs k = 4 * q + t (t in 0..3) of the group, the four bytes one lane of an int8
dot product takes. AVX-512 reads a vector whole, AVX2 reads its halves (rows 0-7 and 8-15).

bits  vectors of a group  what byte 4 * r + t of vector j holds
8     8                   quad j
4     4                   quads 2j (low nibble) and 2j + 1 (high nibble)
2     2                   quads 4j .. 4j + 3, two bits each, lowest first
3     3                   quads 3j and 3j + 1 at bits 0 and 3; bits 6 and 7 of vectors 0 and 1 are the low two
                          bits of quads 2 and 5, those of vector 2 their high bits

scales, zeros: fp16, [N / 16, K / 32, 16]. N is padded to 16 and K to 32 with scale 0.
"""

import numpy as np
from numpy.typing import NDArray

ROWS = 16
GROUP = 32
GROUP_BYTES = {2: 128, 3: 192, 4: 256, 8: 512}


def padded(size: int, multiple: int) -> int:
    """``size`` rounded up."""
    return -(-size // multiple) * multiple


def pack_codes(codes: NDArray[np.uint8], num_bits: int) -> NDArray[np.uint8]:
    """Codes [N, K] (N % 16 == 0, K % 32 == 0) to bytes [N / 16, K / 32, GROUP_BYTES[num_bits]]."""
    rows, cols = codes.shape
    assert rows % ROWS == 0
    assert cols % GROUP == 0
    blocked = codes.reshape(rows // ROWS, ROWS, cols // GROUP, 8, 4)
    quads = blocked.transpose(0, 2, 3, 1, 4)  # block, group, quad, row, t
    packed = _threes(quads) if num_bits == 3 else _interleaved(quads, num_bits)
    return np.ascontiguousarray(packed).reshape(rows // ROWS, cols // GROUP, GROUP_BYTES[num_bits])


def _interleaved(quads: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """[block, group, 8, row, t] of ``bits``-bit codes to [block, group, bits, row, t], 8 / bits in a byte."""
    per_byte = 8 // bits
    packed = quads[:, :, 0::per_byte].copy()
    for position in range(1, per_byte):
        packed |= quads[:, :, position::per_byte] << (bits * position)
    return packed


def _threes(quads: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[block, group, 8, row, t] of 3-bit codes to [block, group, 3, row, t]."""
    packed = quads[:, :, 0::3].copy()
    packed |= quads[:, :, 1::3] << 3
    packed[:, :, :2] |= quads[:, :, 2::3] << 6  # a byte keeps the low two bits
    packed[:, :, 2] |= quads[:, :, 2] >> 2 << 6 | quads[:, :, 5] >> 2 << 7
    return packed


def pack_per_group(values: NDArray[np.float16]) -> NDArray[np.float16]:
    """Scales or zero points [N, K / 32] to [N / 16, K / 32, 16]."""
    rows, groups = values.shape
    return np.ascontiguousarray(values.reshape(rows // ROWS, ROWS, groups).transpose(0, 2, 1))
