"""What the benchmark of GPU linears does with wrong results and with ops that fail."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from nybble.kernels.dispatch import Target


@pytest.fixture
def kernels(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/kernels.py, with paths and environment put back afterwards."""
    monkeypatch.setenv("REHEARSE", "1")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("benchmark_of_kernels", root / "benchmarks" / "kernels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_a_result_that_is_no_number_is_wrong(kernels: ModuleType) -> None:
    errors = [{"error": 1e-3}, {"error": 2e-2}, {"error": float("nan")}, {"error": float("inf")}, {}]
    assert kernels.wrong_rows(errors) == errors[1:4]
    single = [{"error": 1e-3, "worst": worst} for worst in (9e-3, 2e-2, float("nan"))]
    assert kernels.wrong_rows(single) == single[1:]


def test_one_wrong_result_is_seen_where_a_norm_sees_none(kernels: ModuleType) -> None:
    rng = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 512, generator=rng, dtype=torch.float64) for n in (64, 3000))
    exact = x @ weight.T
    out = (x @ weight.bfloat16().double().T).bfloat16()
    assert kernels.worst_element(x, weight, out, exact) < kernels.TOLERANCE
    out[5, -3] = 0.5 * exact[5, -3]  # among the outputs that are always looked at
    assert float((out.double() - exact).norm() / exact.norm()) < kernels.TOLERANCE
    assert kernels.worst_element(x, weight, out, exact) > kernels.TOLERANCE


@pytest.mark.parametrize("lost", [False, True])
def test_rows_outlive_a_peers_cuda_error(
    kernels: ModuleType, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that fails at its second number of tokens; ``lost``: and every CUDA call from then on."""
    target = Target("cpu", torch.float32)

    def clock(calls: Any) -> float:
        for call in calls:
            call()
        return 2.0

    machine = kernels.Machine("none", target, clock, lambda size: 2, 1.0, 1.0)

    def working(shape: Any) -> Any:
        return kernels.Linear("k", [lambda x: torch.ones(1)], 8, None)

    def failing(shape: Any) -> Any:
        def call(x: torch.Tensor) -> torch.Tensor:
            if len(x) == 9:
                raise torch.AcceleratorError("CUDA error: an illegal instruction")
            return torch.ones(1)

        return kernels.Linear("k", [call], 8, None)

    def synchronize() -> None:
        if lost:
            raise torch.AcceleratorError("CUDA error: an illegal instruction")

    monkeypatch.setattr(kernels, "OPS", {"cublas": working, "tinygemm": failing, "w4": working})
    monkeypatch.setattr(kernels, "REHEARSAL", False)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    rows: list[dict[str, Any]] = [{"of": "an earlier shape"}]
    arguments = (machine, "s", (4, 8), (1, 9), ["cublas", "tinygemm", "w4"], rows)
    if lost:
        with pytest.raises(torch.AcceleratorError, match="illegal instruction"):
            kernels.measure(*arguments)
    else:
        kernels.measure(*arguments)
    kept = [("cublas", 1), ("cublas", 9), ("tinygemm", 1), ("tinygemm", None), ("w4", 1), ("w4", 9)]
    assert [(row["op"], row.get("tokens")) for row in rows[1:]] == (kept[:4] if lost else kept)
    assert "illegal instruction" in rows[4]["unavailable"]
    assert rows[3]["speedup"] == {"cublas": 1.0, "tinygemm": 1.0}
