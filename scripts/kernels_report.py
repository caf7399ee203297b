"""Compile the GPU kernels for every target without a GPU, check and print them: ``make kernels-report``.

Prints one line per kernel and target, then predictions, and writes both into the marked block of
docs/kernels-gpu.md. Exit code 1 when any gate fails. ``--json FILE`` writes the verdicts too; ``--variants
MODULE`` takes another module's ``variants()``, and then writes no docs.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: these kernels are compiled

import triton
from kernel_gate.gate import CACHE, ROOT, Verdict, run
from kernel_gate.goals import below_goals, dense_seconds, down, predicted, up
from kernel_gate.machines import MACHINES
from kernel_gate.model import FIXED, LATENCY, issue_limits
from kernel_gate.published import DESIGNS, IDEAL, SPEEDUPS, TOKENS
from kernel_gate.shapes import SHAPES

DOCS = ROOT / "docs" / "kernels-gpu.md"
BEGIN, END = "<!-- make kernels-report writes this -->", "<!-- to here -->"
PREDICTED = ("sm_90", "sm_80", "sm_89")


def main() -> int:
    """Run; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--variants", default="nybble.kernels.triton.variants")
    parser.add_argument("--processes", type=int, default=min(8, len(os.sched_getaffinity(0))))
    parser.add_argument("--no-docs", action="store_true", help="leave docs/kernels-gpu.md as it is")
    parser.add_argument("--no-cache", action="store_true", help="compile all anew")
    options = parser.parse_args()
    began = time.perf_counter()
    variants = import_module(options.variants).variants()
    verdicts = run(variants, options.processes, None if options.no_cache else CACHE)
    parts = (resources(verdicts), predictions(verdicts), below_goals(verdicts), others(verdicts))
    block = "\n".join(line for part in parts for line in part)
    print(block)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(v) for v in verdicts]), encoding="utf-8")
    if options.variants.startswith("nybble.") and not options.no_docs:
        write_docs(block)
    failed = [v for v in verdicts if v.broken]
    for verdict in failed:
        print(f"FAILS: {verdict.variant.name} on {verdict.target}: {'; '.join(verdict.broken)}")
    print(
        f"{len(verdicts) - len(failed)} of {len(verdicts)} pass, triton {triton.__version__}, "
        f"{time.perf_counter() - began:.0f} s with {options.processes} processes",
    )
    return 1 if failed or not verdicts else 0


