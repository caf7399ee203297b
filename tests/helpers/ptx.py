"""Runs the PTX of inline assembly on numpy arrays, instruction by instruction, as the PTX ISA defines it.

A register holds one uint32 per lane: an array whose last axis is the lanes where an instruction needs a warp
(mma). What is not in ``_OPS`` raises NotImplementedError: nothing is guessed.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def round_bf16(x: Array) -> Array:
    """float32 of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), np.float32(np.nan), rounded.view(np.float32))


def bf16_to_bits(x: Array) -> Array:
    """uint16 of float32 values, rounded."""
    return (round_bf16(x).view(np.uint32) >> 16).astype(np.uint16)


def bits_to_bf16(bits: Array) -> Array:
    """float32 of uint16."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def registers(raw: Array, pack: int) -> list[Array]:
    """The 32-bit registers in which ``pack`` elements, neighbours along the last axis, are handed over.

    Two halves share a register. Where a thread holds the whole last axis, the registers' last axis is the one
    before it: the lanes.
    """
    raw = np.ascontiguousarray(raw)
    size = raw.dtype.itemsize * pack
    if size < 4 and pack == 1:
        return [raw.view(f"u{size}").astype(np.uint32)]
    if raw.dtype.itemsize > 4 or size % 4 or raw.shape[-1] % pack:
        raise NotImplementedError(f"inline asm with {pack} elements of {raw.dtype} {raw.shape}")
    words = raw.view(np.uint32)
    words = words.reshape(*words.shape[:-1], -1, size // 4)
    if words.shape[-2] == 1 and words.ndim > 2:
        words = words[..., 0, :]
    return list(np.moveaxis(words, -1, 0))


def elements(found: list[Array], dtypes: Sequence[Any], pack: int, shape: tuple[int, ...]) -> list[Array]:
    """The reverse of ``registers`` for several tensors of ``shape``, one after another."""
    tensors, place = [], 0
    for dtype in dtypes:
        count = max(1, dtype.itemsize * pack // 4)
        words = np.stack(found[place : place + count], -1)
        place += count
        narrow = dtype.itemsize * pack < 4
        flat = words.astype(f"u{dtype.itemsize}") if narrow else np.ascontiguousarray(words)
        tensors.append(flat.view(dtype).reshape(shape))
    if place != len(found):
        raise ValueError(f"inline asm: {len(found)} output registers, {place} were expected")
    return tensors


def run(text: str, inputs: Sequence[Array], num_outputs: int) -> list[Array]:
    """The outputs ``$0`` ... of the assembly ``text`` whose inputs are the registers after them, in order."""
    registers: dict[str, Array] = {f"${num_outputs + i}": value for i, value in enumerate(inputs)}
    lanes = np.broadcast_shapes(*(value.shape for value in inputs))
    for statement in _statements(text):
        _execute(statement, registers, lanes)
    return [np.broadcast_to(registers[f"${i}"], lanes) for i in range(num_outputs)]


def _statements(text: str) -> list[str]:
    """Instructions without scopes, declarations and comments. Scopes nest; a name is used for one thing."""
    found = []
    for part in re.sub(r"//[^\n]*", "", text).split(";"):
        part = part.strip()
        while part.startswith("{") and part.count("{") > part.count("}"):
            part = part[1:].strip()
        while part.startswith("}"):
            part = part[1:].strip()
        if part and not part.startswith(".reg"):
            found.append(re.sub(r"\s+", " ", part))
    return found


def _execute(statement: str, registers: dict[str, Array], lanes: tuple[int, ...]) -> None:
    name, _, rest = statement.partition(" ")
    operands = [o.strip() for o in re.findall(r"\{[^}]*\}|[^,\s{}]+", rest) if o.strip()]
    if name.startswith("@") or not operands:
        raise NotImplementedError(f"PTX: {statement}")

    def value(operand: str) -> Array:
        if operand in registers:
            return registers[operand]
        if operand.startswith("0f"):
            return np.uint32(int(operand[2:], 16))
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)", operand):
            return np.uint32(int(operand, 0) & 0xFFFFFFFF)
        raise NotImplementedError(f"PTX: operand {operand} in {statement}")

    target, sources = operands[0], operands[1:]
    if name.startswith("mma."):
        vectors = [[value(v.strip()) for v in s.strip("{}").split(",")] for s in sources]
        results = _mma(name, [[np.broadcast_to(r, lanes) for r in v] for v in vectors])
        registers.update(zip((v.strip() for v in target.strip("{}").split(",")), results, strict=True))
    elif target.startswith("{"):  # mov.b32 {low, high}, x
        word = value(sources[0])
        low, high = (v.strip() for v in target.strip("{}").split(","))
        registers[low], registers[high] = word & np.uint32(0xFFFF), word >> np.uint32(16)
    elif sources and sources[0].startswith("{"):  # mov.b32 x, {low, high}
        low, high = (value(v.strip()) for v in sources[0].strip("{}").split(","))
        registers[target] = (low & np.uint32(0xFFFF)) | (high << np.uint32(16))
    else:
        operation = next((f for pattern, f in _OPS.items() if re.fullmatch(pattern, name)), None)
        if operation is None:
            raise NotImplementedError(f"PTX: {name}")
        result = operation(*(np.asarray(value(s)) for s in sources))
        registers[target] = np.asarray(result).astype(np.uint32, copy=False)


def _signed(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *args: function(*(a.view(np.int32) for a in args)).astype(np.int32).view(np.uint32)


def _wide(function: Callable[..., Any]) -> Callable[..., Array]:
    return lambda *args: (function(*(a.astype(np.uint64) for a in args)) & 0xFFFFFFFF).astype(np.uint32)


def _shift(left: bool) -> Callable[[Array, Array], Array]:
    def shift(x: Array, by: Array) -> Array:
        by = np.minimum(by, 32).astype(np.uint64)  # PTX clamps; numpy would not
        wide = x.astype(np.uint64)
        return ((wide << by) & 0xFFFFFFFF if left else wide >> by).astype(np.uint32)

    return shift


def _half2(function: Callable[..., Array], bf16: bool) -> Callable[..., Array]:
    """An operation on two halves of a register, rounded once."""
    read: Callable[[Array], Array] = bits_to_bf16 if bf16 else lambda bits: bits.view(np.float16)

    def parts(x: Array) -> tuple[Array, Array]:
        low, high = (x & np.uint32(0xFFFF)).astype(np.uint16), (x >> np.uint32(16)).astype(np.uint16)
        return (read(low), read(high))

    def bits(x: Array) -> Array:
        with np.errstate(over="ignore"):
            return bf16_to_bits(x) if bf16 else x.astype(np.float16).view(np.uint16)

    def operation(*args: Array) -> Array:
        halves = zip(*(parts(np.ascontiguousarray(a)) for a in args), strict=True)
        low, high = (bits(function(*(h.astype(np.float64) for h in half))) for half in halves)
        return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))

    return operation


def _float(function: Callable[..., Array]) -> Callable[..., Array]:
    """An operation on fp32 registers, rounded once."""

    def operation(*args: Array) -> Array:
        wide = (np.ascontiguousarray(a).view(np.float32).astype(np.float64) for a in args)
        return np.asarray(function(*wide)).astype(np.float32).view(np.uint32)

    return operation


def lop3(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Any function of three bits: bit (a << 2 | b << 1 | c) of the table."""
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
    for index in range(8):
        if int(table) >> index & 1:
            terms = (x if index & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1)))
            out |= np.bitwise_and.reduce([np.broadcast_to(t, out.shape) for t in terms])
    return out


