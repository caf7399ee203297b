"""A line chart as SVG, with nothing but the standard library: for machines where nothing can be installed."""

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

COLOURS = ("#0b6e4f", "#c1440e", "#2b4c7e", "#8a5a00", "#6b2d75", "#444444", "#008b8b", "#a0153e")
_WIDTH, _HEIGHT, _LEFT, _TOP, _PLOT_W, _PLOT_H = 420, 300, 46, 28, 250, 220

Lines = Mapping[str, Sequence[tuple[float, float]]]


def chart(title: str, lines: Lines, y_label: str) -> str:
    """One panel: x is logarithmic (base 2), y starts at 0. An SVG group of 420 x 300."""
    points = [p for line in lines.values() for p in line]
    xs = sorted({x for x, _ in points})
    top = max((y for _, y in points), default=1.0) * 1.08 or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        span = math.log2(xs[-1] / xs[0]) or 1.0
        return _LEFT + _PLOT_W * math.log2(x / xs[0]) / span, _TOP + _PLOT_H * (1 - y / top)

    parts = [f'<text x="{_LEFT}" y="16" font-weight="bold">{escape(title)}</text>']
    for tick in range(5):
        y = top * tick / 4
        _, height = place(xs[0], y) if xs else (0.0, 0.0)
        across = f'x1="{_LEFT}" x2="{_LEFT + _PLOT_W}"'
        parts.append(f'<line {across} y1="{height:.1f}" y2="{height:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 4}" y="{height + 4:.1f}" text-anchor="end">{y:.2g}</text>')
    for x in xs:
        middle, _ = place(x, 0)
        parts.append(f'<text x="{middle:.1f}" y="{_TOP + _PLOT_H + 14}" text-anchor="middle">{x:g}</text>')
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in sorted(line)))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        row = _TOP + 12 + 15 * number
        parts.append(f'<text x="{_LEFT + _PLOT_W + 8}" y="{row}" fill="{colour}">{escape(name)}</text>')
    parts.append(f'<text x="{_LEFT}" y="{_TOP + _PLOT_H + 30}">{escape(y_label)}</text>')
    return "\n".join(parts)


def page(panels: Sequence[str], columns: int = 3) -> str:
    """Panels in a grid; a whole SVG."""
    rows = -(-len(panels) // columns)
    groups = [
        f'<g transform="translate({_WIDTH * (n % columns)},{_HEIGHT * (n // columns)})">{panel}</g>'
        for n, panel in enumerate(panels)
    ]
    size = f'width="{_WIDTH * columns}" height="{_HEIGHT * rows}"'
    style = 'font-family="sans-serif" font-size="11"'
    body = "\n".join(groups)
    start = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>'
    return f'{start}<rect {size} fill="white"/>\n{body}\n</svg>\n'
