"""Linears on the CPU, each alone: ``python benchmarks/cpu_kernels.py [--quick]``; single cells by options.

Per kernel, bit width, number of tokens and threads: time of one linear with its activations' quantization,
GB/s of packed weights and GOP/s, next to the read bandwidth and the int8 peak of loops of the same
instructions. Below 8 tokens weights rotate over 128 MiB or 1.5 times the last cache, so that none is in one.
All variants of a cell (the plain linear, with 0.5 % of outliers, 2:4) and its limits run in turn, round after
round: medians, or with --best the fastest round of each, limits too.
Writes benchmarks/results/cpu-kernels-ISA-CPU.json, and a PNG with matplotlib.

AVX2 as a CPU without AVX-512 compiles it (16 registers): NUMBA_CPU_NAME=znver3 NUMBA_CPU_FEATURES=+avx,+avx2,
+fma,+f16c,+bmi,+bmi2,+lzcnt,+popcnt,+sse4.2,+sse4.1,+ssse3,+sse3,+cx16,+movbe and --isa avx2.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import show, write_results
from cpu_kernels_plot import plot
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from nybble.engine.hardware import cpu_features
from nybble.kernels.cpu.abi import compile_kernel, word
from nybble.kernels.cpu.compiled import kernels_for
from nybble.kernels.cpu.ir import I8, I16, I32, Emitter
from nybble.kernels.cpu.isa import AVX2, VNNI
from nybble.kernels.cpu.numba_linear import bf16_refusal, instruction_set, why_not
from nybble.kernels.cpu.pool import RECORD_WORDS, Pool
from nybble.kernels.cpu.recorder import Recorder
from nybble.kernels.cpu.tape import Inputs, Tape
from nybble.kernels.cpu.weights import LowBitWeight, pack_low_bit
from nybble.kernels.dispatch import Target
from nybble.kernels.layout import PackedWeight, QuantSpec, SparseOverlay
from peers.read_loop import ReadLoop

_LAST_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")  # as in "32768K"
_LAST_CACHE_BYTES = int(_LAST_CACHE.read_text().rstrip("K\n")) << 10 if _LAST_CACHE.exists() else 0
ROTATED_BYTES = max(128 << 20, _LAST_CACHE_BYTES * 3 // 2)
OUTLIERS = 0.005
_CHAINS = 12  # independent sums: enough to hide an instruction's latency


@dataclass(frozen=True)
class Case:
    """One linear: ``variant`` is "plain", "overlay", "2:4", "exact" or "bf16"."""

    variant: str
    bits: int
    rows: int
    cols: int
    tokens: int
    threads: int


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", choices=("auto", "amx", "vnni", "avx2"), default="auto")
    parser.add_argument("--shapes", nargs="+", default=["8192x2048", "4096x14336"])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 16, 64, 512])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--variants", nargs="+", default=["overlay", "2:4", "exact"], help="beside plain")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a cell, at least 5 rounds")
    parser.add_argument("--best", action="store_true", help="fastest rounds, not medians: on a busy machine")
    parser.add_argument("--quick", action="store_true", help="one shape, int4 only, a fifth of the time")
    options = parser.parse_args()
    if options.quick:
        options.shapes, options.bits, options.seconds = options.shapes[:1], [4], options.seconds / 5
    isa = instruction_set(Target(cpu_features=cpu_features(), cpu_kernels=options.isa))
    if isa is None:
        parser.error(
            f"--isa {options.isa}: {why_not(Target(cpu_features=cpu_features(), cpu_kernels=options.isa))}"
        )
    results: list[dict[str, Any]] = []
    for threads in options.threads:
        pool = Pool(threads)
        for shape in options.shapes:
            rows, cols = (int(part) for part in shape.split("x"))
            for bits in options.bits:
                results += measure(isa, pool, options, (bits, rows, cols))
        pool.close()
    report(isa, results)
    written = {
        "isa": isa,
        "statistic": "best" if options.best else "median",
        "compiled_for": os.environ.get("NUMBA_CPU_NAME", "host"),
        "results": results,
    }
    path = write_results(f"cpu-kernels-{isa}{'-quick' if options.quick else ''}", written)
    print(f"written: {path}")
    plot(written, path.with_suffix(".png"))


def measure(
    isa: str, pool: Pool, options: argparse.Namespace, shape: tuple[int, int, int]
) -> list[dict[str, Any]]:
    """All variants at one bit width and shape, for all numbers of tokens."""
    weights = {k: v for k, v in make_variants(*shape).items() if k in ("plain", *options.variants)}
    limits = {"read": (ReadLoop(pool, ROTATED_BYTES), ROTATED_BYTES), "peak": peak_call(isa, pool)}
    results = []
    for tokens in options.tokens:
        calls = {name: rotated(isa, pool, weight, tokens, name) for name, weight in weights.items()}
        timed = {name: call for name, (call, _) in calls.items()} | {
            k: call for k, (call, _) in limits.items()
        }
        seconds = interleaved(timed, options.seconds)
        middle = min if options.best else statistics.median
        reached = {k: work / middle(seconds[k]) / 1e9 for k, (_, work) in limits.items()}
        for name, (_, copies) in calls.items():
            case = Case(name, *shape, tokens, pool.num_threads)
            each = [value / copies for value in seconds[name]]
            results.append(row(case, weights[name].nbytes, middle(each)) | reached)
    return results


def row(case: Case, num_bytes: int, seconds: float) -> dict[str, Any]:
    """The record of one case."""
    work = 2.0 * case.rows * case.cols * case.tokens  # as if dense: 2:4 does half of it
    record = {field.name: getattr(case, field.name) for field in fields(case)}
    rates = {"gb_s": num_bytes / seconds / 1e9, "gop_s": work / seconds / 1e9}
    return record | {"bytes": num_bytes, "seconds": seconds, **rates}


def make_variants(bits: int, rows: int, cols: int) -> dict[str, LowBitWeight]:
    """The same linear in every way there is of it."""
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (rows, cols), generator=rng, dtype=torch.uint8)
    scales = (torch.rand(rows, cols // 32, generator=rng) * 0.01 + 1e-3).half()
    weight = PackedWeight(codes, QuantSpec(bits, 32, True), scales)
    plain = pack_low_bit(weight)
    chosen = torch.rand(rows, cols, generator=rng) < OUTLIERS
    residuals = SparseOverlay.of(torch.randn(rows, cols, generator=rng) * chosen)
    variants = {"plain": plain, "overlay": pack_low_bit(replace(weight, outliers=residuals)), "exact": plain}
    if bf16_refusal(Target(cpu_features=cpu_features(), cpu_kernels="auto")) is None:
        variants["bf16"] = plain
    if bits == 4:
        kept = codes.view(rows, cols // 4, 4).clone()
        kept[torch.rand(kept.shape, generator=rng).argsort(2) < 2] = 8
        variants["2:4"] = pack_low_bit(replace(weight, values=kept.view(rows, cols)), sparse=True)
    return variants


def rotated(
    isa: str, pool: Pool, weight: LowBitWeight, tokens: int, variant: str
) -> tuple[Callable[[], None], int]:
    """A call that computes as many copies of a linear as fill ROTATED_BYTES, and their number."""
    copies = max(2, -(-ROTATED_BYTES // weight.nbytes)) if tokens < 8 else 1
    recorder = Recorder(kernels_for(isa), inputs_for(tokens), pool.num_threads)
    out = None
    for _ in range(copies):
        x = torch.randn(tokens, weight.in_features)  # its own, so that it is quantized for each
        out = recorder.linear([copied(weight)], x, {"exact": "fp32", "bf16": "bf16"}.get(variant, "int8"))
    assert out is not None
    tape: Tape = recorder.finish(out)
    return lambda: tape.run(pool), copies


def inputs_for(tokens: int) -> Inputs:
    """Of a step of so many tokens."""
    inputs = Inputs(tokens)
    inputs.tokens[0] = tokens
    return inputs


def copied(weight: LowBitWeight) -> LowBitWeight:
    """In memory of its own."""
    raw = np.empty(weight.codes.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    codes = raw[start : start + weight.codes.nbytes].reshape(weight.codes.shape)
    codes[...] = weight.codes
    overlay = weight.overlay
    if overlay is not None:
        overlay = replace(overlay, cols=overlay.cols.copy(), values=overlay.values.copy())
    return replace(weight, codes=codes, scales=weight.scales.copy(), overlay=overlay)


def interleaved(calls: dict[str, Callable[[], None]], limit: float) -> dict[str, list[float]]:
    """Seconds of each call in turn, for ``limit`` seconds; the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + limit
    while len(seconds["plain"]) < 6 or time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


