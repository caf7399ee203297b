"""The GPTQ family's files, written and read bit by bit from their specification: slow and obvious.

A column (or row) of packed words is one integer whose bit 0 is the lowest bit of the first word; element j
occupies the ``bits`` bits from ``bits * j``.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.int32]


@dataclass
class Module:
    """One module's numbers. codes: [K, N]; zeros, scales: [G, N]; g_idx: [K]."""

    bits: int
    codes: NDArray[np.int64]
    zeros: NDArray[np.int64]
    scales: NDArray[np.float16]
    g_idx: NDArray[np.int32]

    def weights(self) -> NDArray[np.float32]:
        """[N, K] fp32: scales * (codes - zeros), element by element."""
        count, outputs = self.codes.shape
        found = np.empty((outputs, count), np.float32)
        for k in range(count):
            g = self.g_idx[k]
            found[:, k] = np.float32(self.scales[g]) * np.float32(self.codes[k] - self.zeros[g])
        return found


def make_module(
    rng: np.random.Generator, bits: int, shape: tuple[int, int], group: int, symmetric: bool, actorder: bool
) -> Module:
    """Random numbers for [N, K] weights. Asymmetric zero points take every value, 0 included."""
    outputs, count = shape
    size = count if group == -1 else group
    groups = -(-count // size)
    g_idx = (np.arange(count) // size).astype(np.int32)
    zeros = np.full((groups, outputs), 2 ** (bits - 1))
    if not symmetric:
        zeros = rng.integers(0, 2**bits, (groups, outputs))
    return Module(
        bits,
        rng.integers(0, 2**bits, (count, outputs)),
        zeros,
        rng.uniform(0.001, 0.1, (groups, outputs)).astype(np.float16),
        rng.permutation(g_idx) if actorder else g_idx,
    )


def pack_bits(values: NDArray[np.int64], bits: int) -> list[int]:
    """Elements of ``bits`` bits -> unsigned 32-bit words."""
    stream = 0
    for j, value in enumerate(values):
        stream |= int(value) << (bits * j)
    return [(stream >> (32 * r)) & 0xFFFFFFFF for r in range(len(values) * bits // 32)]


def unpack_bits(words: list[int], bits: int) -> list[int]:
    """Unsigned 32-bit words -> all their elements."""
    stream = 0
    for r, word in enumerate(words):
        stream |= word << (32 * r)
    return [(stream >> (bits * j)) & (2**bits - 1) for j in range(len(words) * 32 // bits)]


def signed(words: list[int]) -> list[int]:
    """The same bits as int32."""
    return [word - 2**32 if word >= 2**31 else word for word in words]


def store(module: Module, version: str) -> dict[str, NDArray[np.generic]]:
    """The tensors as GPTQModel stores them: v1 subtracts one from each zero, in whole words (not 3 bits)."""
    bits, outputs = module.bits, module.codes.shape[1]
    columns = [signed(pack_bits(module.codes[:, n], bits)) for n in range(outputs)]
    rows = [_store_zeros(row, bits, version) for row in module.zeros]
    return {
        "qweight": np.array(columns, np.int32).T.copy(),
        "qzeros": np.array(rows, np.int32),
        "scales": module.scales,
        "g_idx": module.g_idx,
    }


def _store_zeros(row: NDArray[np.int64], bits: int, version: str) -> list[int]:
    if version == "gptq_v2":
        return signed(pack_bits(row, bits))
    if bits == 3:
        return signed(pack_bits((row - 1) % 8, bits))
    ones = sum(1 << (bits * j) for j in range(32 // bits))
    return signed([(word - ones) % 2**32 for word in pack_bits(row, bits)])


def load(tensors: dict[str, NDArray[np.generic]], bits: int, version: str) -> Module:
    """The numbers of stored tensors."""
    qweight, qzeros = tensors["qweight"].astype(np.int64), tensors["qzeros"].astype(np.int64)
    codes = [unpack_bits([int(w) % 2**32 for w in qweight[:, n]], bits) for n in range(qweight.shape[1])]
    zeros = [_load_zeros([int(w) % 2**32 for w in row], bits, version) for row in qzeros]
    return Module(
        bits,
        np.array(codes).T,
        np.array(zeros),
        tensors["scales"].astype(np.float16),
        tensors["g_idx"].astype(np.int32),
    )


def _load_zeros(words: list[int], bits: int, version: str) -> list[int]:
    if version == "gptq_v2":
        return unpack_bits(words, bits)
    if bits == 3:
        return [(zero + 1) % 8 for zero in unpack_bits(words, bits)]
    ones = sum(1 << (bits * j) for j in range(32 // bits))
    return unpack_bits([(word + ones) % 2**32 for word in words], bits)
