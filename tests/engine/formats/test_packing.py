"""Packing against one long integer per row, for every width and count that fills whole words."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nybble.engine.formats.packing import pack, unpack

from . import gptq_by_hand as by_hand


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 4), st.randoms(use_true_random=False))
def test_rows_are_streams_of_bits(num_bits: int, rows: int, words: int, random: object) -> None:
    count = words * 32 // num_bits
    while count * num_bits % 32:
        words += 1
        count = words * 32 // num_bits
    codes = [[random.randrange(2**num_bits) for _ in range(count)] for _ in range(rows)]  # type: ignore[attr-defined]
    expected = [by_hand.signed(by_hand.pack_bits(row, num_bits)) for row in codes]
    packed = pack(torch.tensor(codes, dtype=torch.uint8), num_bits)
    assert packed.tolist() == expected
    assert unpack(packed, num_bits, count).tolist() == codes
    strided = torch.tensor(expected, dtype=torch.int32).T.contiguous().T  # not contiguous
    assert unpack(strided, num_bits, count).tolist() == codes