@intrinsic(prefer_literal=True)
def _dot_products(typingctx: Any, isa: Any, steps: Any, out: Any) -> Any:
    """``steps`` times _CHAINS independent int8 dot product instructions."""
    code = int(isa.literal_value)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        _, steps, out = arguments
        emit = Emitter(builder)
        wide = code == VNNI
        vector = ir.VectorType(I32, 16) if wide else ir.VectorType(I16, 16)
        size = 64 if wide else 32
        values = emit.load(ir.VectorType(I8, size), out)
        slots = [cgutils.alloca_once_value(builder, builder.bitcast(values, vector)) for _ in range(_CHAINS)]
        with cgutils.for_range(builder, steps):
            for slot in slots:
                total = builder.load(slot)
                if wide:
                    total = emit.call("llvm.x86.avx512.vpdpbusd.512", vector, [total, values, values])
                else:
                    as_bytes = builder.bitcast(total, ir.VectorType(I8, size))
                    product = emit.call("llvm.x86.avx2.pmadd.ub.sw", vector, [as_bytes, values])
                    total = builder.add(total, product)
                builder.store(total, slot)
        for i, slot in enumerate(slots):
            emit.store(builder.load(slot), emit.offset(out, 64 * i))
        return context.get_dummy_value()

    return types.void(isa, types.intp, types.intp), codegen


