"""The calling convention of CPU kernels: ``void kernel(int64* args, int64 thread, int64 num_threads)``.

A kernel is an ordinary Python function in numba's subset, compiled to a C callback. Its arguments are 64-bit
words (addresses, sizes, or fp64 bit patterns) read through ``word``. All threads call it with the same
arguments, each does its share, and none may depend on another's result within one call.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

from .ir import I64, Emitter

KERNEL = types.void(types.intp, types.intp, types.intp)


def compile_kernel(function: Callable[..., None]) -> Any:
    """The machine code of a kernel; ``.address`` is its entry. Cached on disk by numba."""
    return cfunc(KERNEL, cache=True, nopython=True, nogil=True, error_model="numpy")(function)


def _loader(element: ir.Type, result: Any) -> Any:
    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
            return Emitter(builder).load(element, arguments[0], 4 if element is not I64 else 8)

        return result(types.intp), codegen

    return load


@intrinsic
def word(typingctx: Any, args: Any, index: Any) -> Any:
    """args[index], a 64-bit word."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        emit = Emitter(builder)
        return emit.load(I64, emit.offset(arguments[0], emit.scaled(arguments[1], 8)), 8)

    return types.int64(types.intp, types.intp), codegen


@intrinsic
def call_kernel(typingctx: Any, address: Any, args: Any, thread: Any, num_threads: Any) -> Any:
    """Call the kernel at ``address``."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        function = ir.FunctionType(ir.VoidType(), [I64, I64, I64])
        builder.call(builder.inttoptr(arguments[0], ir.PointerType(function)), arguments[1:])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp), codegen
