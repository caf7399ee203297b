"""The check that runs on a GPU machine, rehearsed on this one, so that GPU minutes go to no typos."""

import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

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
    assert "6 of 6 tokens compared" in done.stdout
    assert "model: pass" in done.stdout
    assert "tests: pass" in done.stdout


@pytest.fixture
def gpu_check(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root / "scripts"))
    return import_module("gpu_check")


@pytest.mark.parametrize(
    ("tokens", "gap", "outcome"),
    [
        ([1, 2, 3, 4], 0.01, (True, 4)),
        ([1, 2, 9, 5], 0.01, (True, 2)),  # a near tie ends the comparison: what follows differs
        ([1, 2, 9, 4], 0.5, (False, 2)),
        ([1, 2, 8, 4], 0.01, (False, 2)),  # not the second best
        ([9, 2, 3, 4], 0.01, (True, 0)),  # right, and nothing compared: what LEAST is for
    ],
)
def test_tokens_are_compared_up_to_a_near_tie(
    gpu_check: ModuleType, tokens: list[int], gap: float, outcome: tuple[bool, int]
) -> None:
    logprobs = [SimpleNamespace(top_logprobs=(-1.0, -1.0 - gap), top_ids=(n, 9)) for n in (1, 2, 3, 4)]
    expected = SimpleNamespace(token_ids=[1, 2, 3, 4], logprobs=logprobs)
    assert gpu_check.same(expected, SimpleNamespace(token_ids=tokens)) == outcome


@pytest.mark.parametrize(("seconds", "passed"), [(0, True), (60, False)])
def test_tests_that_do_not_end_are_stopped(
    gpu_check: ModuleType,
    seconds: int,
    passed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "tests" / "kernels"
    folder.mkdir(parents=True)
    for name in ("test_triton_device.py", "test_triton_matrix.py"):
        text = f"import time\ndef test_as_emulated():\n    time.sleep({seconds})\n"
        (folder / name).write_text(text)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    started = time.monotonic()
    assert gpu_check.run_tests(True, 0, 50.0 if passed else 2.0) is passed
    assert time.monotonic() - started < 50
    assert ("did not end in the 2 s" in capfd.readouterr().out) is not passed


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
