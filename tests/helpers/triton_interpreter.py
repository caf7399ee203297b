"""Triton's interpreter made honest, for kernels on a machine without a GPU (Triton 3.6 and 3.7).

TRITON_INTERPRET=1 must be set before triton is imported, and this module before any kernels. What it mends:

* bfloat16 is bfloat16. The interpreter holds it as uint16 and adds it as integers; here it is float32,
  rounded to nearest even after every operation.
* ``inline_asm_elementwise`` runs: ``ptx`` executes the text.
* Gluon runs: ``gluon_emulation`` stands in for it, with layouts dropped (the compile gate checks those).
* Every load, store and atomic must stay within the view of a tensor argument, else OutOfBounds.
* The programs of a launch run in a random order (``shuffle``), since a GPU promises none.
* ``poisoned_memory``: what torch.empty returns inside is NaN, or the largest integer.

Not seen by it: races, layouts, shared memory, registers. fp8 and ``extern_elementwise`` raise.
"""

import contextlib
import random
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import gluon_emulation
import numpy as np
import ptx
import torch
import triton
import triton.language as tl
from nybble.kernels.dispatch import Target
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
_RAW = {tl.bfloat16: np.dtype(np.uint16)}


class InterpretedTarget(Target):
    """A GPU's place in the dispatch table, whose tensors are on the CPU."""

    @property
    def is_cpu(self) -> bool:
        """No: what runs on a GPU is chosen."""
        return False


class OutOfBounds(Exception):
    """An active address outside every tensor argument."""


