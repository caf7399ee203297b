"""Codes in the registers of a tensor core: how packed words become the A operand of an MMA.

The A fragment of m16n8k16 ("Matrix Fragments for mma.m16n8k16" in the PTX ISA; wgmma's is the same) holds,
in lane (g, t) = (lane // 4, lane % 4) and register 2 * jk + hrow, the pair of values of row 8 * hrow + g
and columns 8 * jk + 2 * t + {0, 1}. The words of ``packing`` hold codes in this order, so that unpacking
moves no data: register ``i`` of a lane comes from field ``i`` of its words, the even column in the lower
half.

A field of b bits at position p of a half word, or-ed with the bits of M = 1024 (fp16) or 128 (bf16), is the
float M + code * 2**p; one fma with 2**-p and -(M * 2**-p + zero) gives code - zero exactly, for zeros
from 0 to 2**b (8 bits: 255): larger ones would carry into the exponent. No int-to-float conversion: those run
at a quarter of the rate, and bound a kernel on a data-centre GPU below its memory's bandwidth.
"""

import triton
import triton.language as tl

ROWS = tl.constexpr(64)  # outputs of a packed block
STEP = tl.constexpr(128)  # inputs of a packed block


@triton.constexpr_function
def words_per_unit(bits: int) -> int:
    """Words that are unpacked together: 3-bit codes straddle three, 8-bit codes of a fragment fill two."""
    return {2: 1, 3: 3, 4: 1, 8: 2}[bits]


@triton.constexpr_function
def fragments_per_unit(bits: int) -> int:
    """Fragments (of 16 inputs) that a lane unpacks from a unit."""
    return 4 * words_per_unit(bits) // bits


