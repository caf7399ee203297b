"""The page: whole, self-contained, what it shows is what the report says, whatever names say."""

import math
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
from nybble.engine.quality_page import chart, page, size

SIDE = {
    "name": "m",
    "format": "gptq",
    "bytes": 4096,
    "bits_per_weight": 4.125,
    "nll": 2.0,
    "perplexity": 7.389,
}
TEXT = {"name": "t.txt", "sha256": "0" * 64, "tokens": 1234, "bytes": 9, "context": 512, "whole": True}
MODULES = [
    {
        "name": f"model.layers.{layer}.mlp.{kind}_proj",
        "weight_error": 0.01 * (layer + 1),
        "output_error": None if kind == "up" else 0.002,
        "damping": None,
        "predicted": 0.01 - 0.015 * layer,
        "mass": 1.0,
    }
    for layer in range(3)
    for kind in ("up", "down")
]
PREDICTION = {"computed": True, "tokens": 77, "intervals": 4, "predicted": -0.03, "measured": -0.0299}


def report(**fields: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "model": SIDE,
        "original": {**SIDE, "name": "o", "bytes": 16384, "nll": 1.9},
        "text": TEXT,
        "nll_increase": 0.1,
        "kl": 0.0123456,
        "top1_agreement": 0.875,
        "layers": [{"layer": n, "output_error": 10.0**-n} for n in range(3)],
        "modules": MODULES,
        "prediction": PREDICTION,
        **fields,
    }


class Checker(HTMLParser):
    """Every tag closes in order; nothing is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.shown = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe", "a")
        assert not {name for name, _ in attrs} & {"src", "href", "onload"}
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.shown += data + " "


def check(given: dict[str, Any]) -> Checker:
    content = page(given)
    assert "http" not in content
    assert "url(" not in content
    checker = Checker()
    checker.feed(content)
    assert checker.open == []
    return checker


def test_figures_and_plots() -> None:
    found = check(report())
    for text in (
        "+0.1000",
        "0.01235",
        "87.50 %",
        "4.12",
        "4.00 x",
        "16.00 KiB",
        "1234 tokens of t.txt (all of it)",
    ):
        assert text in found.shown
    assert "-0.0300 in all, measured -0.0299 on the same 77 tokens" in found.shown
    assert found.seen.count("svg") == 3
    assert "6 modules" in found.shown


def test_a_report_of_less() -> None:
    side = {**SIDE, "perplexity": None}
    prediction = {"computed": False, "reason": "it is <large>"}
    found = check(
        report(layers=[], modules=[], model=side, prediction=prediction, text={**TEXT, "whole": False})
    )
    assert "No predicted loss change: it is <large>." in found.shown
    assert "its beginning" in found.shown
    assert "∞" in found.shown
    bare = report(layers=[], modules=[])
    del bare["prediction"]
    assert "svg" not in check(bare).seen


def test_names_are_only_text() -> None:
    side = {**SIDE, "name": "<script>alert(1)</script>"}
    found = check(report(model=side, text={**TEXT, "name": "<b>&amp;"}))
    assert "<script>alert(1)</script>" in found.shown
    assert "<b>&amp;" in found.shown


@pytest.mark.parametrize(
    ("values", "logarithmic"),
    [
        ([1e-3, 1.0, 20.0], True),
        ([5.0], True),
        ([1e-12, 1e12], True),
        ([0.0, 0.0], False),
        ([-3.0, 4e-3], False),
        ([1e-9], False),
    ],
)
def test_points_lie_where_their_values_say(values: list[float], logarithmic: bool) -> None:
    root = ElementTree.fromstring(chart({"a": list(enumerate(values))}, logarithmic))
    circles = [(float(c.get("cx") or 0), float(c.get("cy") or 0)) for c in root.iter("circle")]
    assert len(circles) == len(values)
    heights = [math.log10(v) if logarithmic else v for v in values]
    for x, y in circles:
        assert 62 <= x <= 372
        assert 14 <= y <= 204
    for (_, y), (_, z), a, b in zip(circles, circles[1:], heights, heights[1:], strict=False):
        assert (y - z) * (b - a) >= 0
        assert (y == z) == (a == b)


def test_a_logarithm_has_no_place_for_nothing() -> None:
    assert chart({"a": [(0, 0.0)]}) == ""
    assert chart({"a": [(0, 0.0), (1, 2.0)]}).count("<circle") == 1


def test_sizes() -> None:
    assert [size(n) for n in (3, 2048, 3 << 20, 5 << 30)] == ["3 B", "2.00 KiB", "3.00 MiB", "5.00 GiB"]
