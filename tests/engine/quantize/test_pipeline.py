"""Passes over the blocks: resumed, repeated, in one go or linear by linear; and what stops one."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from nybble.engine.errors import ConfigError, LayerError
from nybble.engine.formats.registry import format_of, open_tensors
from nybble.engine.model_files import ModelFiles
from nybble.engine.quantize import activations
from nybble.engine.quantize.awq import AWQScaling
from nybble.engine.quantize.calibrate import Calibration
from nybble.engine.quantize.gptq import GPTQ, round_gptq
from nybble.engine.quantize.job import quantize
from nybble.engine.quantize.options import QuantizeOptions
from nybble.engine.quantize.pipeline import Recipe, Rerun
from nybble.engine.quantize.results import Stage
from nybble.engine.quantize.rtn import RTN
from nybble.engine.quantize.source import Block, Source
from nybble.engine.quantize.work import Work
from nybble.kernels.layout import PackedWeight, QuantSpec
from safetensors.torch import load_file, save_file
from torch import Tensor

TEXT = Calibration(tuple(tuple(range(3 + n, 40 + n)) for n in range(0, 60, 7)), "", "")
SPEC = QuantSpec(4, 32, True)


def work(source: Source, folder: Path, spec: QuantSpec = SPEC) -> Work:
    return Work.on(source, {part.name: spec for _, part in source.parts()}, TEXT, folder)


def weights(stage: Stage) -> dict[str, PackedWeight]:
    return {m.name: m.weight for block in stage for m in block.modules if m.weight is not None}


def run(folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    given = {"group_size": 32, "num_samples": 8, "seq_len": 32, "report": False, **options}
    return quantize(QuantizeOptions(str(folder), str(out), **given), lambda *_: None, lambda _: None)


RECIPES = [
    Recipe(RTN()),
    Recipe(GPTQ()),
    Recipe(GPTQ(), true_sequential=False),
    Recipe(GPTQ(order="gar"), AWQScaling(steps=4)),
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("finished", [0, 1, 2, 3])
def test_a_run_that_goes_on_ends_as_one_that_never_stopped(
    recipe: Recipe, finished: int, make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = make_model("qwen2")
    with Source(folder) as source:
        whole = weights(recipe.run(work(source, tmp_path / "whole")))
        save = Stage.save

        def stop(self: Stage, block: Any) -> None:
            if block.index == finished:
                raise KeyboardInterrupt
            save(self, block)

        monkeypatch.setattr(Stage, "save", stop)
        if finished < 3:
            with pytest.raises(KeyboardInterrupt):
                recipe.run(work(source, tmp_path / "halves"))
        else:
            recipe.run(work(source, tmp_path / "halves"))
        monkeypatch.setattr(Stage, "save", save)
        loaded: list[int] = []
        load = Source.block
        monkeypatch.setattr(
            Source, "block", lambda s, layer, ops: (loaded.append(layer), load(s, layer, ops))[1]
        )
        again = weights(recipe.run(work(source, tmp_path / "halves")))
    assert loaded == ([0, 1, 2] if finished < 3 else [])
    assert again.keys() == whole.keys()
    for name, weight in whole.items():
        assert torch.equal(weight.dequantize(), again[name].dequantize()), name


def test_in_one_pass_no_linear_sees_what_was_quantized_in_its_block(make_model: Any, tmp_path: Path) -> None:
    """The first block's inputs are the same either way: q, k, v agree, what comes after does not."""
    folder, _ = make_model("llama")
    with Source(folder) as source:
        sequential = weights(Recipe(GPTQ()).run(work(source, tmp_path / "a", QuantSpec(2, 32, True))))
        one_pass = weights(
            Recipe(GPTQ(), true_sequential=False).run(work(source, tmp_path / "b", QuantSpec(2, 32, True)))
        )
        block = source.block(0, work(source, tmp_path).ops)
        batches = activations.make_batches(source, TEXT, work(source, tmp_path).ops)
        stats = activations.gather_stats(block, batches)
    rounder, spec = GPTQ(), QuantSpec(2, 32, True)
    for name in ("self_attn.q_proj", "self_attn.v_proj"):
        name = f"model.layers.0.{name}"
        assert torch.equal(sequential[name].values, one_pass[name].values)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weight = block.linears[f"model.layers.0.{name}"].weight
        factor = rounder.prepare(stats[f"model.layers.0.{name}"].hessian, spec)
        expected = round_gptq(weight, factor, spec)
        assert torch.equal(one_pass[f"model.layers.0.{name}"].values, expected.values)
        assert not torch.equal(sequential[f"model.layers.0.{name}"].values, expected.values)


