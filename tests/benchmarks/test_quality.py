"""What the documents say of the quality grid is what its cells hold."""

import json
import re
from pathlib import Path
from statistics import mean

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
