"""What was finished is on disk, whole, and comes back as it was."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from nybble.engine.errors import ConfigError
from nybble.engine.quantize import results
from nybble.engine.quantize.grid import round_nearest
from nybble.engine.quantize.results import QuantizedBlock, QuantizedModule, Rescale, Stage
from nybble.kernels.layout import PackedWeight, QuantSpec

SPEC = QuantSpec(4, 32, False)


def block(index: int) -> QuantizedBlock:
    generator = torch.Generator().manual_seed(index)
    weight = torch.randn(16, 64, generator=generator)
    exclude = torch.rand(16, 64, generator=generator) < 0.05
    modules = (
        QuantizedModule("a.q", round_nearest(weight, SPEC), 0.25, 0.5, 0.01, "a warning"),
        QuantizedModule("a.k", round_nearest(weight, QuantSpec(3, -1, True), exclude=exclude)),
        QuantizedModule("a.v", None, warning="stays dense: so it is"),
        QuantizedModule("a.o", PackedWeight(weight), 0.1),
    )
    edits = (Rescale("a.norm", 0, torch.rand(64), "a.qkv", torch.rand(64)),)
    return QuantizedBlock(index, modules, edits, {"a.norm.weight": torch.rand(64)})


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    return bool(a == b)


def test_a_block_comes_back_as_it_was(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "stage")
    assert len(stage) == 0
    written = block(0)
    stage.save(written)
    assert len(stage) == 1
    (found,) = stage
    for ours, theirs in zip(found.modules, written.modules, strict=True):
        for name in ("name", "weight_error", "output_error", "damping", "warning"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert (ours.weight is None) == (theirs.weight is None)
        if ours.weight is None or theirs.weight is None:
            continue
        for name in ("values", "spec", "scales", "zeros", "g_idx", "bias"):
            assert same(getattr(ours.weight, name), getattr(theirs.weight, name)), name
        assert torch.equal(ours.weight.dequantize(), theirs.weight.dequantize())
    (edit,), (expected,) = found.edits, written.edits
    assert (edit.producer, edit.first_row, edit.consumer) == ("a.norm", 0, "a.qkv")
    assert torch.equal(edit.factors, expected.factors)
    assert torch.equal(edit.divisors, expected.divisors)
    assert torch.equal(found.dense["a.norm.weight"], written.dense["a.norm.weight"])
    assert stage.specs() == {"a.q": SPEC, "a.k": QuantSpec(3, -1, True), "a.v": None, "a.o": None}
    outliers = written.modules[1].weight.outliers  # type: ignore[union-attr]
    assert stage.residuals() == {"a.k": len(outliers.values)}  # type: ignore[union-attr]


def test_only_whole_blocks_from_the_first_on_count(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    for index in (0, 1, 3):
        stage.save(block(index))
    (tmp_path / "block-00002.partial").write_bytes(b"half")
    assert len(stage) == 2
    assert [b.index for b in stage] == [0, 1]


def test_a_full_disk_is_an_error_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(results, "save_file", full)
    stage = Stage(tmp_path)
    with pytest.raises(ConfigError, match=r"No space left on device.*; free some space"):
        stage.save(block(0))
    assert len(stage) == 0
