"""The quality report as one HTML page: no script, no request, plots as inline SVG."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .model_files import compared

COLOURS = ("#0b6e4f", "#c1440e", "#2b4c7e", "#8a5a00", "#6b2d75", "#008b8b", "#a0153e")
DASHES = ("none", "7 3", "2 3", "10 3 2 3", "5 5", "12 4", "2 6")  # for who cannot tell the colours apart
_WIDTH, _HEIGHT, _LEFT, _TOP, _PLOT_W, _PLOT_H = 460, 250, 62, 14, 310, 190
_STYLE = """
:root{color-scheme:light dark;--ink:#1a1a1a;--soft:#666;--line:#ddd;--paper:#fff;--good:#0b6e4f;
--bad:#a0153e}
@media(prefers-color-scheme:dark){:root{--ink:#e8e8e8;--soft:#9a9a9a;--line:#3a3a3a;--paper:#161616;--good:#4fc79a;
--bad:#ff8aa0}
svg .mark{filter:brightness(1.7)}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:62rem;
margin:2rem auto;padding:0 1.2rem}
h1{font-size:1.35rem;margin:0}h2{font-size:1rem;margin:2rem 0 .4rem}p{color:var(--soft);margin:.2rem 0}
.figures{display:flex;flex-wrap:wrap;gap:.8rem 2.4rem;margin:1.4rem 0}
.figures div{min-width:8.5rem}.figures b{display:block;font-size:1.5rem;font-weight:600}
.figures span{color:var(--soft);font-size:.85rem}
.scroll{overflow-x:auto}p.passed{color:var(--good);font-weight:600}p.failed{color:var(--bad);font-weight:600}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.15rem 1.1rem .15rem 0;text-align:right;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:500}
.plots{display:flex;flex-wrap:wrap;gap:1.2rem}figure{margin:0}figcaption{color:var(--soft);font-size:.85rem}
svg{max-width:100%}svg text{fill:var(--soft);font:11px system-ui,sans-serif}svg .grid{stroke:var(--line)}
"""

Lines = Mapping[str, Sequence[tuple[int, float]]]


def page(report: Mapping[str, Any]) -> str:
    """See ``engine.quality`` for what a report holds."""
    model, original = report["model"], report["original"]
    title = f"{model['name']}: quality beside {original['name']}"
    parts = [
        f"<h1>{escape(str(title))}</h1>",
        _gate(report.get("gate")),
        *(f"<p>{escape(line)}</p>" for line in _about(report)),
        _figures(report),
        _sides(model, original),
        _plots(report),
        _modules(report["modules"]),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(str(title))}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _gate(gate: Mapping[str, Any] | None) -> str:
    if gate is None:
        return ""
    kind, said = ("passed", "Passed") if gate["passed"] else ("failed", "Did not pass")
    return f'<p class="{kind}">{said} its gate: change in NLL {escape(compared(gate))}</p>'


def _about(report: Mapping[str, Any]) -> list[str]:
    text = report["text"]
    extent = "all of it" if text["whole"] else "its beginning"
    lines = [f"Measured on {text['tokens']} tokens of {text['name']} ({extent}), context {text['context']}."]
    if run := report.get("run"):
        took = f"{run['seconds']:.1f} s to quantize, {size(run['peak_rss_bytes'])} of memory at the peak"
        lines = [f"{_made(run)}; {took}.", *lines]
    return lines


def _made(run: Mapping[str, Any]) -> str:
    """By what, and with which options."""
    options, calibration = run["options"], run["calibration"]
    group = options["group_size"]
    groups = "one group over each row" if group == -1 else f"groups of {group}"
    bits = f"{options['bits']} bits, {groups}, {'symmetric' if options['symmetric'] else 'asymmetric'}"
    if options["bits"] == 16:
        bits = "weights only pruned"
    elif options["budget_bits"] is not None:
        bits = f"within {options['budget_bits']:g} bits per weight, bits and groups chosen by module"
    text = "without calibration"
    if calibration is not None:
        text = f"calibrated on {calibration['sequences']} sequences, {calibration['tokens']} tokens of "
        text += str(calibration["name"])
    return f"Nybble {run['nybble']}, {run['method']}: {bits}, act-order {options['actorder']}, {text}"


def _error(report: Mapping[str, Any]) -> str:
    """The standard error of the change in NLL, where it is known."""
    error = report["standard_error"]
    if error["nll_increase"] is None:
        return "; one window of text: no standard error"
    return f"; standard error over {error['windows']} windows ± {error['nll_increase']:.4f}"


def _figures(report: Mapping[str, Any]) -> str:
    model, original = report["model"], report["original"]
    cards = [
        (f"{report['nll_increase']:+.4f}", f"change in NLL, nats per token{_error(report)}"),
        (f"{report['kl']:.5f}", "KL from the original, nats per token"),
        (f"{100 * report['top1_agreement']:.2f} %", "same most likely token"),
        (f"{model['bits_per_weight']:.2f}", "bits per weight, every byte counted"),
        (f"{original['bytes'] / model['bytes']:.2f} x", "smaller"),
    ]
    shown = "".join(f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in cards)
    return f'<div class="figures">{shown}</div>'


def _sides(model: Mapping[str, Any], original: Mapping[str, Any]) -> str:
    head = ("", "format", "NLL, nats per token", "perplexity", "size", "bits per weight")
    return _table(head, [_side(side) for side in (original, model)])


def _side(side: Mapping[str, Any]) -> tuple[str, ...]:
    perplexity = "∞" if side["perplexity"] is None else f"{side['perplexity']:.4f}"
    bits = f"{side['bits_per_weight']:.3f}"
    stored = "dense" if side["format"] == "none" else str(side["format"])
    return str(side["name"]), stored, f"{side['nll']:.4f}", perplexity, size(side["bytes"]), bits


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    shown = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    table = f"<table><thead><tr>{shown}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _plots(report: Mapping[str, Any]) -> str:
    figures = []
    layers = [(entry["layer"], entry["output_error"]) for entry in report["layers"]]
    if layers:
        caption = "Error of each block's output: |difference|² / |original|², mean over tokens"
        figures.append(_figure({"": layers}, caption))
    modules = report["modules"]
    key = "output_error" if any(m.get("output_error") is not None for m in modules) else "weight_error"
    lines = _by_kind(modules, key)
    if lines:
        of = "outputs on the calibration text" if key == "output_error" else "weights"
        figures.append(_figure(lines, f"Error of each module's {of}, relative and squared"))
    prediction = report.get("prediction")
    if prediction is not None:
        figures.append(_prediction(prediction, modules))
    return f'<h2>By layer</h2><div class="plots">{"".join(figures)}</div>' if figures else ""


def _prediction(prediction: Mapping[str, Any], modules: Sequence[Mapping[str, Any]]) -> str:
    if not prediction["computed"]:
        return f"<p>No predicted loss change: {escape(prediction['reason'])}.</p>"
    sums: dict[int, float] = {}
    for module in modules:
        if module.get("predicted") is not None:
            layer = _layer(module["name"])
            sums[layer] = sums.get(layer, 0.0) + module["predicted"]
    caption = (
        f"Predicted share of the loss change by layer, nats per token: {prediction['predicted']:+.4f} "
        f"in all, measured {prediction['measured']:+.4f} on the same {prediction['tokens']} tokens"
    )
    return _figure({"": sorted(sums.items())}, caption, logarithmic=False)


def _by_kind(modules: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[tuple[int, float]]]:
    lines: dict[str, list[tuple[int, float]]] = {}
    for module in modules:
        if module.get(key) is not None and ".layers." in module["name"]:
            kind = module["name"].rpartition(".")[2].removesuffix("_proj")
            lines.setdefault(kind, []).append((_layer(module["name"]), module[key]))
    return lines


def _layer(module: str) -> int:
    return int(module.split(".")[2]) if ".layers." in module else -1


def _figure(lines: Lines, caption: str, logarithmic: bool = True) -> str:
    svg = chart(lines, logarithmic, caption)
    if not svg:
        return f"<p>{escape(caption)}: none.</p>"
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def chart(lines: Lines, logarithmic: bool = True, label: str = "") -> str:
    """Lines over the layers. Values of 0 or less have no place on a logarithmic axis and are left out.

    label: what it shows, for who cannot see it.
    """
    shown = {
        name: [(x, math.log10(y) if logarithmic else y) for x, y in line if y > 0 or not logarithmic]
        for name, line in lines.items()
    }
    points = [point for line in shown.values() for point in line]
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    ticks = _decades(min(ys), max(ys)) if logarithmic else _ticks(min(*ys, 0.0), max(*ys, 0.0))
    low, high = ticks[0], ticks[-1]
    left, right = min(xs), max(xs)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left or 1)
        return _LEFT + _PLOT_W * across, _TOP + _PLOT_H * (1 - (y - low) / (high - low))

    parts = []
    for tick in ticks:
        _, y = place(left, tick)
        value = _power(tick) if logarithmic else f"{tick:.3g}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + _PLOT_W}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value}</text>')
    for x in range(left, right + 1, max(1, (right - left + 7) // 8)):
        middle, _ = place(x, low)
        parts.append(f'<text x="{middle:.1f}" y="{_TOP + _PLOT_H + 16}" text-anchor="middle">{x}</text>')
    middle = _LEFT + _PLOT_W / 2
    parts.append(f'<text x="{middle:.1f}" y="{_TOP + _PLOT_H + 34}" text-anchor="middle">layer</text>')
    for number, (name, line) in enumerate(shown.items()):
        parts.append(_line(name, [place(*point) for point in sorted(line)], number))
    frame = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" aria-label="{escape(label)}"'
    return f"<svg {frame}>{''.join(parts)}</svg>"


def _power(exponent: float) -> str:
    """10^exponent, for whole ones: written out where that is short."""
    if -5 < exponent < 6:
        return f"{10.0**exponent:.10g}"
    return "10" + f"{exponent:.0f}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _line(name: str, places: Sequence[tuple[float, float]], number: int) -> str:
    colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
    drawn = f'fill="none" stroke="{colour}" stroke-width="1.6" stroke-dasharray="{dash}"'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" fill="{colour}"/>' for x, y in places)
    row, beside = _TOP + 10 + 16 * number, _LEFT + _PLOT_W + 12
    label = ""
    if name:
        label = f'<line x1="{beside}" x2="{beside + 24}" y1="{row - 4}" y2="{row - 4}" {drawn}/>'
        label += f'<text x="{beside + 29}" y="{row}" style="fill:{colour}">{escape(name)}</text>'
    return f'<g class="mark"><polyline points="{path}" {drawn}/>{dots}{label}</g>'


def _decades(low: float, high: float) -> list[float]:
    """Whole powers of ten from at or below ``low`` to above ``high``, at most eight."""
    first = math.floor(low)
    span = math.floor(high) + 1 - first
    step = max(1, math.ceil(span / 7))
    return [float(first + step * k) for k in range(math.ceil(span / step) + 1)]


def _ticks(low: float, high: float) -> list[float]:
    """From at or below ``low`` to at or above ``high``; 1, 2 or 5 times a power of ten apart."""
    if high == low:
        low, high = low - 1, high + 1
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough)
    return [step * k for k in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _modules(modules: Sequence[Mapping[str, Any]]) -> str:
    if not modules:
        return ""
    keys = [
        k for k in ("output_error", "weight_error", "predicted", "damping") if any(k in m for m in modules)
    ]
    rows = [
        (str(m["name"]), *("-" if m.get(key) is None else f"{m[key]:.3g}" for key in keys)) for m in modules
    ]
    table = _table(("module", *(key.replace("_", " ") for key in keys)), rows)
    return f"<h2>By module</h2><details><summary>{len(rows)} modules</summary>{table}</details>"


def size(num_bytes: float) -> str:
    """As in: 3.10 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.2f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"
