"""Tables and the plot of benchmarks/cpu.py."""

import importlib.util
import math
import statistics
from pathlib import Path
from typing import Any

from common import show

METRICS = {"decode1": "decode 1", "decode8": "decode 8", "prefill": "prefill", "first": "first token"}
DISTURBED = 0.1  # CPUs: above it the machine was not ours alone


def medians(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of every engine and metric; memory in bytes beside them."""
    return {
        label: {m: statistics.median(s["value"] for s in samples) for m, samples in e["samples"].items()}
        | e["memory"]
        for label, e in results["engines"].items()
    }  # fmt: skip


def ratios(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Ours to each other engine, "ours / other": how many times as fast; of memory, how much of it.

    Of speeds the median over the turns, in each of which both ran within seconds: the machine's memory, which
    other machines share, drifts by a third over minutes.
    """
    engines, found = results["engines"], {}
    for ours in (label for label in engines if label.startswith("nybble")):
        for other in (label for label in engines if not label.startswith("nybble")):
            a, b = engines[ours], engines[other]
            ratio = {name: a["memory"][name] / b["memory"][name] for name in a["memory"]}
            for metric in METRICS:
                pairs = zip(a["samples"][metric], b["samples"][metric], strict=True)
                turns = [x["value"] / y["value"] for x, y in pairs]
                ratio[metric] = statistics.median(1 / t if metric == "first" else t for t in turns)
            found[f"{ours} / {other}"] = ratio
    return found


def read_rate(results: dict[str, Any]) -> float:
    """Median bytes per second that the machine's threads read."""
    return statistics.median(
        sample["read"] for engine in results["engines"].values() for sample in engine["samples"]["decode1"]
    )


def report(results: dict[str, Any]) -> None:
    """Print everything; adds medians and ratios to ``results``."""
    results["medians"], results["ratios"] = medians(results), ratios(results)
    results["read_bytes_per_second"] = read_rate(results)
    _speeds(results)
    _engines(results)
    if results["ratios"]:
        header = ("ours / other", *METRICS.values(), "memory", "KV full")
        rows = []
        for label, ratio in results["ratios"].items():
            speeds = [_times(ratio[metric]) for metric in METRICS]
            rows.append([label, *speeds, *(_times(ratio.get(key)) for key in ("after_decode8", "kv_full"))])
        show("medians of ratios: speed (above 1: ours faster), memory (below 1: ours smaller)", header, rows)
    _notes(results)


def _speeds(results: dict[str, Any]) -> None:
    rows = []
    for label, engine in results["engines"].items():
        cells = []
        for metric in METRICS:
            values = [s["value"] for s in engine["samples"][metric]]
            cells.append(f"{_short(statistics.median(values))} ({_short(min(values))}-{_short(max(values))})")
        memory = [_mb(engine["memory"].get(key)) for key in ("after_decode8", "kv_full")]
        rows.append([label, *cells, *memory])
    prefill = f"prefill {results['prefill_tokens']}"
    header = ("", "decode 1", "decode 8", prefill, "first token, ms", "memory, MB", "KV full")
    streams, context = results["kv_tokens"]
    show(
        f"{results['title']}: tokens/s, {results['threads']} threads, {len(results['rounds'])} rounds, "
        f"KV {streams} x {context}: median (least-most)",
        header,
        rows,
    )


def _engines(results: dict[str, Any]) -> None:
    rows = []
    for label, engine in results["engines"].items():
        facts = engine["facts"]
        share = _share_of_bandwidth(engine)
        size = f"{facts['bytes_per_token'] / 1e6:.0f} MB"
        engine["share_of_bandwidth"] = share
        rows.append([label, facts["weights"], facts["head"], size, f"{100 * share:.0f} %"])
    header = ("", "weights", "output head", "read per token", "decode 1 of bandwidth")
    show(f"engines; the machine reads {results['read_bytes_per_second'] / 1e9:.1f} GB/s", header, rows)


def _share_of_bandwidth(engine: dict[str, Any]) -> float:
    """Bytes read by decode 1 over what the threads read just before and after: median of all turns."""
    size = engine["facts"]["bytes_per_token"]
    return statistics.median(
        size * sample["value"] / sample["read"] for sample in engine["samples"]["decode1"]
    )


def _notes(results: dict[str, Any]) -> None:
    for label, engine in results["engines"].items():
        facts = engine["facts"]
        version = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        print(f"{label}: {version}; {facts['features']}")
    for name in results["missing"]:
        print(f"not measured: {name} (no interpreter was named)")
    if results["served_bytes"] is not None:
        print(f"nybble serve, gateway and engine together: {_mb(results['served_bytes'])} MB after 8 streams")
    samples = [s for e in results["engines"].values() for values in e["samples"].values() for s in values]
    foreign, idle = _median(samples, "foreign"), _median(samples, "idle_workers")
    loads = [entry[key][0] for entry in results["rounds"] for key in ("load_before", "load_after")]
    print(
        f"foreign work: {foreign:.2f} CPUs (median), {max(s['foreign'] for s in samples):.2f} at most; "
        f"workers that idled: {idle:.3f} CPUs; load average {min(loads):.1f} to {max(loads):.1f}"
    )
    results["quiet"] = foreign < DISTURBED and idle < DISTURBED
    if not results["quiet"]:
        print("THE MACHINE WAS BUSY: these figures compare nothing")


def plot(results: dict[str, Any], path: Path) -> None:
    """The ratios as bars, if matplotlib is there and another engine was measured."""
    if not results["ratios"] or importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(results["ratios"])
    for index, (label, ratio) in enumerate(results["ratios"].items()):
        places = [place + (index + 0.5) * width - 0.4 for place in range(len(METRICS))]
        bars = axes.bar(places, [ratio[metric] for metric in METRICS], width, label=label)
        axes.bar_label(bars, [_times(ratio[metric]) for metric in METRICS], fontsize="x-small")
    axes.axhline(1, color="black", linewidth=0.8)
    names = list((METRICS | {"prefill": f"prefill {results['prefill_tokens']}"}).values())
    axes.set_xticks(range(len(METRICS)), names)
    axes.set(ylabel="times as fast", title=f"{results['title']}, {results['threads']} threads")
    axes.legend(fontsize="x-small")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)


def _median(samples: list[dict[str, float]], key: str) -> float:
    return statistics.median(sample[key] for sample in samples)


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}"


def _mb(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 1e6:.0f}"


def _times(ratio: float | None) -> str:
    """Never rounded up."""
    return "-" if ratio is None else f"{math.floor(100 * ratio) / 100:.2f}x"
