"""What Python wants to know of rows, found while they are in a core's cache: whether all of a row is finite,
and the first of its largest. Rows are chosen by a list of their indices.

Largest: threads look at the columns that they have just computed, and meet in one int64 for each row, its
key: what is larger has the larger key; of equals (-0.0 equals 0.0) the first; NaN and infinity have the
largest of all. The maximum of keys is the same in any order and for any number of threads.
"""

from collections.abc import Iterable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .abi import word
from .activations import row_share
from .atomics import atomic_max, atomic_store
from .ir import F32, I8, I32, I64, Emitter
from .l16 import ROWS
from .vectors import literal, load_f32, store_f32

_NO_KEY, _NOT_FINITE = -(1 << 63), (1 << 63) - 1
_COLUMNS = 0xFFFFFFFF  # a key's low half: this minus the column
_INFINITY = 0x7F800000  # the bits of magnitudes that are not finite are not below
_CHAINS = 2  # vectors that are looked at side by side; more are not faster, and on AVX2 slower


def decoded(keys: Iterable[int]) -> tuple[list[int], list[bool]]:
    """The column of each key, and whether the row is finite (where it is not, the column means nothing)."""
    keys = list(keys)
    return [~key & _COLUMNS for key in keys], [key != _NOT_FINITE for key in keys]


class _Magnitudes:
    """The largest magnitude of fp32 seen, as integers: there NaN is above infinity."""

    def __init__(self, emit: Emitter, lanes: int) -> None:
        self._emit, self._type = emit, ir.VectorType(I32, lanes)
        self._slot = cgutils.alloca_once(emit.builder, self._type)
        emit.builder.store(emit.constant(I32, 0, lanes), self._slot)

    def see(self, value: ir.Value) -> None:
        builder = self._emit.builder
        mask = self._emit.constant(I32, 0x7FFFFFFF, self._type.count)
        magnitude, known = builder.and_(builder.bitcast(value, self._type), mask), builder.load(self._slot)
        larger = builder.icmp_unsigned(">", magnitude, known)
        builder.store(builder.select(larger, magnitude, known), self._slot)

    def finite(self) -> ir.Value:
        """i1: of all that was seen."""
        builder, lanes = self._emit.builder, self._type.count
        name = f"llvm.vector.reduce.umax.v{lanes}i32"
        largest = self._emit.call(name, I32, [builder.load(self._slot)])
        return builder.icmp_unsigned("<", largest, I32(_INFINITY))


@intrinsic(prefer_literal=True)
def _all_finite(typingctx: Any, lanes: Any, address: Any, vectors: Any) -> Any:
    """1 if ``vectors`` vectors of ``lanes`` (a literal) fp32 are finite, else 0."""
    lanes_ = literal(lanes)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        _, address, vectors = arguments
        emit, vector = Emitter(builder), ir.VectorType(F32, lanes_)
        seen = _Magnitudes(emit, lanes_)
        with cgutils.for_range(builder, vectors) as loop:
            seen.see(emit.load(vector, emit.offset(address, emit.scaled(loop.index, 4 * lanes_)), 4))
        return emit.zext(seen.finite())

    return types.int64(lanes, types.intp, types.intp), codegen


