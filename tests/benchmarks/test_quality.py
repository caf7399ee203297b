"""What the documents say of the quality grid is what its cells hold; what is restored is of today's."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from statistics import mean
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("document", "pattern", "base"),
    [
        ("README.md", r"module; ([\d.]+) times its base's CPU time \(YAQA, 3 bits, demo", "yaqa"),
        ("docs/quantizers.md", r"takes ([\d.]+) times its base's there over YAQA", "yaqa"),
    ],
)
def test_what_a_budget_costs(document: str, pattern: str, base: str) -> None:
    """CPU seconds of the demo model's cells at 3 bits, over the same seeds, each pair of one CPU."""
    cells = json.loads((ROOT / "benchmarks/results/quality.json").read_text())["cells"]
    seconds = {cell["cell"]: cell["cpu_seconds"] for cell in cells}
    cpus = {cell["cell"]: cell["environment"]["cpu"] for cell in cells}
    pairs = {seed: (f"demo/requant-{base}-budget/3/{seed}", f"demo/{base}/3/{seed}") for seed in range(3)}
    seeds = [seed for seed, (a, b) in pairs.items() if a in cpus and cpus[a] == cpus.get(b)]
    assert seeds
    budget = mean(seconds[f"demo/requant-{base}-budget/3/{seed}"] for seed in seeds)
    alone = mean(seconds[f"demo/{base}/3/{seed}"] for seed in seeds)
    said = re.search(pattern, (ROOT / document).read_text(encoding="utf-8"))
    assert said is not None
    assert float(said[1]) == pytest.approx(budget / alone, abs=0.1)


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """benchmarks/quality.py with its cells in a folder of the test's."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("benchmark_of_quality", ROOT / "benchmarks" / "quality.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look themselves up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CACHE", tmp_path)
    return module


def test_cells_made_otherwise_are_not_restored(
    quality: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else they would be taken for today's. They are named, and the others come."""
    names = [f"demo/{name}/0" for name in ("rtn/4", "rtn/3", "gptq/3", "yaqa/3")]
    names += [f"demo/requant-{base}-budget/3/0" for base in ("gptq", "yaqa")]
    cells = json.loads((ROOT / "benchmarks/results/quality.json").read_text())["cells"]
    by_name = {cell["cell"]: cell for cell in cells if cell["cell"] in names}
    assert set(by_name) == set(names)
    by_name["demo/rtn/3/0"]["options"]["num_samples"] = 128
    del by_name["demo/gptq/3/0"]["options"]["mse"]
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"cells": list(by_name.values())}))
    quality.restore(results)
    there = [name for name in names if (tmp_path / "cells" / f"{name.replace('/', '_')}.json").exists()]
    assert there == ["demo/rtn/4/0", "demo/yaqa/3/0", "demo/requant-yaqa-budget/3/0"]
    assert capsys.readouterr().out.splitlines() == [
        "demo/rtn/3/0 is not restored: num_samples is 128 there and 64 here",
        "demo/gptq/3/0 is not restored: mse is None there and 2.4 here",
        "demo/requant-gptq-budget/3/0 is not restored: demo/gptq/3/0 is missing, whose bytes it takes",
        "3 of 6 cells restored from results.json",
    ]
