"""Low-bit linears on a GPU beside what the machine has: ``python benchmarks/kernels.py [--budget SECONDS]``.

Per op, shape (linears of Llama-3 1B, 8B and 70B, and 16384^2) and number of tokens: microseconds in a CUDA
graph whose calls rotate over weights that no cache holds, TB/s of weights and TFLOP/s as shares of the copy
bandwidth and matmul rate that the same run measured, and speed-ups over the others. Our results and
cuSPARSELt's are checked against float64; those of cublas, tinygemm and gemlite, which are timed over weights
of their own, are not. Writes benchmarks/results/kernels-GPU.json and .svg after every shape.

REHEARSE=1 runs all of it on a CPU, over small shapes and interpreted kernels: for mistakes, not for figures.
Imports torch, triton, numpy and ours only.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.extend(
    str(Path(__file__).resolve().parents[1] / part) for part in ("benchmarks", "scripts", "tests/helpers")
)
os.environ["TRITON_INTERPRET"] = os.environ.get("REHEARSE", "0")  # before triton is imported

import torch
import triton
from gpu_clock import Clock, copy_bandwidth, cuda_clock, matmul_rate, wall_clock
from gpu_ops import OPS, Linear, Shape
from kernel_gate.shapes import SHAPES
from nybble.kernels.dispatch import Target
from svg_plot import chart, page
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
REHEARSAL = os.environ.get("REHEARSE") == "1"
PEERS = ("tinygemm", "cusparselt", "gemlite")  # may be missing; ours may not
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ORDER = ("16384^2", "8B gate_up", "8B down", "8B qkv", "8B o", "70B gate_up", "70B down", "70B qkv", "70B o")
TOLERANCE = 1e-2  # relative, of bf16's rounding of weights, products and outputs
SAMPLED = 2048  # outputs that are checked one by one
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Machine:
    """Where and how it is measured, and the limits that were measured first."""

    name: str
    target: Target
    clock: Clock
    copies_of: Callable[[int], int]
    copy: float  # bytes read and written per second
    matmul: float  # operations per second


def main() -> int:
    """Measure, print, write; 1 if a result was wrong or nothing was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=300, help="seconds after which no new shape is begun")
    parser.add_argument("--shapes", nargs="+", help="names, see scripts/kernel_gate/shapes.py")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS))
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    options = parser.parse_args()
    if not REHEARSAL and not torch.cuda.is_available():
        print("kernels.py: no CUDA device; REHEARSE=1 runs it on a CPU", file=sys.stderr)
        return 2
    started = time.monotonic()
    machine = rehearsal(options.dtype) if REHEARSAL else this_gpu(options.dtype)
    print(f"{machine.name}: copy {machine.copy / 1e12:.3f} TB/s, matmul {machine.matmul / 1e12:.1f} TFLOP/s")
    shapes = {"small": (128, 256), "odd": (100, 300)} if REHEARSAL else SHAPES
    names = options.shapes or [*(n for n in ORDER if n in shapes), *(n for n in shapes if n not in ORDER)]
    tokens = options.tokens or ((1, 9, 70) if REHEARSAL else TOKENS)
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for name in names:
        if time.monotonic() - started > options.budget:
            left_out[name] = f"the budget of {options.budget:.0f} s was spent"
            continue
        try:
            measure(machine, name, shapes[name], tokens, options.ops, rows)
        finally:
            write(machine, rows, left_out)
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")
    wrong = wrong_rows(rows)
    for row in wrong:
        print(
            f"WRONG: {row['op']} {row['shape']} M={row['tokens']}: relative error {row['error']:.2e}, "
            f"of one result {row['worst']:.2e}"
        )
    missing = [row for row in rows if "unavailable" in row and row["op"] not in PEERS]
    for row in missing:
        print(f"MISSING: {row['op']} {row['shape']}: {row['unavailable']}")
    return 1 if wrong or missing or not rows else 0