def resources(verdicts: Sequence[Verdict]) -> list[str]:
    """One line per kernel and target."""
    lines = [
        f"### Resources (Triton {triton.__version__}; compiled, never run on a GPU)",
        "",
        "| kernel | target | registers | spills | shared KiB | instr / weight | limit TB/s: issue | "
        "tightest pipe | gate |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for v in verdicts:
        cells = ["-"] * 6
        if v.found:
            cells[:3] = [str(v.found["registers"]), str(v.found["spills"]), f"{v.found['shared'] / 1024:.1f}"]
        if v.found.get("loop"):
            limits = issue_limits(v.variant, MACHINES[v.target], v.found)
            cells[3] = up(sum(v.found["loop"].values()) / v.found["weights_per_thread"], 2)
            if v.variant.decode:
                tightest = min(limits, key=lambda name: limits[name])
                cells[4:] = [down(limits["issue"], 1), f"{down(limits[tightest], 1)} ({tightest})"]
        gate = "passes" if not v.broken else "FAILS: " + "; ".join(v.broken).replace("|", "/")
        lines.append(f"| {v.variant.name} | {v.target} | {' | '.join(cells)} | {gate} |")
    return lines


def predictions(verdicts: Sequence[Verdict]) -> list[str]:
    """Share of copy bandwidth per shape, of the kernel and the splits that are launched for it."""
    lines = ["", "### Predicted decode, 4 bits, fp16, groups of 128 (a model, not a measurement)", ""]
    lines += [
        "`scripts/kernel_gate/model.py` states the model: "
        f"time = {FIXED * 1e6:.1f} us + max(DRAM bytes / copy bandwidth, L2 bytes / L2 bandwidth, the "
        f"busiest SM's bytes * {LATENCY * 1e9:.0f} ns / bytes in flight (SM loads), its bytes / 64 a clock "
        "(SM port), its weights / its share of the issue limit (SM issue)). Tile, warps, stages, splits of "
        "K: those of the launch. Cells: us (share of copy bandwidth; what binds), times rounded up, shares "
        "down. Copy: 4.3 TB/s was measured on an H200, the others are 0.9 of the data sheet. A bound from "
        "above: it knows no loss in DRAM.",
        "",
    ]
    columns = [(target, tokens) for target in PREDICTED for tokens in (1, 16, 64)]
    heads = [f"{MACHINES[target].name} M={tokens}" for target, tokens in columns]
    lines += [f"| linear | MB | {' | '.join(heads)} |", "|---|--:|" + "--:|" * len(columns)]
    for name, (outputs, inputs) in SHAPES.items():
        cells = []
        for target, tokens in columns:
            best = predicted(verdicts, target, (outputs, inputs, tokens))
            if best is None:
                cells.append("-")
                continue
            cells.append(f"{up(best.seconds * 1e6, 1)} ({down(100 * best.share)}%; {best.bound})")
        lines.append(
            f"| {name} {outputs}x{inputs} | {outputs * inputs * 4.125 / 8e6:.1f} | {' | '.join(cells)} |"
        )
    return lines


def others(verdicts: Sequence[Verdict]) -> list[str]:
    """Designs of others, as far as their published figures allow."""
    lines = ["", "### Marlin-like and tinygemm-like designs, by what is published of them", ""]
    lines += [
        "Speed-up over cuBLAS (and the share of cuBLAS's own bandwidth that it implies: speed-up / "
        f"{IDEAL:.2f}), read off gemlite's plots; registers and shared memory are not published. Beside them "
        "what the model above predicts for ours, with cuBLAS at copy bandwidth plus the same fixed time.",
        "",
        f"| GPU, matrix | design | {' | '.join(f'M={m}' for m in TOKENS)} |",
        "|---|---|" + "--:|" * len(TOKENS),
    ]
    targets = {"H100": "sm_90", "A100": "sm_80", "RTX 4090": "sm_89"}
    for (gpu, matrix), designs in SPEEDUPS.items():
        for design, values in designs.items():
            cells = [f"{value:.2f} ({down(100 * value / IDEAL)}%)" for value in values]
            lines.append(f"| {gpu}, {matrix} | {design} (theirs) | {' | '.join(cells)} |")
        target, size = targets[gpu], int(matrix.split("^")[0])
        machine, cells = MACHINES[target], []
        for tokens in TOKENS:
            best = predicted(verdicts, target, (size, size, tokens))
            dense = dense_seconds(machine, size, size)
            cells.append("-" if best is None else down(dense / best.seconds, 2))
        lines.append(f"| {machine.name}, {matrix} | ours (model) | {' | '.join(cells)} |")
    lines += [
        "",
        "| design | decode kernel, by its sources | int-to-float | instr / weight | limit TB/s |",
        "|---|---|--:|--:|--:|",
        *(f"| {' | '.join(design)} |" for design in DESIGNS),
        "",
        "\\* our own compilation of that style for sm_90 at H200 clocks (the conversion pipe is what binds).",
    ]
    return lines


def write_docs(block: str) -> None:
    """Put the block between its marks."""
    text = DOCS.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, mark, tail = rest.partition(END)
    assert mark, f"{DOCS.name} has lost its marks"
    written = f"{head}{BEGIN}\n\n{block}\n\n{END}{tail}"
    if written != text:
        DOCS.write_text(written, encoding="utf-8")
        print(f"{DOCS.relative_to(ROOT)} changed")


if __name__ == "__main__":
    sys.exit(main())