def test_held_activations_are_those_computed_again(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = make_model("qwen3")
    monkeypatch.setattr(activations, "BATCH_TOKENS", 100)
    with Source(folder) as source:
        held = weights(Recipe(GPTQ()).run(work(source, tmp_path / "held")))
        monkeypatch.setattr(activations, "HELD_BYTES", 0)
        passes = 0
        steps = Block.steps

        def counted(self: Block, *given: Any) -> Any:
            nonlocal passes
            passes += 1
            return steps(self, *given)

        monkeypatch.setattr(Block, "steps", counted)
        again = weights(Recipe(GPTQ()).run(work(source, tmp_path / "again")))
    assert passes == 3 * 4 * 5  # blocks, linears, batches
    for name, weight in held.items():
        assert torch.equal(weight.values, again[name].values), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_second_round_keeps_what_it_is_told_to(recipe: Recipe, make_model: Any, tmp_path: Path) -> None:
    """Excluded weights come back exactly, from the same edited weights as the first round's."""
    folder, _ = make_model("llama")
    with Source(folder) as source:
        given = work(source, tmp_path)
        first = recipe.run(given)
        chosen: dict[str, Tensor] = {}

        def exclude(name: str) -> Tensor | None:
            if "v_proj" in name:
                return None
            shape = next((p.out_features, p.in_features) for _, p in source.parts() if p.name == name)
            if "o_proj" in name or "k_proj" in name:  # alone in its slot, and beside one that has some
                return torch.zeros(shape, dtype=torch.bool)
            chosen[name] = torch.rand(shape, generator=torch.Generator().manual_seed(len(name))) < 0.02
            return chosen[name]

        second = recipe.run(given, Rerun("again", exclude, first))
        assert second.folder != first.folder
        assert len(second) == 3
        for index in range(3):
            edits = second.load(index).edits
            assert len(edits) == len(first.load(index).edits)
            block = source.block(index, given.ops)
            for edit in edits:
                block.rescale(edit)
            for module in second.load(index).modules:
                assert module.weight is not None
                if module.name not in chosen:
                    assert module.weight.outliers is None  # an empty overlay's row pointers would be stored
                    continue
                original, mask = block.weights()[module.name], chosen[module.name]
                exact = (module.weight.dequantize() - original)[mask]
                if isinstance(recipe.rounder, RTN):  # GPTQ's sweep moves them before it keeps them
                    torch.testing.assert_close(exact, torch.zeros_like(exact), rtol=0, atol=1e-3)
                assert 0 < len(module.weight.outliers.values) <= int(mask.sum())  # type: ignore[union-attr]
    assert set(second.residuals()) == set(chosen)


def test_modules_may_differ(make_model: Any, tmp_path: Path) -> None:
    """--dynamic: other bits and groups for some, none for others; the checkpoint says so and loads."""
    folder, _ = make_model("llama")
    dynamic = {
        r"-:model\.layers\.0\.mlp": {},
        r".*\.v_proj": {"bits": 8, "group_size": -1},
        r"model\.layers\.1": {"bits": 3},
    }
    for storage in ("gptq", "compressed-tensors"):
        if storage == "compressed-tensors":
            dynamic[r"model\.layers\.1"] = {"bits": 2}
        summary = run(folder, tmp_path / storage, dynamic=dynamic, checkpoint_format=storage)
        assert len(summary["dense"]) == 3
        files = ModelFiles(tmp_path / storage)
        stored = format_of(files)
        with open_tensors(files, stored) as tensors:
            for name, bits, size in (
                ("model.layers.0.self_attn.v_proj", 8, -1),
                ("model.layers.1.self_attn.v_proj", 8, -1),
                ("model.layers.1.mlp.down_proj", 3 if storage == "gptq" else 2, 32),
                ("model.layers.2.mlp.down_proj", 4, 32),
            ):
                weight = stored.read({n: tensors.get(n) for n in tensors if n.startswith(f"{name}.")}, name)
                assert weight.spec is not None
                assert (weight.spec.num_bits, weight.spec.group_size) == (bits, size), name
            assert "model.layers.0.mlp.up_proj.weight" in tensors
    wider = {r".*\.v_proj": {"group_size": -1}}
    with pytest.raises(ConfigError, match=r"--checkpoint-format awq: .* must be alike"):
        run(folder, tmp_path / "awq", dynamic=wider, checkpoint_format="awq", symmetric=False)
    run(folder, tmp_path / "head", dynamic={"-:lm_head": {}})  # as it is anyway
    for pattern in ("v_proj", "-:layers", "+:lm_head"):
        with pytest.raises(ConfigError, match=rf"--dynamic '{re.escape(pattern)}': matches no module"):
            run(folder, tmp_path / "none", dynamic={**wider, pattern: {}})


def test_what_a_format_cannot_hold_is_told_before_the_work(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama")
    told: list[Any] = []
    given: dict[str, Any] = {"dynamic": {r".*\.v_proj": {"group_size": -1}}, "checkpoint_format": "awq"}
    options = QuantizeOptions(str(folder), str(tmp_path / "out"), group_size=32, report=False, **given)
    with pytest.raises(ConfigError, match="must be alike"):
        quantize(options, lambda *event: told.append(event), lambda _: None)
    assert told == []


def break_weight(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{name}.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "sparse24"])
def test_a_nan_names_its_module(method: str, make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama")
    break_weight(folder, "model.layers.1.mlp.up_proj")
    with pytest.raises(LayerError, match=r"up_proj.weight holds NaN.*download") as caught:
        run(folder, tmp_path / "out", method=method)
    assert caught.value.layer == "model.layers.1.mlp.up_proj"
    assert [p.name for p in tmp_path.iterdir()] == ["original"]


def test_too_little_memory_names_the_block(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = make_model("llama")

    def greedy(self: GPTQ, *_: Any) -> PackedWeight:
        torch.empty(1 << 60)
        raise AssertionError

    monkeypatch.setattr(GPTQ, "round", greedy)
    with pytest.raises(LayerError, match=r"model.layers.0: out of memory; lower --num-samples") as caught:
        run(folder, tmp_path / "out")
    assert caught.value.layer == "model.layers.0"
    assert [p.name for p in tmp_path.iterdir()] == ["original"]


def test_progress_tells_block_and_loss(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama")
    told: list[tuple[Any, ...]] = []
    small = {"group_size": 32, "num_samples": 4, "seq_len": 32, "report": False}
    options = QuantizeOptions(str(folder), str(tmp_path / "out"), **small)  # type: ignore[arg-type]
    summary = quantize(options, lambda *given: told.append(given), lambda _: None)
    assert [given[1] for given in told] == list(range(22))
    assert {given[0] for given in told} == {"quantize"}
    assert [given[3] for given in told[1:]] == [n // 7 for n in range(21)]
    losses = [module["output_error"] for module in summary["modules"]]
    assert [given[4] for given in told[1:]] == losses
    json.dumps(summary)


def test_the_model_is_mapped_only_while_it_is_read(make_model: Any, tmp_path: Path) -> None:
    """Pages that were read count as the process's memory: a whole large model's would."""
    folder, _ = make_model("llama")
    mapped: list[bool] = []

    def progress(
        phase: str, done: int, total: int, layer: int | None = None, loss: float | None = None
    ) -> None:
        if loss is not None:
            mapped.append(str(folder / "model.safetensors") in Path("/proc/self/maps").read_text())

    given = QuantizeOptions(str(folder), str(tmp_path / "out"), group_size=32, report=False)
    quantize(given, progress, lambda _: None)
    assert mapped == [False] * 21
