"""The int8 kernel for AMX: 16 output rows x 16 tokens at once, bit for bit what ``int8_tile`` computes.

A group of 32 inputs is one product of tile registers: the activations of 16 tokens (a row of 32 bytes each)
times the codes of 16 outputs as bytes (a quad of inputs in a row). Its integer sums go through memory into
vector registers, where they are scaled and added up in the order of ``int8_tile``.

Whole zero points are taken from the codes when these are unpacked to bytes, once for all tokens, so that sums
need no start value: the same integers.

x8 comes as [K / 32, 16 tokens, 32], xs and sums as ``int8_tile`` has them, for 16 tokens.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from . import isa
from .abi import words
from .ir import F16, F32, I8, I32, I64, Emitter
from .l16 import GROUP_BYTES
from .streams import AHEAD_ONE
from .vectors import literal

TOKENS = isa.TILES[isa.AMX][0]
SYMMETRIC, WHOLE, REAL = range(3)  # kinds of zero points, see ``kind_of``
BLOCKS, TILES = 2, 8  # of outputs and of tokens whose sums are computed together
STRIP = 8  # groups whose codes are unpacked together: with the activations of a tile they fit the first cache
_TILE_BYTES, _GROUP = 1024, 32 * TOKENS  # of a tile of sums; of a group's activations or unpacked codes
SCRATCH_BYTES = BLOCKS * STRIP * _GROUP + BLOCKS * TILES * _TILE_BYTES
# A product takes 52 cycles and one can begin every 16: four are under way, each in a register of its own.
_DEPTH = 4
_AHEAD = 3  # groups from unpacking codes to their product
_BYTES, _INTS, _FLOATS = ir.VectorType(I8, 64), ir.VectorType(I32, 16), ir.VectorType(F32, 16)


def kind_of(num_bits: int, zeros: NDArray[np.float16] | None) -> int:
    """WHOLE: codes less these zero points are int8."""
    if zeros is None:
        return SYMMETRIC
    whole = num_bits < 8 and ((zeros >= 0) & (zeros <= 128) & (zeros % 1 == 0)).all()
    return WHOLE if whole else REAL


class _Registers:
    """Emits AMX instructions. Tile registers are numbers, not values: LLVM does not allocate them.

    0 to 3 hold sums, 4 and 5 activations, 6 and 7 codes.
    """

    def __init__(self, emit: Emitter) -> None:
        self.emit = emit

    def _call(self, name: str, *arguments: ir.Value) -> None:
        self.emit.call(f"llvm.x86.{name}", ir.VoidType(), list(arguments))

    def _pointer(self, address: ir.Value) -> ir.Value:
        return self.emit.builder.inttoptr(address, ir.PointerType(I8))

    def configure(self) -> None:
        """Shapes: bytes of a row, and rows."""
        widths = [64] * 4 + [32] * 2 + [64] * 2
        palette, rows = bytes([1, *[0] * 15]), bytes([*[TOKENS] * 6, 8, 8])
        shapes = (
            palette + b"".join(width.to_bytes(2, "little") for width in widths) + bytes(16) + rows + bytes(8)
        )
        constant = ir.Constant(ir.ArrayType(I8, 64), bytearray(shapes))
        place = cgutils.global_constant(self.emit.builder.module, "tile_shapes", constant)
        self._call("ldtilecfg", self.emit.builder.bitcast(place, ir.PointerType(I8)))

    def release(self) -> None:
        """Clear them: the operating system need not keep them when another thread takes the core."""
        self._call("tilerelease")

    def multiply(self, x: ir.Value, codes: ir.Value, signed: bool, stage: int) -> None:
        """The sums of a group into register ``stage``."""
        left, right = 4 + stage % 2, 6 + stage % 2
        self._call("tilezero", I8(stage))
        self._call("tileloadd64", I8(left), self._pointer(x), I64(32))
        self._call("tileloadd64", I8(right), self._pointer(codes), I64(64))
        self._call("tdpbssd" if signed else "tdpbsud", I8(stage), I8(left), I8(right))

    def store(self, stage: int, out: ir.Value) -> None:
        """The sums in a register: int32 [tokens, outputs]."""
        self._call("tilestored64", I8(stage), self._pointer(out), I64(64))


@intrinsic
def configure_tiles(typingctx: Any) -> Any:
    """Before a thread's first product."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        _Registers(Emitter(builder)).configure()
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def release_tiles(typingctx: Any) -> Any:
    """After its last."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        _Registers(Emitter(builder)).release()
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic(prefer_literal=True)
def amx_tiles(
    typingctx: Any,
    num_bits: Any,
    kind: Any,
    args: Any,
    block: Any,
    blocks: Any,
    begin: Any,
    tiles: Any,
    scratch: Any,
) -> Any:
    """Up to BLOCKS blocks of weights times up to TILES tiles of tokens from ``begin`` on.

    args: of ``int8_linear``; scratch: SCRATCH_BYTES, at a cache line.
    """
    bits, zeros = literal(num_bits), literal(kind)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        _Tiles(builder, bits, zeros, arguments[2:]).emit_strips()
        return context.get_dummy_value()

    return types.void(num_bits, kind, *([types.intp] * 6)), codegen


class _Tiles:
    """Emits a pipeline of products: a step multiplies one group, and scales the one of three steps before.

    A job is a strip of groups for one block and one tile of tokens. Jobs follow one another without a gap,
    blocks first, for which the activations stay in the first cache. The first, one of each block, unpack.
    """

    def __init__(self, builder: ir.IRBuilder, bits: int, kind: int, arguments: list[ir.Value]) -> None:
        self.builder, self.emit = builder, Emitter(builder)
        self.registers = _Registers(self.emit)
        self.bits, self.kind = bits, kind
        args, block, self.blocks, begin, self.tiles, self.unpacked = arguments
        emit = self.emit
        w, ws, wz, x8, xs, sums, y, _, self.ldy, self.groups, _, self.accumulate = words(emit, args, 12)
        at = builder.mul(block, self.groups)
        self.w = emit.offset(w, emit.scaled(at, GROUP_BYTES[bits]))
        self.ws, self.wz = (emit.offset(base, emit.scaled(at, 32)) for base in (ws, wz))
        at = builder.mul(begin, self.groups)
        self.x8 = emit.offset(x8, emit.scaled(at, 32))
        self.xs, self.sums = (emit.offset(base, emit.scaled(at, 4)) for base in (xs, sums))
        self.y = emit.offset(y, emit.scaled(builder.mul(begin, self.ldy), 4), emit.scaled(block, 64))
        self.totals = self.emit.offset(self.unpacked, BLOCKS * STRIP * _GROUP)
        self.slots = [cgutils.alloca_once(builder, _FLOATS) for _ in range(TOKENS)]
        memory = cgutils.alloca_once(builder, ir.ArrayType(_INTS, TOKENS * _DEPTH))
        memory.align = 64
        self.products = builder.ptrtoint(memory, I64)

    def emit_strips(self) -> None:
        """All groups, a strip at a time."""
        builder, emit = self.builder, self.emit
        strips = builder.udiv(emit.offset(self.groups, STRIP - 1), I64(STRIP))
        with cgutils.for_range(builder, strips) as loop:
            self.begin = emit.scaled(loop.index, STRIP)
            rest = builder.sub(self.groups, self.begin)
            whole = builder.icmp_signed("<", I64(STRIP), rest)
            self.strip = builder.select(whole, I64(STRIP), rest)
            self.is_first = builder.icmp_signed("==", loop.index, I64(0))
            self.is_last = builder.not_(whole)
            for step in range(_AHEAD):
                self._unpack(I64(0), step)
            self._emit_jobs()

    def _emit_jobs(self) -> None:
        """The jobs of a strip, and a round more that only ends the last."""
        builder, emit = self.builder, self.emit
        places = [
            cgutils.alloca_once(builder, I64) for _ in range(4)
        ]  # tile and block; those of the job before
        for place in places:
            builder.store(I64(0), place)
        jobs = builder.mul(self.blocks, self.tiles)
        with cgutils.for_range(builder, emit.offset(jobs, 1)) as loop:
            tile, block, *before = (builder.load(place) for place in places)
            begins = builder.icmp_signed("<", loop.index, jobs)
            ends = builder.icmp_signed(">", loop.index, I64(0))
            for step in range(STRIP):
                # The first jobs are numbered like their blocks; there is none behind the last block.
                self._unpack(emit.offset(loop.index, (step + _AHEAD) // STRIP), (step + _AHEAD) % STRIP)
                with self._if_group(begins, step):
                    codes = emit.offset(self._codes(block), _GROUP * step)
                    x = self._group(self.x8, tile, _GROUP, step)
                    self.registers.multiply(x, codes, self.kind != REAL, step % _DEPTH)
                done = step + 1 - _DEPTH
                if done == 0:
                    with builder.if_then(ends):
                        self._end(*before)
                    with builder.if_then(begins):
                        self._begin(tile, block)
                with self._if_group(ends if done < 0 else begins, done % STRIP):
                    self._scale(*(before if done < 0 else (tile, block)), done % STRIP)
            after = emit.offset(block, 1)
            wraps = builder.icmp_signed("==", after, self.blocks)
            following = (
                builder.select(wraps, emit.offset(tile, 1), tile),
                builder.select(wraps, I64(0), after),
            )
            for place, value in zip(places, (*following, tile, block), strict=True):
                builder.store(value, place)

    def _if_group(self, job: ir.Value, step: int) -> Any:
        """If there is a job, and the strip has so many groups."""
        return self.builder.if_then(
            self.builder.and_(job, self.builder.icmp_signed("<", I64(step), self.strip))
        )

    def _group(self, base: ir.Value, index: ir.Value, size: int, step: int) -> ir.Value:
        """Where a group of the strip lies, of a block or of a tile of tokens; ``size``: its bytes."""
        group = self.builder.add(self.builder.mul(self.groups, index), self.begin)
        return self.emit.offset(base, self.emit.scaled(group, size), size * step)

    def _codes(self, block: ir.Value) -> ir.Value:
        return self.emit.offset(self.unpacked, self.emit.scaled(block, STRIP * _GROUP))

    def _unpack(self, block: ir.Value, step: int) -> None:
        emit, size = self.emit, GROUP_BYTES[self.bits]
        with self._if_group(self.builder.icmp_signed("<", block, self.blocks), step):
            packed = self._group(self.w, block, size, step)
            for line in range(0, size, 64):
                emit.prefetch(emit.offset(self._later(packed, step), line))
            codes = _unpacked(emit, self.bits, self.kind == SYMMETRIC, packed)
            if self.kind == WHOLE:
                zeros = self.builder.fptosi(self._per_row(self.wz, block, step), _INTS)
                # In each byte of the row: at most 128.
                zeros = self.builder.mul(zeros, emit.constant(I32, 0x01010101, 16))
                codes = [self.builder.sub(code, self.builder.bitcast(zeros, _BYTES)) for code in codes]
            for quad, code in enumerate(codes):
                emit.store(code, emit.offset(self._codes(block), _GROUP * step + 64 * quad), 64)

    def _later(self, packed: ir.Value, step: int) -> ir.Value:
        """AHEAD_ONE behind a group's codes; behind its block's end, those of the block read after it."""
        builder, size = self.builder, GROUP_BYTES[self.bits]
        later = self.emit.offset(self.begin, step + AHEAD_ONE // size)
        others = builder.mul(self.groups, builder.sub(self.blocks, I64(1)))
        skipped = builder.select(builder.icmp_signed("<", later, self.groups), I64(0), others)
        return self.emit.offset(packed, AHEAD_ONE, self.emit.scaled(skipped, size))

    def _per_row(self, values: ir.Value, block: ir.Value, step: int) -> ir.Value:
        """A group's scales or zero points, as fp32."""
        halves = self.emit.load(ir.VectorType(F16, 16), self._group(values, block, 32, step))
        return self.builder.fpext(halves, _FLOATS)

    def _scale(self, tile: ir.Value, block: ir.Value, step: int) -> None:
        builder, emit = self.builder, self.emit
        products = emit.offset(self.products, _TILE_BYTES * (step % _DEPTH))
        self.registers.store(step % _DEPTH, products)
        row_scale = self._per_row(self.ws, block, step)
        scales = self._group(self.xs, tile, 4 * TOKENS, step)
        if self.kind == REAL:
            zeros = self._per_row(self.wz, block, step)
            starts = emit.load(_INTS, self._group(self.sums, tile, 4 * TOKENS, step))
            starts = builder.sitofp(starts, _FLOATS)
        for m, slot in enumerate(self.slots):
            value = builder.sitofp(emit.load(_INTS, emit.offset(products, 64 * m), 64), _FLOATS)
            if self.kind == REAL:
                value = emit.fma(zeros, emit.splat(builder.extract_element(starts, I32(m)), 16), value)
            scale = emit.splat(emit.load(F32, emit.offset(scales, 4 * m), 4), 16)
            builder.store(emit.fma(builder.fmul(row_scale, scale), value, builder.load(slot)), slot)

    def _total(self, tile: ir.Value, block: ir.Value, m: int) -> ir.Value:
        """Where a token's sums over the strips so far are kept."""
        index = self.builder.add(self.emit.scaled(tile, BLOCKS), block)
        return self.emit.offset(self.totals, self.emit.scaled(index, _TILE_BYTES), 64 * m)

    def _row(self, tile: ir.Value, block: ir.Value, m: int) -> ir.Value:
        """Where a token's outputs go."""
        token = self.emit.offset(self.emit.scaled(tile, TOKENS), m)
        row = self.emit.offset(self.y, self.emit.scaled(block, 64))
        return self.emit.offset(row, self.emit.scaled(self.builder.mul(self.ldy, token), 4))

    def _begin(self, tile: ir.Value, block: ir.Value) -> None:
        with self.builder.if_then(self.is_last):
            for m in range(TOKENS):
                self.emit.prefetch(self._row(tile, block, m), write=True)
        with self.builder.if_else(self.is_first) as (then, otherwise):
            with then:
                for slot in self.slots:
                    self.builder.store(self.emit.constant(F32, 0.0, 16), slot)
            with otherwise:
                for m, slot in enumerate(self.slots):
                    self.builder.store(self.emit.load(_FLOATS, self._total(tile, block, m), 64), slot)

    def _end(self, tile: ir.Value, block: ir.Value) -> None:
        builder, emit = self.builder, self.emit
        with builder.if_else(self.is_last) as (then, otherwise):
            with then:
                for m, slot in enumerate(self.slots):
                    emit.write_row(builder.load(slot), self._row(tile, block, m), self.accumulate)
            with otherwise:
                for m, slot in enumerate(self.slots):
                    emit.store(builder.load(slot), self._total(tile, block, m), 64)


