"""Table, goals and plot of ``quality.py``."""

import importlib.util
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import show, write_results

TEXTS = {"own": "text of its own kind", "wiki": "WikiText"}

Row = dict[str, Any]


def report(cells: Sequence[dict[str, Any]]) -> None:
    """Print, write benchmarks/results/quality.json, and the plot where matplotlib is there."""
    if not cells:
        print("no cell is there")
        return
    rows = summarized(cells)
    for model in dict.fromkeys(row["model"] for row in rows):
        for text in TEXTS:
            _table(model, text, [row for row in rows if row["model"] == model and text in row])
    findings = compared(rows)
    for line in findings:
        print(line)
    path = write_results("quality", {"rows": rows, "findings": findings, "cells": list(cells)}, False)
    print(f"{len(cells)} cells in {path}")
    if importlib.util.find_spec("matplotlib") is not None:
        plot(rows, path.with_suffix(".png"))


def summarized(cells: Sequence[dict[str, Any]]) -> list[Row]:
    """A row for each model, method and bits: medians over the seeds, and least and most."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell["cell"].split("/")[:3]), []).append(cell)
    rows = []
    for (model, method, bits), found in groups.items():
        row: Row = {"model": model, "method": method, "bits": int(bits), "seeds": len(found)}
        for key in ("bits_per_weight", "cpu_seconds"):
            row[key] = statistics.median(cell[key] for cell in found)
        for text in TEXTS:
            if all(text in cell for cell in found):
                row[text] = {
                    key: _spread([cell[text][key] for cell in found])
                    for key in ("nll", "nll_increase", "kl", "top1_agreement", "original_nll")
                }
        rows.append(row)
    return rows


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _table(model: str, text: str, rows: Sequence[Row]) -> None:
    if not rows:
        return
    shown = []
    for row in sorted(rows, key=lambda row: (-row["bits"], row[text]["kl"]["median"])):
        figures = row[text]
        spread = figures["kl"]["max"] - figures["kl"]["min"]
        shown.append(
            [
                row["method"],
                str(row["bits"]),
                f"{row['bits_per_weight']:.3f}",
                f"{figures['nll']['median']:.4f}",
                f"{figures['nll_increase']['median']:+.4f}",
                f"{figures['kl']['median']:.5f}",
                f"{spread:.5f}",
                f"{100 * figures['top1_agreement']['median']:.2f}",
                f"{row['cpu_seconds']:.0f}",
                str(row["seeds"]),
            ]
        )
    original = rows[0][text]["original_nll"]["median"]
    head = ("method", "bits", "bits/weight", "NLL", "rise", "KL", "max - min", "top-1 %", "CPU s", "seeds")
    show(f"{model}, {TEXTS[text]}: original {original:.4f} nats", head, shown)


def compared(rows: Sequence[Row]) -> list[str]:
    """What the goals ask, of medians; nothing is said where a cell is missing."""
    by_name = {(row["model"], row["method"], row["bits"]): row for row in rows}
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for text in TEXTS:

            def value(method: str, bits: int, key: str, model: str = model, text: str = text) -> float | None:
                row = by_name.get((model, method, bits))
                return None if row is None or text not in row else row[text][key]["median"]

            for bits in (3, 2):
                lines += _lowered(
                    f"{model}, {text}, {bits} bits: KL", "yaqa", "gptq", lambda m, b=bits: value(m, b, "kl")
                )
                lines += _lowered(
                    f"{model}, {text}, {bits} bits: KL",
                    "yaqa-512",
                    "gptq-512",
                    lambda m, b=bits: value(m, b, "kl"),
                )
                for budget in (False, True):
                    lines += _requant(rows, model, text, bits, budget)
            lines += _lowered(
                f"{model}, {text}: NLL gap",
                "2:4+int4",
                "2:4+int4-apart",
                lambda m: value(m, 4, "nll_increase"),
            )
            lines += _ranking(model, text, value)
    return lines


def _lowered(what: str, method: str, beside: str, value: Callable[[str], float | None]) -> list[str]:
    ours, theirs = value(method), value(beside)
    if ours is None or theirs is None:
        return []
    return [f"{what} of {method} is {ours:.5f}, of {beside} {theirs:.5f}{_change(ours, theirs)}"]


def _change(ours: float, theirs: float) -> str:
    """In percent. A gap below zero, of text that the model hardly knows, has no ratio."""
    return f": {100 * (ours / theirs - 1):+.1f} %" if min(ours, theirs) > 0 else ""


def _requant(rows: Sequence[Row], model: str, text: str, bits: int, budget: bool) -> list[str]:
    """The best ReQuant, with a budget of bits or without, beside the bases' line of NLL gap over bits, read
    at equal bits per weight.
    """
    here = [row for row in rows if row["model"] == model and text in row and row["bits"] <= 8]
    ours = [row for row in here if row["method"].startswith("requant-") and row["bits"] == bits]
    ours = [row for row in ours if row["method"].endswith("-budget") == budget]
    ours = [row for row in ours if not row["method"].endswith("-full")]
    dense = [row for row in here if not row["method"].startswith(("requant-", "gwq", "2:4"))]
    # Eight times the calibration of ReQuant's: those gain by that.
    dense = [row for row in dense if not row["method"].endswith("-512")]
    if not ours:
        return []
    best = min(ours, key=lambda row: float(row[text]["nll_increase"]["median"]))
    gap, size = best[text]["nll_increase"]["median"], best["bits_per_weight"]
    points = [(r["bits_per_weight"], r[text]["nll_increase"]["median"]) for r in dense]
    # A budget is kept, not met to the byte: the base whose bytes it was may take a few more.
    beside = at_equal_bits(points, size * 1.005)
    if beside is None:
        return []
    return [
        f"{model}, {text}, {bits} bits: NLL gap of {best['method']} is {gap:.5f} at {size:.3f} bits per "
        f"weight, of the best bases at these bits {beside:.5f}{_change(gap, beside)}"
    ]


def at_equal_bits(points: Sequence[tuple[float, float]], size: float) -> float | None:
    """The least gap that a mixture of two of ``points`` (bits, gap) reaches at ``size`` bits; None: none."""
    below = [point for point in points if point[0] <= size]
    above = [point for point in points if point[0] > size]
    mixed = [gap for _, gap in below]
    for bits, gap in below:
        for more, less in above:
            share = (size - bits) / (more - bits)
            mixed.append(gap + share * (less - gap))
    return min(mixed, default=None)


def _ranking(model: str, text: str, value: Callable[..., float | None]) -> list[str]:
    """Spearman's coefficient between the grid's ReQuant cells at 3 bits and the full ones."""
    names = [f"requant-{base}" for base in ("rtn", "awq", "gptq", "yaqa")]
    pairs = [(value(name, 3, "nll_increase"), value(f"{name}-full", 3, "nll_increase")) for name in names]
    if any(a is None or b is None for a, b in pairs):
        return []
    grid, full = (ranks([float(pair[n] or 0.0) for pair in pairs]) for n in (0, 1))
    count = len(names)
    rho = 1 - 6 * sum((a - b) ** 2 for a, b in zip(grid, full, strict=True)) / (count * (count**2 - 1))
    return [f"{model}, {text}, 3 bits: Spearman's coefficient of ReQuant's bases, grid and full: {rho:.2f}"]


def ranks(values: Sequence[float]) -> list[int]:
    """0 for the least."""
    order = sorted(range(len(values)), key=lambda place: values[place])
    return [order.index(place) for place in range(len(values))]


def plot(rows: Sequence[Row], path: Path) -> None:
    """The NLL gap over bits per weight, one panel per model and text."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(13, 4.6 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), len(TEXTS), squeeze=False)
    for line, model in zip(panels, names, strict=True):
        for axes, (text, title) in zip(line, TEXTS.items(), strict=True):
            here = [row for row in rows if row["model"] == model and text in row]
            for method in dict.fromkeys(row["method"] for row in here):
                points = sorted(
                    (row["bits_per_weight"], row[text]["nll_increase"]["median"])
                    for row in here
                    if row["method"] == method and row[text]["nll_increase"]["median"] > 0
                )
                if points:
                    dashed = "--" if method.startswith(("requant", "gwq")) else "-"
                    axes.plot(
                        *zip(*points, strict=True),
                        dashed,
                        marker="o",
                        markersize=3,
                        linewidth=1,
                        label=method,
                    )
            axes.set_yscale("log")
            axes.set_xlabel("bits per weight, every byte counted")
            axes.set_ylabel("NLL above the original, nats per token")
            axes.set_title(f"{model}, {title}", fontsize="small")
            axes.grid(alpha=0.3, which="both")
            axes.legend(fontsize="xx-small", ncols=2)
    figure.savefig(path, dpi=120)
