"""Plot of ``cpu_kernels.py``: what share of the read bandwidth and of the int8 peak each linear reaches."""

import importlib.util
from pathlib import Path
from typing import Any

GOALS = {"amx": 0.75, "vnni": 0.75, "avx2": 0.6}  # of the peak, from 16 tokens on
READ_GOAL = 0.9  # of the bandwidth, at one token


def plot(written: dict[str, Any], path: Path) -> None:
    """One panel per number of threads and limit, if matplotlib is there."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    results = [r for r in written["results"] if r["variant"] in ("plain", "2:4")]
    threads = sorted({r["threads"] for r in results})
    figure = Figure(figsize=(11, 3.4 * len(threads)), layout="constrained")
    panels = figure.subplots(len(threads), 2, squeeze=False, width_ratios=(1, 3))
    for line, count in zip(panels, threads, strict=True):
        here = [r for r in results if r["threads"] == count]
        few, many = [r for r in here if r["tokens"] == 1], [r for r in here if r["tokens"] > 1]
        _bars(line[0], few, "gb_s", "read", READ_GOAL)
        _bars(line[1], many, "gop_s", "peak", GOALS[written["isa"]])
        line[0].set_title(f"{count} thread(s): share of read bandwidth", fontsize="small")
        title = f"{written['isa']}: share of the int8 peak ({written['statistic']} of all rounds)"
        line[1].set_title(title, fontsize="small")
    figure.savefig(path, dpi=120)


def _bars(axes: Any, results: list[dict[str, Any]], rate: str, limit: str, goal: float) -> None:
    """Grouped by tokens and shape, a bar for each bit width; the goal as a line."""
    places = list(dict.fromkeys((r["tokens"], f"{r['rows']}x{r['cols']}") for r in results))
    names = {(r["bits"], r["variant"]): None for r in results}
    width = 0.8 / max(1, len(names))
    for index, (bits, variant) in enumerate(names):
        chosen = [r for r in results if (r["bits"], r["variant"]) == (bits, variant)]
        at = [places.index((r["tokens"], f"{r['rows']}x{r['cols']}")) for r in chosen]
        label = f"{bits} bit" + (" 2:4" if variant == "2:4" else "")
        bars = axes.bar(
            [place + (index + 0.5) * width - 0.4 for place in at],
            [r[rate] / r[limit] for r in chosen],
            width,
            label=label,
        )
        axes.bar_label(bars, fmt=lambda share: f"{int(100 * share)}", fontsize=5)
    axes.axhline(goal, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(
        range(len(places)), [f"{tokens}\n{shape}" for tokens, shape in places], fontsize="x-small"
    )
    axes.set_xlabel("tokens, weights", fontsize="x-small")
    axes.set_ylim(0, 1.2 * max([1.0, *(r[rate] / r[limit] for r in results)]))  # room for the legend above
    axes.legend(fontsize="xx-small", ncols=3, loc="upper left")
    axes.grid(axis="y", alpha=0.3)
