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
ERROR = {"nll_increase": 0.0253, "windows": 8}
OPTIONS = {"bits": 3, "group_size": 64, "symmetric": True, "actorder": "gar", "budget_bits": None}
CALIBRATION = {"name": "c.txt", "sha256": "0" * 64, "sequences": 8, "tokens": 2468}
RUN = {"nybble": "0.1", "method": "gptq", "options": OPTIONS, "calibration": CALIBRATION}
RUN |= {"seconds": 5.42, "peak_rss_bytes": 408 << 20}
PREDICTION = {"computed": True, "tokens": 77, "intervals": 4, "predicted": -0.03, "measured": -0.0299}


def report(**fields: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "model": SIDE,
        "original": {**SIDE, "name": "o", "bytes": 16384, "nll": 1.9},
        "text": TEXT,
        "nll_increase": 0.1,
        "standard_error": ERROR,
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
        self.within: list[str] = []
        self.labels: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            assert self.within[-1:] == ["scroll"]
        self.within.append(dict(attrs).get("class") or "")
        if tag == "svg":
            assert dict(attrs)["role"] == "img"
            self.labels.append(dict(attrs)["aria-label"] or "")
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
    assert page(report()).count(">layer</text>") == 3
    assert [label.split()[0] for label in found.labels] == ["Error", "Error", "Predicted"]
    assert "standard error over 8 windows ± 0.0253" in found.shown
    assert "1e-0" not in found.shown
    assert " 0.01 " in found.shown
    assert "></text>" not in page(report())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "3 bits, groups of 64, symmetric, act-order gar"),
        ({"symmetric": False, "group_size": -1}, "3 bits, one group over each row, asymmetric, act-order"),
        ({"budget_bits": 3.5}, "within 3.5 bits per weight, bits and groups chosen by module, act-order"),
        ({"bits": 16}, "weights only pruned, act-order"),
    ],
)
def test_what_made_it(options: dict[str, Any], said: str) -> None:
    found = check(report(run=RUN | {"options": OPTIONS | options}))
    assert f"Nybble 0.1, gptq: {said}" in found.shown
    assert "calibrated on 8 sequences, 2468 tokens of c.txt" in found.shown
    assert "5.4 s to quantize, 408.00 MiB of memory at the peak" in found.shown
    assert "without calibration;" in check(report(run=RUN | {"calibration": None})).shown


@pytest.mark.parametrize(
    ("rise", "said"),
    [
        (0.5886, "Did not pass its gate: change in NLL +0.5886 > 0.05"),
        (0.05003, "Did not pass its gate: change in NLL +0.05003 > 0.05"),
        (0.01, "Passed its gate: change in NLL +0.0100 <= 0.05"),
    ],
)
def test_the_gate(rise: float, said: str) -> None:
    gate = {"nll_increase": rise, "max_nll_increase": 0.05, "passed": rise <= 0.05}
    assert said in check(report(gate=gate)).shown
    assert "gate" not in check(report()).shown


def test_lines_differ_in_more_than_colour() -> None:
    root = ElementTree.fromstring(chart({kind: [(0, 1.0), (1, 2.0)] for kind in "abcdefg"}))
    assert len({line.get("stroke-dasharray") for line in root.iter("polyline")}) == 7


def test_powers_of_ten_are_written_out_where_that_is_short() -> None:
    shown = chart({"": [(0, 1e-4), (1, 1e-2)]})
    assert all(f">{label}</text>" in shown for label in ("0.0001", "0.001", "0.01"))
    assert ">10⁻¹²</text>" in chart({"": [(0, 1e-12), (1, 1e12)]})


def test_a_report_of_less() -> None:
    side = {**SIDE, "perplexity": None}
    prediction = {"computed": False, "reason": "it is <large>"}
    found = check(
        report(
            layers=[],
            modules=[],
            model=side,
            original={**SIDE, "format": "none"},
            prediction=prediction,
            text={**TEXT, "whole": False},
            standard_error={"nll_increase": None, "windows": 1},
        )
    )
    assert " dense " in found.shown
    assert "one window of text: no standard error" in found.shown
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