@triton.constexpr_function
def vector(bits: int) -> int:
    """Units whose words a lane reads together, at most 16 bytes."""
    return min(4, 8 // fragments_per_unit(bits))


@triton.constexpr_function
def vectors(bits: int) -> int:
    """Vectors of units in a step's 8 fragments."""
    return 8 // fragments_per_unit(bits) // vector(bits)


@triton.constexpr_function
def fields(bits: int) -> list[tuple[int, int]]:
    """(word, first bit within each half) of each register of a unit. 3 bits: of the first 15 registers.

    The sixteenth 3-bit register has bit j in bit 15 of word j.
    """
    per_word = 16 // bits
    return [(word, bits * i) for word in range(words_per_unit(bits)) for i in range(per_word)]


def _hex(half: int) -> str:
    return f"0x{half & 0xFFFF:04x}{half & 0xFFFF:04x}"


class _Text:
    """PTX of one unit, line by line. Operands by name: registers out, words, zeros of both row halves."""

    def __init__(self, bits: int, bf16: bool, out: list[str], words: list[str], zeros: list[str]) -> None:
        self.bits, self.out, self.words, self.zeros = bits, out, words, zeros
        self.mantissa, self.one = (7, 0x3F80) if bf16 else (10, 0x3C00)
        self.magic = self.one + (self.mantissa << self.mantissa)  # 128 or 1024
        self.fma = f"fma.rn.{'bf16x2' if bf16 else 'f16x2'}"
        self.lines: list[str] = []
        if bits != 8:
            self.low()
        elif bf16:
            self.bytes_bf16()
        else:
            self.bytes_fp16()

    def put(self, line: str) -> None:
        self.lines.append(line + ";")

    def magic_or(self, out: str, source: str, position: int) -> None:
        """out = the float M + field * 2**position."""
        mask = _hex(((1 << self.bits) - 1) << position)
        self.put(f"lop3.b32 {out}, {source}, {mask}, {_hex(self.magic)}, 0xea")

    def centre(self, register: int, position: int) -> None:
        """Output = u * 2**-position - (M * 2**-position + zero)."""
        offset = 0x8000 + self.magic - (position << self.mantissa)
        if self.zeros:
            # The zero's bits in the mantissa; both halves at once.
            self.put(f"mad.lo.u32 c, {self.zeros[register % 2]}, {0x10001 << position:#x}, {_hex(offset)}")
        else:
            self.put(f"mov.b32 c, {_hex(offset + (1 << (self.bits - 1) << position))}")
        self.put(f"mov.b32 t, {_hex(self.one - (position << self.mantissa))}")
        self.put(f"{self.fma} {self.out[register]}, u, t, c")

    def scale(self, scales: list[str]) -> None:
        """Multiply by the scales, with -0 added: mul.bf16x2 needs sm_90, fma does not."""
        self.put(f"mov.b32 c, {_hex(0x8000)}")
        for register, out in enumerate(self.out):
            self.put(f"{self.fma} {out}, {out}, {scales[register % 2]}, c")

    def low(self) -> None:
        """2, 3 and 4 bits. One shift serves the fields that fit a mantissa together."""
        shift, source = 0, ""
        for register, (word, first) in enumerate(fields(self.bits)):
            if first == 0:
                shift, source = 0, self.words[word]
            if first - shift + self.bits > self.mantissa:
                shift, source = first, "p"
                self.put(f"shr.u32 p, {self.words[word]}, {shift}")
            self.magic_or("u", source, first - shift)
            self.centre(register, first - shift)
        if self.bits == 3:
            self.spare()

    def spare(self) -> None:
        """The sixteenth 3-bit code, of one bit from each word."""
        self.put(f"mov.b32 u, {_hex(self.magic)}")
        for bit in range(3):
            self.put(f"shr.u32 t, {self.words[bit]}, {15 - bit}")
            self.put(f"lop3.b32 u, t, {_hex(1 << bit)}, u, 0xea")
        self.centre(15, 0)

    def bytes_fp16(self) -> None:
        for register, (word, first) in enumerate(fields(8)):
            self.put(f"shr.u32 t, {self.words[word]}, {first}")
            self.magic_or("u", "t", 0)
            self.centre(register, 0)

    def bytes_bf16(self) -> None:
        """bf16 has 7 mantissa bits. The eighth is the lowest exponent bit of the 256 that is subtracted."""
        for name, zero in zip("pq", self.zeros, strict=False):
            self.put(f"mul.lo.u32 t, {zero}, 0x10001")
            self.byte_minus_128(name, "t")
        for register, (word, first) in enumerate(fields(8)):
            out = self.out[register]
            self.put(f"shr.u32 t, {self.words[word]}, {first}")
            self.byte_minus_128(out, "t")
            if self.zeros:
                self.put(f"mov.b32 c, {_hex(self.one + 0x8000)}")
                self.put(f"{self.fma} {out}, {'pq'[register % 2]}, c, {out}")

    def byte_minus_128(self, out: str, source: str) -> None:
        self.put(f"lop3.b32 u, {source}, 0x007f007f, 0x43004300, 0xea")  # (s & m) | 128
        self.put(f"lop3.b32 c, {source}, 0x00800080, 0xc380c380, 0x6a")  # (s & m) ^ -256
        self.put(f"mov.b32 t, {_hex(self.one)}")
        self.put(f"{self.fma} {out}, u, t, c")


@triton.constexpr_function
def unit_ptx(bits: int, bf16: bool, out: list[str], words: list[str], rows: list[list[str]]) -> list[str]:
    """Lines that unpack one unit with the registers t, u, c, p, q; rows: zeros and scales, each 0 or 2."""
    text = _Text(bits, bf16, out, words, rows[0])
    if rows[1]:
        text.scale(rows[1])
    return text.lines


@triton.constexpr_function
def dequant_ptx(bits: int, bf16: bool, zeros: bool, scales: bool) -> str:
    """PTX that unpacks a unit: operands are the output registers, the words, then zeros and scales.

    zeros: two, of rows g and g + 8, integers up to 2**bits (255 for 8); scales: likewise, as pairs of halves.
    """
    count, first = 4 * fragments_per_unit(bits), 4 * fragments_per_unit(bits) + words_per_unit(bits)
    names = [f"${i}" for i in range(first + 4)]
    rows = [names[first : first + 2] if zeros else [], []]
    if scales:
        first += 2 * zeros
        rows[1] = names[first : first + 2]
    lines = unit_ptx(bits, bf16, names[:count], names[count : count + words_per_unit(bits)], rows)
    return "{ " + "\n".join([".reg .b32 t, u, c, p, q;", *lines]) + " }"


@triton.constexpr_function
def dequant_constraints(bits: int, zeros: bool, scales: bool) -> str:
    """The register classes of ``dequant_ptx``'s operands."""
    outputs = 4 * fragments_per_unit(bits)
    inputs = words_per_unit(bits) + (2 if zeros else 0) + (2 if scales else 0)
    return ",".join(["=r"] * outputs + ["r"] * inputs)


@triton.constexpr_function
def int32_types(count: int) -> tuple[tl.dtype, ...]:
    """``count`` times int32."""
    return (tl.int32,) * count


@triton.jit
def row_integers(at):
    """Of rows g and g + 8 of each fragment, as int32."""
    return (tl.load(at).to(tl.int32), tl.load(at + 8).to(tl.int32))


@triton.jit
def row_pairs(at, dt: tl.constexpr):
    """Of rows g and g + 8 of each fragment, as a pair of ``dt`` in int32."""
    low = tl.load(at).to(dt).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    high = tl.load(at + 8).to(dt).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return (low * 0x10001, high * 0x10001)


@triton.constexpr_function
def field(bits: int, register: int) -> tuple[int, int]:
    """(word, first bit) of a register."""
    return fields(bits)[register]


@triton.jit
def _halves(v, dt: tl.constexpr):
    """int32 [...] -> dt [..., 2], the lower half first."""
    low = v.to(tl.int16).to(dt, bitcast=True)
    return tl.join(low, (v >> 16).to(tl.int16).to(dt, bitcast=True))


@triton.jit
def _pair(words, zeros, scales, BITS: tl.constexpr, REGISTER: tl.constexpr, dt: tl.constexpr):
    """A register's values [..., 2] in plain Triton."""
    if BITS == 3 and REGISTER == 15:
        low = (words[0] >> 15 & 1) | (words[1] >> 14 & 2) | (words[2] >> 13 & 4)
        high = (words[0] >> 31 & 1) | (words[1] >> 30 & 2) | (words[2] >> 29 & 4)
    else:
        place: tl.constexpr = field(BITS, REGISTER)
        low = (words[place[0]] >> place[1]) & ((1 << BITS) - 1)
        high = (words[place[0]] >> (place[1] + 16)) & ((1 << BITS) - 1)
    if len(zeros) > 0:
        low -= zeros[REGISTER % 2]
        high -= zeros[REGISTER % 2]
    else:
        low -= 1 << (BITS - 1)
        high -= 1 << (BITS - 1)
    pair = tl.join(low, high).to(dt)
    if len(scales) > 0:
        scale = scales[REGISTER % 2].to(tl.int16).to(dt, bitcast=True)
        pair *= tl.join(scale, scale)
    return pair


@triton.jit
def _registers(words, zeros, scales, BITS: tl.constexpr, dt: tl.constexpr, ASM: tl.constexpr):
    """Each register's two values [..., 2]."""
    COUNT: tl.constexpr = 4 * fragments_per_unit(BITS)
    out = ()
    if ASM:
        ptx: tl.constexpr = dequant_ptx(BITS, dt == tl.bfloat16, len(zeros) > 0, len(scales) > 0)
        classes: tl.constexpr = dequant_constraints(BITS, len(zeros) > 0, len(scales) > 0)
        packed = tl.inline_asm_elementwise(
            ptx, classes, words + zeros + scales, dtype=int32_types(COUNT), is_pure=True, pack=1
        )
        for register in tl.static_range(COUNT):
            out = out + (_halves(packed[register], dt),)
    else:
        for register in tl.static_range(COUNT):
            out = out + (_pair(words, zeros, scales, BITS, register, dt),)
    return out


@triton.jit
def _fragment(r, FIRST: tl.constexpr):
    """Four registers -> [..., e, hrow, jk]."""
    return tl.join(tl.join(r[FIRST], r[FIRST + 1]), tl.join(r[FIRST + 2], r[FIRST + 3]))


@triton.jit
def unpack(words, zeros, scales, BITS: tl.constexpr, dt: tl.constexpr, ASM: tl.constexpr):
    """Codes minus their zeros (times their scales) as the A operand [16 * NT, inputs] of an MMA.

    words: a tuple of ``words_per_unit`` int32 tensors [KB, NT, 8 (g), 4 (t), V]; zeros: () or two int32 that
    broadcast to it, of rows g and g + 8; scales: () or two likewise, pairs of halves.
    """
    F: tl.constexpr = fragments_per_unit(BITS)
    KB: tl.constexpr = words[0].shape[0]
    NT: tl.constexpr = words[0].shape[1]
    V: tl.constexpr = words[0].shape[4]
    r = _registers(words, zeros, scales, BITS, dt, ASM)
    tile = _fragment(r, 0)
    if F >= 2:
        tile = tl.join(tile, _fragment(r, 4))
    if F == 4:
        tile = tl.join(tile, tl.join(_fragment(r, 8), _fragment(r, 12)))
    # kb nt g t v | e hrow jk f0 f1 -> nt hrow g | kb v f1 f0 jk t e
    tile = tl.reshape(tile, (KB, NT, 8, 4, V, 2, 2, 2, min(F, 2), max(F // 2, 1)))
    tile = tl.permute(tile, (1, 6, 2, 0, 4, 9, 8, 7, 3, 5))
    return tl.reshape(tile, (NT * 16, KB * V * F * 16))