def wrong_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that were checked and are not within the tolerance; NaN is not."""
    measures = ("error", "worst")
    return [row for row in rows if any(n in row and not row[n] <= TOLERANCE for n in measures)]


def worst_element(x: Tensor, weight: Tensor, out: Tensor, exact: Tensor) -> float:
    """The largest error of one result, of its exact value and what rounding each product moves it by.

    Of ``SAMPLED`` outputs, the last 64 among them (padding's neighbours). A norm over all does not see a few
    that are wrong. x, weight, exact: float64.
    """
    count = len(weight)
    chosen = torch.randperm(count, device=weight.device)[:SAMPLED]
    chosen = torch.cat([chosen, torch.arange(max(0, count - 64), count, device=weight.device)])
    spread = (x.square() @ weight[chosen].square().T).sqrt()
    wanted = exact[:, chosen]
    return float(((out.double()[:, chosen] - wanted).abs() / (spread + wanted.abs())).max())


def this_gpu(dtype: str) -> Machine:
    """The first CUDA device."""
    triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    properties = torch.cuda.get_device_properties(0)
    rotated = 4 * properties.L2_cache_size
    torch_dtype = getattr(torch, dtype)
    return Machine(
        torch.cuda.get_device_name(),
        Target("cuda", torch_dtype),
        cuda_clock,
        lambda num_bytes: max(2, -(-rotated // num_bytes)),
        copy_bandwidth(cuda_clock, "cuda", 1 << 30),
        matmul_rate(cuda_clock, "cuda", 8192, torch_dtype),
    )


def rehearsal(dtype: str) -> Machine:
    """A CPU with interpreted kernels."""
    from interpreted_model import as_if_on
    from triton_interpreter import InterpretedTarget  # before any kernel

    as_if_on("sm_90").start()
    target = InterpretedTarget("cpu", getattr(torch, dtype))
    copy = copy_bandwidth(wall_clock, "cpu", 1 << 20)
    matmul = matmul_rate(wall_clock, "cpu", 64, target.dtype)
    return Machine("rehearsal", target, wall_clock, lambda num_bytes: 2, copy, matmul)


def measure(
    machine: Machine,
    name: str,
    size: tuple[int, int],
    all_tokens: tuple[int, ...],
    ops: list[str],
    rows: list[dict[str, Any]],
) -> None:
    """Append all ops of one shape to ``rows``; a line is printed for each.

    An op that fails is a row that says why. Raises its error where it cost this process the device.
    """
    shape = Shape(*size, machine.target, machine.copies_of)
    first = len(rows)
    try:
        for op in ops:
            base = {"op": op, "shape": name, "outputs": size[0], "inputs": size[1]}
            line = []
            try:
                linear = OPS[op](shape)
                for tokens in all_tokens:
                    row = base | timed(machine, linear, shape, tokens)
                    rows.append(row)
                    line.append(f"{tokens}:{row['seconds'] * 1e6:.1f}us/{row['copy_share']:.0%}")
            except Exception as error:
                rows.append(base | {"unavailable": f"{type(error).__name__}: {str(error).strip()[:300]}"})
                line.append(rows[-1]["unavailable"])
                if not device_answers():
                    raise
            finally:
                print(f"{name:12s} {op:14s} {' '.join(line)}", flush=True)
                linear = None  # type: ignore[assignment]
            if not REHEARSAL:
                torch.cuda.empty_cache()
    finally:
        add_speedups(rows[first:])


def device_answers() -> bool:
    """Whether the device is not lost to this process: after some CUDA errors every call fails."""
    try:
        if not REHEARSAL:
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def add_speedups(rows: list[dict[str, Any]]) -> None:
    """Over each peer that was timed, to the rows of one shape."""
    times = {(row["op"], row["tokens"]): row["seconds"] for row in rows if "seconds" in row}
    for row in rows:
        for peer in ("cublas", *PEERS):
            if "seconds" in row and (peer, row["tokens"]) in times:
                row.setdefault("speedup", {})[peer] = times[peer, row["tokens"]] / row["seconds"]


def timed(machine: Machine, linear: Linear, shape: Shape, tokens: int) -> dict[str, Any]:
    """One op at one number of tokens."""
    x = torch.randn(tokens, shape.inputs, device=machine.target.device, dtype=machine.target.dtype)
    found: dict[str, Any] = {"kernel": linear.kernel, "tokens": tokens, "bytes": linear.num_bytes}
    if linear.exact is not None:
        exact = x.double() @ linear.exact.T
        out = linear.calls[0](x)
        found["error"] = float((out.double() - exact).norm() / exact.norm())
        found["worst"] = worst_element(x.double(), linear.exact, out, exact)
    seconds = machine.clock([lambda call=call: call(x) for call in linear.calls])  # type: ignore[misc]
    rate, operations = linear.num_bytes / seconds, 2.0 * shape.outputs * shape.inputs * tokens / seconds
    return found | {
        "seconds": seconds,
        "tb_s": rate / 1e12,
        "copy_share": rate / machine.copy,
        "tflop_s": operations / 1e12,
        "matmul_share": operations / machine.matmul,
    }


def write(machine: Machine, rows: list[dict[str, Any]], left_out: dict[str, str]) -> None:
    """JSON, and speed-ups as a plot beside it. A rehearsal writes to a folder of its own."""
    folder = RESULTS if not REHEARSAL else ROOT / ".cache" / "rehearsal"
    folder.mkdir(parents=True, exist_ok=True)
    stem = "kernels-" + re.sub(r"[^a-z0-9]+", "-", machine.name.lower()).strip("-")
    environment = {
        "gpu": machine.name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "dtype": str(machine.target.dtype).removeprefix("torch."),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "copy_bytes_s": machine.copy,
        "matmul_flop_s": machine.matmul,
    }
    text = json.dumps({"environment": environment, "left_out": left_out, "results": rows}, indent=1)
    (folder / f"{stem}.json").write_text(text + "\n", encoding="utf-8")
    panels = []
    for name in dict.fromkeys(row["shape"] for row in rows):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row["shape"] == name and "cublas" in row.get("speedup", {}):
                lines.setdefault(row["op"], []).append((row["tokens"], row["speedup"]["cublas"]))
        panels.append(chart(name, lines, "tokens; speed-up over cuBLAS"))
    (folder / f"{stem}.svg").write_text(page(panels), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
