"""ReQuant: which weights stay exact, and that they do, through a written checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nybble.engine.errors import ConfigError
from nybble.engine.formats.registry import get_format
from nybble.engine.model_files import ModelFiles
from nybble.engine.quantize.allocate import stored_bits
from nybble.engine.quantize.calibrate import Calibration
from nybble.engine.quantize.gptq import GPTQ
from nybble.engine.quantize.job import quantize
from nybble.engine.quantize.options import QuantizeOptions
from nybble.engine.quantize.outliers import kept
from nybble.engine.quantize.pipeline import Recipe
from nybble.engine.quantize.requant import ReQuant
from nybble.engine.quantize.results import Stage
from nybble.engine.quantize.rtn import RTN
from nybble.engine.quantize.source import Source
from nybble.engine.quantize.work import Work
from nybble.kernels.layout import QuantSpec
from tiny_models import load_decoder, our_logits
from tiny_sequences import SEQUENCES

SMALL = {"num_samples": 8, "seq_len": 32, "group_size": 32, "bits": 3}
BRIEF = {"pqi_intervals": 2, "gradient_samples": 4}


def work_on(source: Source, folder: Path, bits: int = 2) -> Work:
    specs = {part.name: QuantSpec(bits, 32, False) for _, part in source.parts()}
    return Work.on(source, specs, Calibration(SEQUENCES, "random", ""), folder / "work")


def residuals(stage: Stage) -> dict[str, int]:
    return {m.name: int(kept(m.weight).sum()) for b in stage for m in b.modules if m.weight is not None}


@pytest.mark.parametrize("base", ["rtn", "gptq", "awq", "yaqa"])
def test_over_any_base(base: str, make_model: Any, tmp_path: Path) -> None:
    """The checkpoint serves what the quantizer meant, and its overlay holds what was asked for."""
    folder, model = make_model("llama", num_hidden_layers=2)
    out = tmp_path / "out"
    options = QuantizeOptions(str(folder), str(out), "requant", base, **SMALL, **BRIEF)  # type: ignore[arg-type]
    summary = quantize(options, lambda *_: None, lambda _: None)
    block = json.loads((out / "config.json").read_text())["requant"]
    weights = sum(m.weight.numel() for n, m in model.named_modules() if n.endswith("_proj"))
    assert sum(block["modules"].values()) == pytest.approx(0.005 * weights, rel=0.02)
    assert (out / "requant.safetensors").exists()
    assert summary["meta"]["r_o"] == summary["meta"]["r_s"] == 0.25
    stored = get_format(ModelFiles(out).quantize_config)
    assert stored.default_spec == QuantSpec(3, 32, True)
    logits = our_logits(load_decoder(out), torch.arange(5, 40))
    assert bool(torch.isfinite(logits).all())


def test_significant_weights_come_back_whole(make_model: Any, tmp_path: Path) -> None:
    folder, model = make_model("qwen2", num_hidden_layers=2)
    method = ReQuant(Recipe(GPTQ()), 0.0, 0.01, 2, 4, 5)
    with Source(folder) as source:
        work = work_on(source, tmp_path)
        stage = method.run(work)
        first = work.stage("quantize")
        count = 0
        for before, after in zip(first, stage, strict=True):
            for was, is_ in zip(before.modules, after.modules, strict=True):
                assert was.weight is not None
                assert is_.weight is not None
                mask, original = kept(is_.weight), model.get_submodule(is_.name).weight.detach()
                values = is_.weight.dequantize()
                torch.testing.assert_close(values[mask], original[mask], rtol=2e-3, atol=5e-4)  # fp16
                assert torch.equal(values[~mask], was.weight.dequantize()[~mask])
                count += int(mask.sum())
        assert count == pytest.approx(0.01 * work.num_weights, rel=0.02)


def test_goes_on_where_it_was_killed(make_model: Any, tmp_path: Path) -> None:
    """Stages are found again, block by block; what was half done is the same as without the interruption."""
    folder, _ = make_model("llama", num_hidden_layers=2)
    method = ReQuant(Recipe(GPTQ()), 0.005, 0.005, 2, 2, 3)

    class KilledError(Exception):
        pass

    def run(scratch: Path, after: int) -> Stage:
        calls = 0

        def progress(*_: object) -> None:
            nonlocal calls
            calls += 1
            if calls > after:
                raise KilledError

        with Source(folder) as source:
            base = work_on(source, scratch)
            work = Work(source, base.specs, base.calibration, base.folder, progress, base.log, base.ops)
            return method.run(work)

    whole = residuals(run(tmp_path / "whole", 10**9))
    after, found = 5, None
    while found is None:
        try:
            found = residuals(run(tmp_path / "killed", after))
        except KilledError:
            after += 7
    assert after > 20
    assert found == whole


def test_a_budget_is_spent_and_kept_to(make_model: Any, tmp_path: Path) -> None:
    """Bits of everything in the checkpoint's tensors; specs differ from module to module."""
    folder, _ = make_model("llama", num_hidden_layers=2)
    method = ReQuant(Recipe(GPTQ()), 0.0, 0.0, 2, 2, 3, budget=4.5)
    with Source(folder) as source:
        work = work_on(source, tmp_path, bits=3)
        stage = method.run(work)
        total, specs = 0.0, set()
        for block in stage:
            for module in block.modules:
                packed = module.weight
                assert packed is not None
                assert packed.spec is not None
                specs.add(packed.spec)
                share = float(kept(packed).float().mean())
                total += stored_bits(packed.out_features, packed.in_features, packed.spec, share)
        assert 4.2 * work.num_weights < total <= 4.501 * work.num_weights
        assert len(specs) > 1


def test_a_budget_too_small_is_refused(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama", num_hidden_layers=1)
    with Source(folder) as source, pytest.raises(ConfigError, match=r"--budget-bits 2\.0: the least is"):
        ReQuant(Recipe(RTN(0.0)), budget=2.0, num_intervals=1, num_sequences=1).run(work_on(source, tmp_path))


@pytest.mark.parametrize("significant", [0.0, 0.25, 2.0])
def test_a_budget_holds_in_the_written_checkpoint(
    significant: float, make_model: Any, tmp_path: Path
) -> None:
    """Also with weights that are put back later: each takes its column, and every row where it begins."""
    folder, _ = make_model("llama", num_hidden_layers=2)
    out = tmp_path / "out"
    given = {**SMALL, **BRIEF, "symmetric": False, "budget_bits": 5, "significant_percent": significant}
    options = QuantizeOptions(str(folder), str(out), "requant", "rtn", **given)  # type: ignore[arg-type]
    summary = quantize(options, lambda *_: None, lambda _: None)
    assert 4.6 < summary["bits_per_quantized_weight"] <= 5
    stored = get_format(ModelFiles(out).quantize_config)
    specs = {stored.spec(module["name"]) for module in summary["modules"]}
    assert len(specs) > 1
    assert bool(torch.isfinite(our_logits(load_decoder(out), torch.arange(5, 40))).all())
