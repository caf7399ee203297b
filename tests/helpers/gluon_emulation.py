"""Stands in for Gluon in Triton's interpreter: arithmetic and addresses run, layouts are dropped.

What a layout promises is the compile gate's matter. Shared memory starts as NaN or the largest integer, and
an asynchronous copy lands when it is waited for and not before: a wait too few shows in the result.
"""

import importlib
import sys
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

_ROOT = "triton.experimental.gluon"
_LAYOUTS = (
    "AutoLayout", "BlockedLayout", "SliceLayout", "DistributedLinearLayout", "DotOperandLayout",
    "NVMMADistributedLayout", "NVMMASharedLayout", "SwizzledSharedLayout", "PaddedSharedLayout",
    "SharedLinearLayout", "CoalescedLayout",
)  # fmt: skip
# The same in both languages. Looked up when called: the interpreter replaces them during a launch.
_SAME = (
    "load", "store", "join", "split", "reshape", "permute", "expand_dims", "program_id", "num_programs",
    "where", "inline_asm_elementwise", "sum", "max", "min", "maximum", "minimum", "exp", "exp2", "rsqrt",
    "fma", "cdiv", "atomic_add", "atomic_cas", "atomic_xchg", "atomic_max", "multiple_of",
    "max_contiguous", "assume", "cast", "broadcast", "static_assert", "static_range", "static_print",
    "device_assert", "abs", "gather", "umulhi", "zeros_like", "reduce", "associative_scan", "floor",
    "fdiv", "range",
)  # fmt: skip
_PLAIN = (
    "constexpr", "dtype", "tensor", "tuple", "pointer_type", "void", "int1", "int8", "int16", "int32",
    "int64", "uint8", "uint16", "uint32", "uint64", "float16", "bfloat16", "float32", "float64",
)  # fmt: skip


def _later(name: str) -> Callable[..., Any]:
    return lambda *args, **kwargs: getattr(tl, name)(*args, **kwargs)


class SharedMemory:
    """A block of shared memory, or a view of one; ``data`` as the interpreter holds values of the type."""

    def __init__(self, data: Any, dtype: Any) -> None:
        self.data = data
        self.dtype = dtype
        self.shape = data.shape

    @staticmethod
    def allocate(dtype: Any, shape: Any, layout: Any, value: Any = None) -> "SharedMemory":
        """Holding garbage, unless a value is stored at once."""
        array = np.empty([int(n) for n in shape], interpreter._get_np_dtype(dtype))
        array[...] = np.nan if array.dtype.kind == "f" else np.iinfo(array.dtype).max
        memory = SharedMemory(array, dtype)
        if value is not None:
            memory.store(value)
        return memory

    def index(self, index: Any) -> "SharedMemory":
        """A part along the first axis; outside it is an error, not what lies beside it."""
        place = int(index)
        if not 0 <= place < len(self.data):
            raise IndexError(f"shared memory: index {place} of {len(self.data)}")
        return SharedMemory(self.data[place], self.dtype)

    def slice(self, start: Any, length: Any, dim: int = 0) -> "SharedMemory":
        """A range along an axis."""
        place = [slice(None)] * self.data.ndim
        place[dim] = slice(int(start), int(start) + int(length))
        return SharedMemory(self.data[tuple(place)], self.dtype)

    def permute(self, order: Any) -> "SharedMemory":
        """The axes in another order."""
        return SharedMemory(self.data.transpose([int(n) for n in order]), self.dtype)

    def reshape(self, shape: Any) -> "SharedMemory":
        """The same memory; a copy would hide stores."""
        reshaped = self.data.view()
        reshaped.shape = tuple(int(n) for n in shape)
        return SharedMemory(reshaped, self.dtype)

    def load(self, layout: Any = None) -> Any:
        """What it holds now, as a tensor."""
        handle = interpreter.TensorHandle(self.data.copy(), self.dtype)
        return tl.tensor(handle, tl.block_type(self.dtype, list(self.data.shape)))

    def store(self, value: Any) -> None:
        """All of it."""
        if value.dtype != self.dtype or tuple(value.shape) != self.data.shape:
            raise TypeError(
                f"a store of {value.dtype}{list(value.shape)} in {self.dtype}{list(self.data.shape)}"
            )
        self.data[...] = value.handle.data