class _State:
    """Of this process: the latest launch's addresses and order, and what was touched so far."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.accesses: Counter[str] = Counter()
        self.random = random.Random(0)
        self.order: list[int] = []
        self.patched: set[Any] = set()  # device functions


_STATE = _State()


def shuffle(seed: int) -> None:
    """Start the random order of programs anew."""
    _STATE.random = random.Random(seed)


def accesses() -> Counter[str]:
    """How many addresses have been loaded, stored and updated so far: a test can see that it tested."""
    return _STATE.accesses


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialized memory of torch.empty is NaN (floats) or the largest value (integers)."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def scalar_type(dtype: Any) -> Any:
    """The element type of a block, a pointer for blocks of pointers."""
    return dtype.element_ty if isinstance(dtype, tl.block_type) else dtype


_stock_np_dtype = interpreter._get_np_dtype


def _np_dtype(dtype: Any) -> Any:
    scalar = scalar_type(dtype)
    return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else _scalar_np_dtype(scalar)


@cache
def _scalar_np_dtype(scalar: Any) -> Any:
    if scalar == tl.bfloat16:
        return np.dtype(np.float32)
    if scalar.is_fp8():
        raise NotImplementedError("fp8 is not emulated")
    return _stock_np_dtype(scalar)


def _check_handle(self: Any) -> None:
    """Rounds what became bfloat16; refuses an array wider than its type."""
    if isinstance(self.dtype, tl.pointer_type):
        return
    if scalar_type(self.dtype) == tl.bfloat16:
        if self.data.dtype.kind != "f":
            raise TypeError(f"bfloat16 held as {self.data.dtype}: an operation that is not emulated")
        self.data = ptx.round_bf16(self.data)
    elif self.data.itemsize * 8 > max(8, self.dtype.primitive_bitwidth):
        raise ValueError(f"{self.data.dtype} for {self.dtype}")


def _to_raw(data: Any, dtype: Any) -> Any:
    """As it lies in memory."""
    return ptx.bf16_to_bits(data) if scalar_type(dtype) == tl.bfloat16 else np.ascontiguousarray(data)


def _from_raw(data: Any, dtype: Any) -> Any:
    return ptx.bits_to_bf16(data) if scalar_type(dtype) == tl.bfloat16 else data


class HonestBuilder(interpreter.InterpreterBuilder):  # type: ignore[misc]
    """The interpreter's operations, with those replaced that are wrong or missing."""

    def set_grid_dim(self, *grid: int) -> None:
        """Also draws the order of the programs."""
        super().set_grid_dim(*grid)
        _STATE.order = list(range(grid[0] * grid[1] * grid[2]))
        _STATE.random.shuffle(_STATE.order)

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        """The program that the random order has here."""
        _, height, depth = self.grid_dim
        place = _STATE.order[(x * height + y) * depth + z]
        gluon_emulation.COPIES.reset()
        super().set_grid_idx(place // (height * depth), place // depth % height, place % depth)

    def get_bf16(self, value: float) -> Any:
        """A constant."""
        return Handle(np.array([value], np.float32), tl.bfloat16)

    def create_masked_load(self, pointers: Any, mask: Any, other: Any, *_: Any) -> Any:
        """Checked; bfloat16 is decoded."""
        dtype = pointers.get_element_ty()
        self._check("load", pointers, mask.data)
        raw = _RAW.get(dtype, _np_dtype(dtype))
        filler = np.zeros(pointers.data.shape, raw) if other is None else _to_raw(other.data, dtype)
        filler = np.broadcast_to(filler, pointers.data.shape)
        mask_data = np.broadcast_to(mask.data, pointers.data.shape)
        loaded = interpreter._interpreter.load(pointers.data, mask_data, filler, raw)
        return Handle(_from_raw(loaded, dtype), dtype)

    def create_masked_store(self, pointers: Any, value: Any, mask: Any, *_: Any) -> Any:
        """Checked; bfloat16 is encoded. A value of another type would write other bytes: refused."""
        dtype = pointers.get_element_ty()
        if scalar_type(value.dtype) != dtype and dtype != tl.int1:
            raise TypeError(f"a store of {value.dtype} through a pointer to {dtype}")
        self._check("store", pointers, mask.data)
        raw = _to_raw(value.data, dtype)
        mask_data = np.broadcast_to(mask.data, pointers.data.shape)
        return interpreter._interpreter.store(
            pointers.data, np.broadcast_to(raw, pointers.data.shape), mask_data
        )

    def create_atomic_rmw(self, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        """Checked."""
        if pointers.get_element_ty() == tl.bfloat16:
            raise NotImplementedError("an atomic on bfloat16")
        self._check("atomic", pointers, mask.data)
        return super().create_atomic_rmw(operation, pointers, value, mask, *rest)

    def create_atomic_cas(self, pointers: Any, *rest: Any) -> Any:
        """Checked."""
        self._check("atomic", pointers, np.ones(pointers.data.shape, bool))
        return super().create_atomic_cas(pointers, *rest)

    def _check(self, kind: str, pointers: Any, mask: Any) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        active = pointers.data[np.broadcast_to(mask, pointers.data.shape)].ravel()
        _STATE.accesses[kind] += active.size
        if not active.size:
            return
        starts = np.array([start for start, _ in _STATE.ranges], np.uint64)
        ends = np.array([end for _, end in _STATE.ranges], np.uint64)
        place = np.searchsorted(starts, active, "right").astype(np.int64) - 1
        bad = (place < 0) | (active + np.uint64(size) > ends[np.maximum(place, 0)])
        if bad.any():
            raise OutOfBounds(f"{kind}: {bad.sum()} of {active.size} addresses, program {self.grid_idx}")
        if (active % np.uint64(size)).any():
            raise OutOfBounds(f"{kind}: misaligned for {size} bytes, program {self.grid_idx}")

    def cast_impl(self, source: Any, target: Any) -> Any:
        """By numpy, whose casts round to nearest even; the handle rounds bfloat16."""
        data, dtype = source.data, _np_dtype(target.scalar)
        if data.dtype == np.float64 and target.scalar == tl.bfloat16:
            raise NotImplementedError("fp64 to bfloat16 would round twice")
        return Handle(data.astype(dtype), target.scalar)

    create_si_to_fp = create_ui_to_fp = create_fp_to_si = create_fp_to_ui = cast_impl
    create_fp_ext = create_fp_trunc = cast_impl

    def create_int_cast(self, source: Any, target: Any, is_signed: bool) -> Any:
        """numpy wraps as hardware does."""
        return self.cast_impl(source, target)

    def create_fp_to_fp(self, source: Any, target: Any, rounding: Any) -> Any:
        """To nearest even only."""
        if rounding not in (None, interpreter._ir.ROUNDING_MODE.RTNE):
            raise NotImplementedError(f"rounding {rounding}")
        return self.cast_impl(source, target)

    def create_bitcast(self, source: Any, target: Any) -> Any:
        """Between the bytes in memory."""
        scalar = target.scalar
        raw = np.ascontiguousarray(_to_raw(source.data, source.dtype))
        return Handle(_from_raw(raw.view(_RAW.get(scalar, _np_dtype(scalar))), scalar), scalar)

    def binary_op(self, lhs: Any, rhs: Any, op: Any) -> Any:
        """What a comparison gives is a bool; the stock handle says it is of the operands' type."""
        out = op(lhs.data, rhs.data)
        if out.dtype == np.bool_:
            return Handle(out, tl.int1)
        dtype = lhs.dtype.scalar
        return Handle(out.astype(_np_dtype(dtype), copy=False), dtype)

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        """Rounded once: products of halves and floats are exact in fp64."""
        wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return Handle(wide.astype(z.data.dtype), z.dtype.scalar)

    def create_fabs(self, x: Any) -> Any:
        """By numpy."""
        return Handle(np.abs(x.data), x.dtype.scalar)

    def create_dot(self, a: Any, b: Any, c: Any, *_: Any) -> Any:
        """Products of halves are exact in fp32, sums are fp32; integers exact."""
        if a.data.dtype.kind == "f":
            product = a.data.astype(np.float32) @ b.data.astype(np.float32)
        else:
            product = a.data.astype(np.int64) @ b.data.astype(np.int64)
        return Handle((product + c.data).astype(c.data.dtype), c.dtype.scalar)

    def create_inline_asm(
        self, text: str, constraints: str, values: Any, types: Any, is_pure: bool, pack: int
    ) -> Any:
        """Executed by ``ptx``. Elements that one call packs are neighbours along the last axis."""
        inputs = [r for v in values for r in ptx.registers(_to_raw(v.data, v.dtype), pack)]
        names = constraints.split(",")
        num_outputs = sum(name.startswith("=") for name in names)
        if len(names) - num_outputs != len(inputs):
            raise ValueError(f"inline asm: {len(inputs)} registers for the constraints {constraints}")
        scalars = [scalar_type(t) for t in types]
        raws = [_RAW.get(scalar, _np_dtype(scalar)) for scalar in scalars]
        results = ptx.elements(ptx.run(text, inputs, num_outputs), raws, pack, values[0].data.shape)
        pairs = zip(results, scalars, strict=True)
        return _AsmResult([Handle(_from_raw(raw, scalar), scalar) for raw, scalar in pairs])

    def create_extern_elementwise(self, *_: Any) -> Any:
        """Not to be had."""
        raise NotImplementedError("extern_elementwise")


class _AsmResult:
    """Stands for the operation whose results Triton asks for by number."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def get_result(self, index: int) -> Any:
        """The tensor of output ``index``."""
        return self._handles[index]


_stock_init_args = interpreter.GridExecutor._init_args_hst


def _init_args(self: Any, args: Any, kwargs: Any) -> Any:
    """Also notes which addresses the launch may touch: the views of its arguments, not their storages."""
    args, kwargs = _stock_init_args(self, args, kwargs)
    found: list[tuple[int, int]] = []
    pending = [*args, *kwargs.values()]
    while pending:
        argument = interpreter._unwrap_tensor(pending.pop())
        if isinstance(argument, tuple):
            pending += argument
        elif isinstance(argument, interpreter.TensorDescriptor):
            pending.append(argument.base)
        elif hasattr(argument, "data_ptr") and argument.numel():
            steps = zip(argument.shape, argument.stride(), strict=True)
            length = 1 + sum((size - 1) * abs(stride) for size, stride in steps)
            start = argument.data_ptr()
            found.append((start, start + length * argument.element_size()))
    # Views may nest (a workspace and a part of it): what is inside another adds nothing.
    _STATE.ranges = _merged(found)
    return args, kwargs


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Without those that lie within another. Neighbours stay apart: no access may straddle two tensors."""
    kept: list[tuple[int, int]] = []
    for start, end in sorted(ranges, key=lambda r: (r[0], -r[1])):
        if not kept or end > kept[-1][1]:
            kept.append((start, end))
    return kept


_stock_rewrite = interpreter.FunctionRewriter.rewrite_ast


def _rewrite(self: Any) -> Any:
    """With the annotations of the source: the rewritten ones are strings, and "gl.constexpr" is not known."""
    function = _stock_rewrite(self)
    function.__annotations__ = self.fn.__annotations__
    return function


def _call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
    """As stock, but the language's functions are replaced once for a launch, not for every call."""
    if self.fn not in _STATE.patched:
        interpreter._patch_lang(self.fn)
        _STATE.patched.add(self.fn)
    return self.rewrite()(*args, **kwargs)


def _first_config(self: Any, *args: Any, **kwargs: Any) -> Any:
    """An autotuner's first configuration, for there is nothing to measure."""
    config = self.configs[0]
    return self.fn.run(*args, **kwargs, **config.all_kwargs())


_stock_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor(tensor: Any, *scope: Any) -> None:
    """Triton 3.6 turns arrays of one element into numbers in a way that numpy no longer allows."""
    _stock_patch_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.squeeze())


_stock_call = interpreter.GridExecutor.__call__


def _call(self: Any, *args: Any, **kwargs: Any) -> None:
    """Hardware does not warn of overflow."""
    _STATE.patched.clear()
    with np.errstate(all="ignore"):
        _stock_call(self, *args, **kwargs)


def _install() -> None:
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 must be set before triton is imported (see conftest.py)")
    compiled = [
        f"{module.__name__}.{name}"
        for module in list(sys.modules.values())
        if module.__name__.startswith("nybble.kernels.triton")
        for name, value in vars(module).items()
        if isinstance(value, triton.runtime.JITFunction)
    ]
    if compiled:
        raise RuntimeError(f"import triton_interpreter before these are decorated: {', '.join(compiled)}")
    interpreter._get_np_dtype = _np_dtype
    interpreter._validate_np_data_size = lambda array, dtype: (
        isinstance(dtype, tl.pointer_type)
        or array.itemsize * 8 <= max(8, 32 if scalar_type(dtype) == tl.bfloat16 else dtype.primitive_bitwidth)
    )
    Handle.__post_init__ = _check_handle
    builder = HonestBuilder()
    interpreter.interpreter_builder = builder
    interpreter.interpreter_semantic.builder = builder
    interpreter.GridExecutor._init_args_hst = _init_args
    interpreter.GridExecutor.__call__ = _call
    interpreter._patch_lang_tensor = _patch_tensor
    interpreter.InterpretedFunction.__call__ = _call_device_function
    interpreter.FunctionRewriter.rewrite_ast = _rewrite
    triton.runtime.autotuner.Autotuner.run = _first_config
    gluon_emulation.install()


_install()