def prmt(a: Array, b: Array, selector: Array) -> Array:
    """Bytes of b:a by four selector nibbles; a nibble's top bit replicates the sign."""
    pair = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), np.uint64)
    for place in range(4):
        nibble = (selector.astype(np.uint64) >> np.uint64(4 * place)) & np.uint64(15)
        byte = (pair >> (np.uint64(8) * (nibble & np.uint64(7)))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        out |= np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * place)
    return out.astype(np.uint32)


def _cvt_pair(bf16: bool, relu: bool = False) -> Callable[[Array, Array], Array]:
    """cvt.rn.{f16x2,bf16x2}.f32 d, a, b: a goes to the upper half."""

    def convert(a: Array, b: Array) -> Array:
        high, low = (np.ascontiguousarray(x).view(np.float32) for x in (a, b))
        if relu:
            high, low = np.maximum(high, 0), np.maximum(low, 0)
        with np.errstate(over="ignore"):
            top, bottom = (
                bf16_to_bits(x) if bf16 else x.astype(np.float16).view(np.uint16) for x in (high, low)
            )
        return bottom.astype(np.uint32) | (top.astype(np.uint32) << np.uint32(16))

    return convert


def _bfe(x: Array, start: Array, length: Array) -> Array:
    return (x.astype(np.uint64) >> start) & ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1))