def _unpacked(emit: Emitter, bits: int, centered: bool, packed: ir.Value) -> list[ir.Value]:
    """A group's codes as bytes, by quads; ``centered``: less 2**(bits - 1)."""
    lines = [emit.load(_BYTES, emit.offset(packed, 64 * j)) for j in range(GROUP_BYTES[bits] // 64)]
    if bits == 8:
        top_bit = emit.constant(I8, 128, 64)
        return [emit.builder.xor(line, top_bit) for line in lines] if centered else lines
    codes = []
    for quad in range(8):
        index, place = divmod(quad, 3 if bits == 3 else 8 // bits)
        if bits == 3 and place == 2:
            low = _moved_bits(emit, lines[index], [6, 7] + [None] * 6, 0)
            sources = [None, None, 6 + index, *[6 + index if centered else None] * 5]
            high = _moved_bits(emit, lines[2], sources, 0xFC if centered else 0)
            codes.append(emit.builder.or_(low, high))
            continue
        top = bits * (place + 1) - 1
        # Centered: the top bit is turned and copied above, which makes it the sign.
        sources = [*range(bits * place, top + 1), *[top if centered else None] * (8 - bits)]
        flipped = 256 - 2 ** (bits - 1) if centered else 0
        codes.append(_moved_bits(emit, lines[index], sources, flipped))
    return codes


def _moved_bits(emit: Emitter, vector: ir.Value, sources: list[int | None], flipped: int) -> ir.Value:
    """Bytes whose bit i is bit sources[i] of the vector's (None: 0), xor ``flipped``: one instruction."""
    matrix = 0  # its byte 7 - i says which bits are added up to bit i
    for bit, source in enumerate(sources):
        if source is not None:
            matrix |= 1 << (8 * (7 - bit) + source)
    rows = emit.builder.bitcast(emit.constant(I64, matrix, 8), _BYTES)
    return emit.call("llvm.x86.vgf2p8affineqb.512", _BYTES, [vector, rows, I8(flipped)])
