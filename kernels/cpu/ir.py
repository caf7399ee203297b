"""A small LLVM IR assembler for numba intrinsics: vectors, loads, fused multiply-add, CPU dot products.

Addresses are 64-bit integers, so that kernels take plain pointers and can be called from any thread
without the interpreter lock.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from llvmlite import binding as llvm
from llvmlite import ir
from numba.core import cgutils, config

I1, I8, I16, I32, I64 = ir.IntType(1), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F16, F32 = ir.HalfType(), ir.FloatType()


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


BF16 = _BFloat()


def compiled_for_zen() -> bool:
    """Whether code is compiled for a CPU of AMD's: some choices that help there harm elsewhere."""
    return (getattr(config, "CPU_NAME", None) or llvm.get_host_cpu_name()).startswith("znver")


def gathers_are_fast() -> bool:
    """Whether the CPU that code is compiled for gathers floats faster than loads do; it has AVX-512 then.

    Intel's do from those on that have AMX; the microcode of earlier ones makes gathers slow (gather data
    sampling), and on Zen 5 they were slower than loads.
    """
    named = getattr(config, "CPU_NAME", None)
    features = llvm.get_host_cpu_features()
    return not named and bool(features.get("amx-tile") and features.get("avx512f"))


def emit_tiles(
    builder: ir.IRBuilder, count: ir.Value, sizes: Sequence[int], rounded: Sequence[int] = ()
) -> Iterator[tuple[int, ir.Value]]:
    """Loops over ``count`` rows in tiles of ``sizes``, largest first: the size and the first row.

    The body is emitted once for every size. Sizes of ``rounded`` take one row fewer too, the last ones.
    """
    start: ir.Value = I64(0)
    for size in sizes:
        left = builder.sub(count, start)  # -1 behind a tile with a row too many
        number = builder.sdiv(builder.add(left, I64(int(size in rounded))), I64(size))
        with cgutils.for_range(builder, number) as loop:
            yield size, builder.add(start, builder.mul(loop.index, I64(size)))
        start = builder.add(start, builder.mul(number, I64(size)))


class Emitter:
    """Wraps an LLVM builder; every method returns an IR value."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def call(self, name: str, result: ir.Type, arguments: list[ir.Value]) -> ir.Value:
        """Call an LLVM intrinsic or external function by name."""
        signature = ir.FunctionType(result, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(self.builder.module, signature, name)
        return self.builder.call(function, arguments)

    def load(self, element: ir.Type, address: ir.Value, align: int = 1) -> ir.Value:
        """Load one value (scalar or vector) from an address."""
        value = self.builder.load(self.builder.inttoptr(address, ir.PointerType(element)))
        value.align = align
        return value

    def store(self, value: ir.Value, address: ir.Value, align: int = 1) -> None:
        """Store one value to an address."""
        self.builder.store(value, self.builder.inttoptr(address, ir.PointerType(value.type))).align = align

    def offset(self, address: ir.Value, *terms: "int | ir.Value") -> ir.Value:
        """address + sum(terms), in bytes."""
        for term in terms:
            address = self.builder.add(address, I64(term) if isinstance(term, int) else term)
        return address

    def scaled(self, value: ir.Value, factor: int) -> ir.Value:
        """value * factor."""
        return self.builder.mul(value, I64(factor))

    def zext(self, value: ir.Value) -> ir.Value:
        """An unsigned integer in 64 bits."""
        return self.builder.zext(value, I64)

    def splat(self, value: ir.Value, lanes: int) -> ir.Value:
        """The same scalar in every lane."""
        vector = ir.VectorType(value.type, lanes)
        undefined = ir.Constant(vector, ir.Undefined)
        first = self.builder.insert_element(undefined, value, I32(0))
        return self.builder.shuffle_vector(
            first, undefined, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
        )

    def constant(self, element: ir.Type, value: "int | float", lanes: int) -> ir.Value:
        """A constant in every lane."""
        return ir.Constant(ir.VectorType(element, lanes), [value] * lanes)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a * b + c, rounded once; vectors of fp32."""
        return self.call(f"llvm.fma.v{a.type.count}f32", a.type, [a, b, c])

    def running_sums(self, vector: ir.Type, *counts: int) -> Any:
        """Nested lists of places for vectors of fp32, zeroed here: LLVM makes registers of them."""
        if counts:
            return [self.running_sums(vector, *counts[1:]) for _ in range(counts[0])]
        slot = cgutils.alloca_once(self.builder, vector)
        self.builder.store(self.constant(F32, 0.0, vector.count), slot)
        return slot

    def write_row(self, value: ir.Value, address: ir.Value, accumulate: ir.Value) -> None:
        """Store a vector of fp32, added to what is there if ``accumulate``."""
        builder = self.builder
        with builder.if_else(builder.icmp_signed("!=", accumulate, I64(0))) as (then, otherwise):
            with then:
                self.store(builder.fadd(value, self.load(value.type, address, 4)), address, 4)
            with otherwise:
                self.store(value, address, 4)

    def prefetch(self, address: ir.Value, keep: bool = True, write: bool = False) -> None:
        """Ask for the cache line at an address, to read or write; not ``keep``: past the outer caches on Zen.

        int4 at one token is 1 to 9 % faster so on Zen 4, and takes 1.9 times as long on Granite Rapids.
        """
        pointer = self.builder.inttoptr(address, ir.PointerType(I8))
        locality = 3 if keep or not compiled_for_zen() else 0
        self.call("llvm.prefetch.p0", ir.VoidType(), [pointer, I32(int(write)), I32(locality), I32(1)])

    def shifted_bytes(self, vector: ir.Value, bits: int) -> ir.Value:
        """Bytes shifted right by ``bits`` (left if negative); bits from the neighbour byte come in, so mask.

        The instruction sets shift 16-bit lanes, not bytes.
        """
        if bits == 0:
            return vector
        lanes = vector.type.count // 2
        words = self.builder.bitcast(vector, ir.VectorType(I16, lanes))
        shift = self.constant(I16, abs(bits), lanes)
        moved = self.builder.lshr(words, shift) if bits > 0 else self.builder.shl(words, shift)
        return self.builder.bitcast(moved, vector.type)

    def masked(self, vector: ir.Value, mask: int) -> ir.Value:
        """Bytes and ``mask``."""
        return self.builder.and_(vector, self.constant(I8, mask, vector.type.count))