def peak_kernel(isa: int) -> Any:
    """args: steps, out."""

    def peak(args, thread, num_threads):  # type: ignore[no-untyped-def]
        _dot_products(isa, word(args, 0), word(args, 1) + thread * 1024)

    return peak


def peak_call(isa: str, pool: Pool) -> tuple[Callable[[], None], float]:
    """A call of the instruction that the kernels multiply with, and its operations (two per product).

    For AMX it is VNNI's too, so that the two can be compared.
    Shorter ones fall short: after a loop over memory the first 50 us are slow (Zen 4).
    """
    steps, out = 1_000_000, np.ones(1024 * pool.num_threads, np.uint8)
    products = 32 if isa == "avx2" else 64
    call = kernel_call(peak_kernel(AVX2 if isa == "avx2" else VNNI), [steps, out.ctypes.data], pool)
    return lambda kept=out: call(), 2.0 * products * _CHAINS * steps * pool.num_threads


def kernel_call(kernel: Callable[..., None], args: list[int], pool: Pool) -> Callable[[], None]:
    """A kernel on a pool's threads."""
    compiled = compile_kernel(kernel)
    words = np.array(args, np.int64)
    records = np.zeros((1, RECORD_WORDS), np.int64)
    records[0, :3] = compiled.address, words.ctypes.data, 1
    return lambda kept=(compiled, words): pool.run(records.ctypes.data, 1)


def report(isa: str, results: list[dict[str, Any]]) -> None:
    """Print the table; overlay and 2:4 with their ratio to the plain linear of the same case."""
    rows = []
    for result in results:
        same = ("bits", "rows", "cols", "tokens", "threads")
        plain = next(
            r for r in results if r["variant"] == "plain" and all(r[key] == result[key] for key in same)
        )
        rows.append(
            (
                result["variant"],
                str(result["bits"]),
                f"{result['rows']}x{result['cols']}",
                str(result["tokens"]),
                str(result["threads"]),
                f"{result['seconds'] * 1e6:.0f}",
                f"{result['gb_s']:.1f} ({result['gb_s'] / result['read']:.0%})",
                f"{result['gop_s']:.0f} ({result['gop_s'] / result['peak']:.0%})",
                f"{result['seconds'] / plain['seconds']:.2f}",
            )
        )
    header = ("kernel", "bits", "shape", "tokens", "threads", "us", "GB/s", "GOP/s", "time / plain")
    show(f"linears, {isa}: shares are of the read bandwidth and int8 peak of the same rounds", header, rows)


if __name__ == "__main__":
    main()
