"""Atomics, futex and barrier for threads that never touch the interpreter."""

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .ir import I64

SYS_FUTEX, FUTEX_WAIT_PRIVATE, FUTEX_WAKE_PRIVATE = 202, 128, 129  # x86-64 Linux
_syscall = types.ExternalFunction("syscall", types.int64(*[types.int64] * 7))


def _pointer(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, ir.PointerType(I64))


@intrinsic
def atomic_load(typingctx: Any, address: Any) -> Any:
    """The int64 at an address, acquire."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return builder.load_atomic(_pointer(builder, arguments[0]), "acquire", 8, typ=I64)

    return types.int64(types.intp), codegen


@intrinsic
def atomic_store(typingctx: Any, address: Any, value: Any) -> Any:
    """Store an int64, sequentially consistent."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        builder.store_atomic(arguments[1], _pointer(builder, arguments[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), codegen


@intrinsic
def atomic_add(typingctx: Any, address: Any, value: Any) -> Any:
    """Add to an int64, sequentially consistent; returns what it was."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return builder.atomic_rmw("add", _pointer(builder, arguments[0]), arguments[1], "seq_cst")

    return types.int64(types.intp, types.int64), codegen


@intrinsic
def atomic_max(typingctx: Any, address: Any, value: Any) -> Any:
    """Raise an int64 to ``value`` if it is lower."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        builder.atomic_rmw("max", _pointer(builder, arguments[0]), arguments[1], "monotonic")
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), codegen


@intrinsic
def _pause(typingctx: Any) -> Any:
    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        function = ir.FunctionType(ir.VoidType(), [])
        builder.call(cgutils.get_or_insert_function(builder.module, function, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@njit(nogil=True)
def wait_while_equal(address, value, spin, sleepers):
    """Return when the int64 at ``address`` is no longer ``value``: spin, then sleep in the kernel."""
    turns = 0
    while atomic_load(address) == value:
        if turns < spin:
            turns += 1
            _pause()
        else:
            atomic_add(sleepers, 1)
            if atomic_load(address) == value:
                _syscall(SYS_FUTEX, address, FUTEX_WAIT_PRIVATE, value & 0xFFFFFFFF, 0, 0, 0)
            atomic_add(sleepers, -1)


@njit(nogil=True)
def wake(address, sleepers):
    """Wake all that sleep on ``address``."""
    if atomic_load(sleepers) > 0:
        _syscall(SYS_FUTEX, address, FUTEX_WAKE_PRIVATE, 0x7FFFFFFF, 0, 0, 0)