_ARITHMETIC: dict[str, Callable[..., Array]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    r"fma\.rn": lambda a, b, c: a * b + c,
}
_OPS: dict[str, Callable[..., Array]] = {
    r"mov\.[bufs](16|32)": lambda a: a,
    r"and\.b(16|32)": lambda a, b: a & b,
    r"or\.b(16|32)": lambda a, b: a | b,
    r"xor\.b(16|32)": lambda a, b: a ^ b,
    r"not\.b32": lambda a: ~a,
    r"shl\.b32": _shift(left=True),
    r"shr\.[bu]32": _shift(left=False),
    r"lop3\.b32": lop3,
    r"prmt\.b32": prmt,
    r"bfe\.u32": _bfe,
    r"add\.[us]32": _wide(lambda a, b: a + b),
    r"sub\.[us]32": _wide(lambda a, b: a - b),
    r"mul\.lo\.[us]32": _wide(lambda a, b: a * b),
    r"mad\.lo\.[us]32": _wide(lambda a, b, c: a * b + c),
    r"min\.s32": _signed(np.minimum),
    r"max\.s32": _signed(np.maximum),
    r"cvt\.rn\.f16x2\.f32": _cvt_pair(bf16=False),
    r"cvt\.rn\.bf16x2\.f32": _cvt_pair(bf16=True),
    r"cvt\.rn\.f32\.u32": lambda a: a.astype(np.float32).view(np.uint32),
    r"cvt\.rn\.f32\.s32": lambda a: a.view(np.int32).astype(np.float32).view(np.uint32),
    r"cvt\.f32\.f16": lambda a: a.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32),
    r"cvt\.f32\.bf16": lambda a: bits_to_bf16(a.astype(np.uint16)).view(np.uint32),
    **{rf"{name}(\.rn)?\.f16x2": _half2(f, bf16=False) for name, f in _ARITHMETIC.items()},
    **{rf"{name}(\.rn)?\.bf16x2": _half2(f, bf16=True) for name, f in _ARITHMETIC.items()},
    **{rf"{name}(\.rn)?\.f32": _float(f) for name, f in _ARITHMETIC.items()},
}


def _mma(name: str, operands: list[list[Array]]) -> list[Array]:
    """mma.sync.m16n8k16 and mma.sp.sync.m16n8k32, fp16 or bf16 with fp32 sums; registers: [..., 32 lanes].

    Fragments as in "Matrix Fragments for mma.m16n8k16" and "Sparse matrix storage" of the PTX ISA.
    """
    form = re.fullmatch(
        r"mma(\.sp(?:::ordered_metadata)?)?\.sync\.aligned\.m16n8k(16|32)\.row\.col"
        r"\.f32\.(f16|bf16)\.(f16|bf16)\.f32", name,
    )  # fmt: skip
    sparse = form is not None and form[1] is not None
    if form is None or sparse != (form[2] == "32") or form[3] != form[4]:
        raise NotImplementedError(f"PTX: {name}")
    a, b, c = operands[:3]
    if any(r.shape[-1:] != (32,) for r in (*a, *b, *c)):
        raise ValueError(f"{name}: the operands' last axis must be a warp's 32 lanes, got {a[0].shape}")
    values = bits_to_bf16 if form[3] == "bf16" else lambda bits: bits.view(np.float16).astype(np.float32)
    lane = np.arange(32)
    group, thread = lane // 4, lane % 4
    shape = a[0].shape[:-1]
    left = np.zeros((*shape, 16, 16), np.float32)
    for i, register in enumerate(a):
        for half in range(2):
            bits = (register >> np.uint32(16 * half)).astype(np.uint16)
            left[..., group + 8 * (i & 1), 8 * (i >> 1) + 2 * thread + half] = values(bits)
    if sparse:
        left = _expand(left, operands[3][0], int(operands[4][0].flat[0]))
    right = np.zeros((*shape, left.shape[-1], 8), np.float32)
    for i, register in enumerate(b):
        for half in range(2):
            bits = (register >> np.uint32(16 * half)).astype(np.uint16)
            right[..., 8 * i + 2 * thread + half, group] = values(bits)
    product = left.astype(np.float64) @ right.astype(np.float64)
    out = []
    for i, register in enumerate(c):
        total = product[..., group + 8 * (i // 2), 2 * thread + i % 2]
        total = total + np.ascontiguousarray(register).view(np.float32)
        out.append(total.astype(np.float32).view(np.uint32))
    return out


def _expand(kept: Array, metadata: Array, selector: int) -> Array:
    """[..., 16, 16] kept values -> [..., 16, 32] by the metadata of lanes 2 * selector + {0, 1} of each 4.

    A lane's low half holds eight 2-bit positions of row ``lane // 4``, its upper half those of row + 8; the
    even lane those of the first 16 columns, the odd lane of the last.
    """
    if selector not in (0, 1):
        raise ValueError(f"mma.sp.m16n8k32: sparsity selector {selector}")
    out = np.zeros((*kept.shape[:-1], 32), np.float32)
    column = np.arange(16)
    for row in range(16):
        lane = 4 * (row % 8) + 2 * selector
        halves = [(metadata[..., lane + odd] >> np.uint32(16 * (row // 8))) & 0xFFFF for odd in range(2)]
        word = (halves[0] | (halves[1] << np.uint32(16)))[..., None]
        position = ((word >> (2 * column).astype(np.uint32)) & 3).astype(np.int64)
        pairs = position.reshape(*position.shape[:-1], 8, 2)
        if (pairs[..., 0] >= pairs[..., 1]).any():
            raise ValueError("mma.sp: a pair's positions must ascend (ordered metadata)")
        where = 4 * (column // 2) + position
        np.put_along_axis(out[..., row, :], where, kept[..., row, :], -1)
    return out