@intrinsic
def _store_byte(typingctx: Any, address: Any, value: Any) -> Any:
    """Store the low byte of an int64."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        Emitter(builder).store(builder.trunc(arguments[1], I8), arguments[0])
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), codegen


class _Chain:
    """Of every lane the first of its largest, and its column."""

    def __init__(self, emit: Emitter, lanes: int) -> None:
        self._emit, self._builder, self._lanes = emit, emit.builder, lanes
        self._best = cgutils.alloca_once(emit.builder, ir.VectorType(F32, lanes))
        self._column = cgutils.alloca_once(emit.builder, ir.VectorType(I32, lanes))
        emit.builder.store(emit.constant(F32, float("-inf"), lanes), self._best)
        emit.builder.store(emit.constant(I32, -1, lanes), self._column)

    @property
    def best(self) -> ir.Value:
        return self._builder.load(self._best)

    def see(self, value: ir.Value, first: ir.Value) -> None:
        """A vector whose first column is the i32 ``first``."""
        builder, lanes = self._builder, self._lanes
        order = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
        columns = builder.add(self._emit.splat(first, lanes), order)
        larger = builder.fcmp_ordered(">", value, self.best)
        builder.store(builder.select(larger, value, self.best), self._best)
        builder.store(builder.select(larger, columns, builder.load(self._column)), self._column)

    def first(self, best: ir.Value) -> ir.Value:
        """The first column of what equals ``best``; the largest unsigned i32 if nothing does."""
        builder, lanes = self._builder, self._lanes
        equal = builder.fcmp_ordered("==", self.best, self._emit.splat(best, lanes))
        columns = builder.select(equal, builder.load(self._column), self._emit.constant(I32, -1, lanes))
        return self._emit.call(f"llvm.vector.reduce.umin.v{lanes}i32", I32, [columns])


@intrinsic(prefer_literal=True)
def _key(typingctx: Any, lanes: Any, row: Any, first: Any, vectors: Any) -> Any:
    """The key of one or more vectors of ``lanes`` (a literal) fp32 from column ``first`` on."""
    lanes_ = literal(lanes)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        _, row, first, vectors = arguments
        emit, vector = Emitter(builder), ir.VectorType(F32, lanes_)
        seen, chains = _Magnitudes(emit, lanes_), [_Chain(emit, lanes_) for _ in range(_CHAINS)]

        def look(chain: _Chain, index: ir.Value) -> None:
            column = builder.add(first, emit.scaled(index, lanes_))
            value = emit.load(vector, emit.offset(row, emit.scaled(column, 4)), 4)
            seen.see(value)
            chain.see(value, builder.trunc(column, I32))

        pairs = builder.sdiv(vectors, I64(_CHAINS))
        with cgutils.for_range(builder, pairs) as loop:
            for place, chain in enumerate(chains):
                look(chain, emit.offset(emit.scaled(loop.index, _CHAINS), place))
        done = emit.scaled(pairs, _CHAINS)
        with cgutils.for_range(builder, builder.sub(vectors, done)) as loop:
            look(chains[0], builder.add(done, loop.index))
        return _key_of(emit, chains, seen)

    return types.int64(lanes, types.intp, types.intp, types.intp), codegen


def _key_of(emit: Emitter, chains: list[_Chain], seen: _Magnitudes) -> ir.Value:
    builder = emit.builder
    bests = [chain.best for chain in chains]
    largest = bests[0]
    for best in bests[1:]:
        largest = builder.select(builder.fcmp_ordered(">", best, largest), best, largest)
    lanes = [builder.extract_element(largest, I32(lane)) for lane in range(largest.type.count)]
    value = lanes[0]
    for lane in lanes[1:]:
        value = builder.select(builder.fcmp_ordered(">", lane, value), lane, value)
    column = I32(-1)
    for chain in chains:
        other = chain.first(value)
        column = builder.select(builder.icmp_unsigned("<", other, column), other, column)
    bits = builder.bitcast(builder.fadd(value, F32(0.0)), I32)  # -0.0 + 0.0 is 0.0
    # Of negative ones the magnitude is turned round: then they are ordered as integers.
    ordered = builder.xor(bits, builder.lshr(builder.ashr(bits, I32(31)), I32(1)))
    high = builder.shl(builder.sext(ordered, I64), I64(32))
    key = builder.or_(high, builder.zext(builder.not_(column), I64))
    return builder.select(seen.finite(), key, I64(_NOT_FINITE))


def finite_kernel() -> Any:
    """args: x, ldx (floats), width, tokens, out (one byte a row): 1 where all of a row is finite, else 0."""

    def finite(args, thread, num_threads):
        x = word(args, 0)
        ldx = word(args, 1)
        width = word(args, 2)
        out = word(args, 4)
        first, last = row_share(word(word(args, 3), 0), thread, num_threads)
        vectors = width // 16
        for m in range(first, last):
            row = x + m * ldx * 4
            rest = _all_finite(1, row + vectors * 64, width - 16 * vectors)
            _store_byte(out + m, _all_finite(16, row, vectors) & rest)

    return finite


def choose_kernel() -> Any:
    """Copies rows and begins their keys.

    args: row indices (int64), tokens, x, ldx (floats), width, out, ldo, keys (int64).
    """

    def choose(args, thread, num_threads):
        indices = word(args, 0)
        x = word(args, 2)
        ldx = word(args, 3)
        width = word(args, 4)
        out = word(args, 5)
        ldo = word(args, 6)
        keys = word(args, 7)
        first, last = row_share(word(word(args, 1), 0), thread, num_threads)
        for m in range(first, last):
            row = x + word(indices, m) * ldx * 4
            for i in range(width):
                store_f32(out + (m * ldo + i) * 4, load_f32(row + 4 * i))
            atomic_store(keys + 8 * m, _NO_KEY)

    return choose


def largest_kernel() -> Any:
    """Raises the keys of rows of logits. Blocks of 16 columns are the unit of threads, as in the linears.

    args: logits, ld (floats), columns (padding of the last block left out), tokens, keys (int64).
    """

    def largest(args, thread, num_threads):
        x = word(args, 0)
        ldx = word(args, 1)
        size = word(args, 2)
        keys = word(args, 4)
        blocks = (size + ROWS - 1) // ROWS
        first = blocks * thread // num_threads * ROWS
        last = min(size, blocks * (thread + 1) // num_threads * ROWS)
        vectors = (last - first) // ROWS
        rest = first + vectors * ROWS
        for m in range(word(word(args, 3), 0)):
            row = x + m * ldx * 4
            if vectors > 0:
                atomic_max(keys + 8 * m, _key(16, row, first, vectors))
            if rest < last:
                atomic_max(keys + 8 * m, _key(1, row, rest, last - rest))

    return largest
