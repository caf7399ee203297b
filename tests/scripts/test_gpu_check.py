"""The check that runs on a GPU machine, rehearsed on this one, so that GPU minutes go to no typos."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
# What is installed for the server, the CPU's kernels or development, and is not on a GPU machine.
ABSENT = (
    "fastapi", "pydantic", "pydantic_settings", "msgspec", "typer", "rich", "uvicorn", "numba", "llvmlite",
    "httpx", "prometheus_client", "pytest_asyncio", "hypothesis", "matplotlib",
)  # fmt: skip
BLOCKER = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in {ABSENT!r} else self.finder.find_spec(name, *rest)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python that has only torch, triton, transformers and their like."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH", "TRITON_INTERPRET")}
    return kept | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}


def run(root: Path, environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True, check=False
    )


def test_a_rehearsal_with_nothing_installed(root: Path, bare: dict[str, str]) -> None:
    done = run(root, bare, "scripts/gpu_check.py", "--rehearse", "--no-bench")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "linears by" in done.stdout
    assert "triton-low-bit" in done.stdout
    assert "model: pass" in done.stdout
    assert "tests: pass" in done.stdout


def test_without_a_gpu_nothing_is_claimed(root: Path, bare: dict[str, str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    done = run(root, bare, "scripts/gpu_check.py")
    assert done.returncode == 2
    assert "nothing was checked" in done.stderr


def test_the_benchmark_is_rehearsed(root: Path, bare: dict[str, str]) -> None:
    arguments = ("--shapes", "odd", "--tokens", "1", "9", "--ops", "cublas", "w4", "w3", "tinygemm")
    done = run(root, bare | {"REHEARSE": "1"}, "benchmarks/kernels.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((root / ".cache" / "rehearsal" / "kernels-rehearsal.json").read_text())
    rows = {(row["op"], row.get("tokens")): row for row in written["results"]}
    for op in ("w4", "w3"):
        assert rows[op, 9]["kernel"] == "triton-low-bit"
        assert 0 < rows[op, 9]["error"] < 1e-2
        assert rows[op, 9]["speedup"]["cublas"] > 0
    assert "not whole tiles" in rows["tinygemm", None]["unavailable"]
    plot = (root / ".cache" / "rehearsal" / "kernels-rehearsal.svg").read_text()
    assert plot.startswith("<svg") and "w4" in plot