class _Copies:
    """cp.async: copies wait in the group being filled, groups wait in the order they were committed."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """A program begins."""
        self.open: list[Callable[[], None]] = []
        self.groups: deque[list[Callable[[], None]]] = deque()

    def copy(self, memory: SharedMemory, pointer: Any, mask: Any = None, **_: Any) -> None:
        """Global memory is read at once (nothing may change it), shared memory is written when waited for."""
        other = None if mask is None else 0  # a masked-off element is zero
        value = tl.load(pointer, mask=mask, other=other)
        self.open.append(lambda: memory.store(value))

    def commit(self) -> None:
        """Close the group."""
        self.groups.append(self.open)
        self.open = []

    def wait(self, num_outstanding: Any = 0) -> None:
        """Until at most so many groups are on their way."""
        while len(self.groups) > int(num_outstanding):
            for copy in self.groups.popleft():
                copy()


COPIES = _Copies()


def _jit(function: Any = None, **options: Any) -> Any:
    """gluon.jit: interpreted. The interpreter finds what to replace through the function's globals."""
    if function is None:
        return lambda f: _jit(f, **options)
    function.__globals__.setdefault("tl", tl)
    return triton.jit(function, **options)


def _convert_layout(value: Any, layout: Any, assert_trivial: bool = False) -> Any:
    return value


def _mma(a: Any, b: Any, accumulator: Any, **_: Any) -> Any:
    return tl.dot(a, b, accumulator)


def _warpgroup_mma(a: Any, b: Any, accumulator: Any, *, use_acc: Any = True, **_: Any) -> Any:
    """wgmma. An asynchronous one is computed at once: its operands may not change before the wait."""
    left = a.load() if isinstance(a, SharedMemory) else a
    right = b.load() if isinstance(b, SharedMemory) else b
    return tl.dot(left, right, accumulator if use_acc else tl.zeros_like(accumulator))


def _language() -> types.ModuleType:
    layouts = importlib.import_module(f"{_ROOT}.language._layouts")
    module = types.ModuleType(f"{_ROOT}.language")
    members: dict[str, Any] = {name: getattr(layouts, name) for name in _LAYOUTS if hasattr(layouts, name)}
    members |= {name: getattr(tl, name) for name in _PLAIN}
    members |= {name: _later(name) for name in _SAME}
    members |= {
        "arange": lambda start, end, layout=None: tl.arange(start, end),
        "zeros": lambda shape, dtype, layout=None: tl.zeros(shape, dtype),
        "full": lambda shape, value, dtype, layout=None: tl.full(shape, value, dtype),
        "convert_layout": _convert_layout,
        "set_auto_layout": _convert_layout,
        "allocate_shared_memory": SharedMemory.allocate,
        "barrier": lambda **_: None,
        "thread_barrier": lambda **_: None,
    }
    vars(module).update(members)
    return module


def _module(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(f"{_ROOT}.{name}" if name else _ROOT)
    vars(module).update(members)
    return module


def install() -> None:
    """Put the stand-ins where kernels import Gluon from. Kernels imported before keep the real one."""
    async_copy = _module(
        "language.nvidia.ampere.async_copy",
        async_copy_global_to_shared=COPIES.copy,
        async_copy_global_to_local=COPIES.copy,
        commit_group=COPIES.commit,
        wait_group=COPIES.wait,
    )
    ampere = _module("language.nvidia.ampere", mma_v2=_mma, async_copy=async_copy)
    hopper = _module(
        "language.nvidia.hopper",
        warpgroup_mma=_warpgroup_mma,
        warpgroup_mma_init=lambda value: value,
        warpgroup_mma_wait=lambda num_outstanding=0, deps=None: deps,
        fence_async_shared=lambda cluster=False: None,
    )
    nvidia = _module("language.nvidia", ampere=ampere, hopper=hopper)
    language = _language()
    language.nvidia = nvidia  # type: ignore[attr-defined]
    gluon = _module("", jit=_jit, language=language, constexpr_function=triton.constexpr_function)
    for module in (gluon, language, nvidia, ampere, async_copy, hopper):
        sys.modules[module.__name__] = module
    triton.experimental.gluon = gluon
