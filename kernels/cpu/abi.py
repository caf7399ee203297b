"""The calling convention of CPU kernels: ``void kernel(int64* args, int64 thread, int64 num_threads)``.

A kernel is an ordinary Python function in numba's subset, compiled to a C callback. Its arguments are 64-bit
words (addresses, sizes, or fp64 bit patterns) read through ``word``. All threads call it with the same
arguments, each does its share, and none may depend on another's result within one call.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
from llvmlite import ir
from numba import njit, types
from numba.core import config, sigutils
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from .ir import I64, Emitter

_Function = TypeVar("_Function", bound=Callable[..., Any])
KERNEL = types.void(types.intp, types.intp, types.intp)


def use_cache(root: Path) -> Path:
    """Keep machine code below ``root`` from now on, and return the folder.

    It is named by numba's version and a hash of the kernels' sources: numba's own index does not notice that
    an intrinsic has changed, and would go on with the old code. numba adds the CPU's name and features.
    """
    digest = hashlib.blake2b(numba.__version__.encode(), digest_size=8)
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    folder = root / f"kernels-{digest.hexdigest()}"
    folder.mkdir(parents=True, exist_ok=True)
    setattr(config, "CACHE_DIR", str(folder))  # noqa: B010 - numba makes its settings at run time
    return folder


class _KernelCache(FunctionCache):
    """Kept by what a kernel is compiled for.

    numba's own key holds all that a function closes over. Compiled functions among it are others in every
    process: such a kernel was compiled, and stored once more, at every start.
    """

    def __init__(self, function: Callable[..., None], traits: tuple[Any, ...]) -> None:
        super().__init__(function)
        assert traits, "kernels of the same code would be taken for one another"
        self._traits = repr(traits)

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        return sig, codegen.magic_tuple(), self._traits


def compile_kernel(function: Callable[..., None], traits: tuple[Any, ...] | None = None) -> Any:
    """The machine code of a kernel; ``.address`` is its entry. From the cache where one is in use.

    traits: all that distinguishes it from others of the same code; None: what it closes over does.
    """
    options = {"nopython": True, "nogil": True, "error_model": "numpy"}
    if traits is not None:
        # Files of its own: numba numbers those of one name without a lock, and two first starts at once could
        # store one kernel's code as another's.
        named(*traits)(function)
    kernel = CFunc(function, sigutils.normalize_signature(KERNEL), {}, options)
    if _cached():
        kept = FunctionCache(function) if traits is None else _KernelCache(function, traits)
        setattr(kernel, "_cache", kept)  # noqa: B010 - its stubs do not name it
    kernel.compile()
    return kernel


def named(*traits: Any) -> Callable[[_Function], _Function]:
    """Decorates a function that closes over ``traits``: its name says them.

    Machine code from the cache is linked by names, and of two functions that share one the first that a
    process loads would serve the kernels of both.
    """
    digest = hashlib.blake2b(repr(traits).encode(), digest_size=8).hexdigest()

    def name(function: _Function) -> _Function:
        function.__qualname__ = f"{function.__qualname__}_{digest}"
        return function

    return name


def compile_function(function: Callable[..., None]) -> Any:
    """A function of int64 arguments that Python calls without the interpreter lock."""
    signature = types.void(*[types.intp] * function.__code__.co_argcount)
    return njit(signature, nogil=True, cache=_cached())(function)


def _cached() -> bool:
    return bool(getattr(config, "CACHE_DIR", ""))


@intrinsic
def word(typingctx: Any, args: Any, index: Any) -> Any:
    """args[index], a 64-bit word."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        emit = Emitter(builder)
        return emit.load(I64, emit.offset(arguments[0], emit.scaled(arguments[1], 8)), 8)

    return types.int64(types.intp, types.intp), codegen


def words(emit: Emitter, args: ir.Value, count: int) -> list[ir.Value]:
    """The first ``count`` words of args, for an intrinsic that takes them as a kernel does."""
    return [emit.load(I64, emit.offset(args, 8 * index), 8) for index in range(count)]


@intrinsic
def call_kernel(typingctx: Any, address: Any, args: Any, thread: Any, num_threads: Any) -> Any:
    """Call the kernel at ``address``."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        function = ir.FunctionType(ir.VoidType(), [I64, I64, I64])
        builder.call(builder.inttoptr(arguments[0], ir.PointerType(function)), arguments[1:])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp), codegen
