"""Whole runs: what is written is what was rounded, by the right inputs, and errors leave nothing behind."""

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nybble.engine.check import check_model
from nybble.engine.documents import Encoder, read_documents
from nybble.engine.errors import ConfigError, LayerError
from nybble.engine.formats.registry import get_format
from nybble.engine.formats.safetensors_files import SafetensorsFiles
from nybble.engine.model_files import ModelFiles
from nybble.engine.quantize import hessian, source
from nybble.engine.quantize.calibrate import Calibration, load_calibration
from nybble.engine.quantize.gptq import GPTQ, round_gptq
from nybble.engine.quantize.job import quantize
from nybble.engine.quantize.methods import get_method
from nybble.engine.quantize.options import QuantizeOptions
from nybble.engine.quantize.prediction import peak_bytes as prediction_bytes
from nybble.engine.quantize.report import peak_bytes, read_held_out
from nybble.engine.tokenizer import Tokenizer
from nybble.kernels.layout import PackedWeight, QuantSpec
from safetensors.torch import load_file, save_file
from tiny_models import load_decoder, our_logits, transformers_logits

SMALL = {"num_samples": 12, "seq_len": 32, "report": False}


def run(folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    given = {"model": str(folder), "out": str(out), "group_size": 32, **SMALL, **options}
    return quantize(QuantizeOptions(**given), lambda *_: None, lambda _: None)


def read_module(folder: Path, name: str) -> PackedWeight:
    """One quantized module of a written checkpoint."""
    stored = get_format(ModelFiles(folder).quantize_config)
    with SafetensorsFiles(folder) as files:
        tensors = {n: files.get(n) for n in files if n.startswith(f"{name}.")}
        return stored.read(tensors, name)


def calibration(folder: Path, text: Path | None = None) -> Calibration:
    encoder = Encoder(folder, Tokenizer.from_folder(folder))
    return load_calibration(text, encoder, SMALL["num_samples"], SMALL["seq_len"], 0)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"method": "rtn"}),
        ("llama", {"bits": 3, "symmetric": False, "actorder": "group"}),
        ("qwen2", {"bits": 8, "group_size": -1}),
        ("qwen3", {"bits": 2, "group_size": 128, "symmetric": False, "mse": 2.4}),
    ],
)
def test_the_written_checkpoint_computes_what_its_codes_say(
    model_type: str, options: dict[str, Any], make_model: Any, tmp_path: Path
) -> None:
    """Our loader on the result against transformers with the dequantized weights put in."""
    folder, model = make_model(model_type, tie_word_embeddings=model_type == "llama")
    summary = run(folder, tmp_path / "out", **options)
    assert len(summary["modules"]) == 3 * 7
    assert not summary["dense"]
    for module in summary["modules"]:
        weight = model.get_submodule(module["name"]).weight
        dequantized = read_module(tmp_path / "out", module["name"]).dequantize()
        assert not torch.equal(weight, dequantized)
        error = (weight - dequantized).square().sum() / weight.square().sum()
        assert float(error) == pytest.approx(module["weight_error"], rel=1e-4)
        weight.data.copy_(dequantized)
    ids = torch.arange(5, 60)
    ours = our_logits(load_decoder(tmp_path / "out"), ids)
    torch.testing.assert_close(ours, transformers_logits(model, ids), rtol=1e-3, atol=2e-3)


def test_calibration_is_true_sequential(make_model: Any, tmp_path: Path) -> None:
    """Against a plain reimplementation on transformers: hooks, whole passes, one sequence at a time."""
    folder, model = make_model("qwen2", num_hidden_layers=2)
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join("the dog sang in the rain " * n for n in (1, 9, 2, 3, 2)))
    run(folder, tmp_path / "out", calibration=str(text))
    stages = (["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"])
    spec = QuantSpec(4, 32, True)
    sequences = calibration(folder, text).sequences
    assert len({len(sequence) for sequence in sequences}) > 1
    for layer in model.model.layers:
        modules = {name.split(".")[-1]: module for name, module in layer.named_modules()}
        for stage in stages:
            inputs: list[np.ndarray] = []
            handle = modules[stage[0]].register_forward_pre_hook(
                lambda _, args, inputs=inputs: inputs.append(args[0][0].double().numpy())
            )
            with torch.no_grad():
                for sequence in sequences:
                    model(torch.tensor([sequence]))
            handle.remove()
            rows = np.concatenate(inputs)
            second_moment = torch.from_numpy(2 * rows.T @ rows / len(rows)).float()
            factor = hessian.factorize(second_moment, spec, 0.01)
            for name in stage:
                expected = round_gptq(modules[name].weight.detach(), factor, spec)
                path = next(n for n, m in model.named_modules() if m is modules[name])
                found = read_module(tmp_path / "out", path)
                assert (found.values != expected.values).float().mean() < 0.01  # rounding ties
                modules[name].weight.data.copy_(found.dequantize())


def test_output_error_is_of_the_calibration_inputs(make_model: Any, tmp_path: Path) -> None:
    folder, model = make_model("llama", num_hidden_layers=1)
    summary = run(folder, tmp_path / "out", bits=3)
    reported = {m["name"]: m["output_error"] for m in summary["modules"]}
    name = "model.layers.0.self_attn.v_proj"
    module = model.get_submodule(name)
    inputs: list[torch.Tensor] = []
    module.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    with torch.no_grad():
        for sequence in calibration(folder).sequences:
            model(torch.tensor([sequence]))
    x = torch.cat(inputs).double()
    w, q = module.weight.double(), read_module(tmp_path / "out", name).dequantize(torch.float64)
    expected = (x @ (w - q).T).square().sum() / (x @ w.T).square().sum()
    assert reported[name] == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "sparse24"])
def test_at_most_three_blocks_live(
    method: str, make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = make_model("llama", num_hidden_layers=6)
    alive: list[weakref.ref[source.Block]] = []
    most = 0
    load = source.Source.block

    def counted(self: source.Source, layer: int, ops: Any) -> source.Block:
        nonlocal most
        block = load(self, layer, ops)
        alive.append(weakref.ref(block))
        most = max(most, sum(ref() is not None for ref in alive))
        return block

    monkeypatch.setattr(source.Source, "block", counted)
    run(folder, tmp_path / "out", method=method)
    assert len(alive) == 6
    assert most <= 3


def test_shapes_that_the_format_cannot_express_stay_dense(make_model: Any, tmp_path: Path) -> None:
    folder, model = make_model("llama", intermediate_size=80)
    summary = run(folder, tmp_path / "out")
    downs = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    assert list(summary["dense"]) == downs
    assert "80 inputs are not a multiple of 32" in summary["dense"][downs[0]]
    report = check_model(tmp_path / "out")
    assert report.loads
    assert sum("down_proj is dense" in note for note in report.notes) == 3
    written = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(written[f"{downs[1]}.weight"], model.get_submodule(downs[1]).weight)
    load_decoder(tmp_path / "out")


def test_groups_longer_than_a_row_are_told(make_model: Any, tmp_path: Path) -> None:
    """One group then; whoever reads the configuration finds another size there."""
    folder, _ = make_model("llama")
    summary = run(folder, tmp_path / "out", method="rtn", group_size=256)
    said = "groups of 256 are longer than rows of 64 inputs, which are one group each then (21 modules, as "
    assert summary["warnings"] == [f"{said}model.layers.0.self_attn.q_proj)"]
    assert read_module(tmp_path / "out", "model.layers.0.self_attn.q_proj").scales.shape[1] == 1
    assert run(folder, tmp_path / "row", method="rtn", group_size=-1)["warnings"] == []


def test_scales_beyond_fp16_stay_dense_with_a_name(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama")
    name = "model.layers.1.self_attn.k_proj"
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{name}.weight"][3, 7] = 3e6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for method in ("rtn", "gptq"):
        summary = run(folder, tmp_path / method, method=method)
        assert list(summary["dense"]) == [name]
        assert "fp16 cannot hold" in summary["dense"][name]
        assert get_format(ModelFiles(tmp_path / method).quantize_config).spec(name) is None
        load_decoder(tmp_path / method)


def test_a_hessian_without_a_factor_is_an_error_that_names_the_module(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = make_model("llama")

    def refuse(self: GPTQ, matrix: torch.Tensor, spec: QuantSpec) -> hessian.HessianFactor:
        if len(matrix) == 96:
            raise hessian.FactorizationError("as the test wants it")
        return hessian.factorize(matrix, spec, 0.01)

    monkeypatch.setattr(GPTQ, "prepare", refuse)
    with pytest.raises(
        LayerError, match=r"down_proj: .* \(as the test wants it\); raise --damping"
    ) as caught:
        run(folder, tmp_path / "out")
    assert caught.value.layer == "model.layers.0.mlp.down_proj"
    assert [p.name for p in tmp_path.iterdir()] == ["original"]


def test_everything_else_is_copied(make_model: Any, tmp_path: Path) -> None:
    folder, model = make_model("llama", tie_word_embeddings=True)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    out = tmp_path / "deep" / "out"
    summary = run(folder, out, symmetric=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert not (out / "pytorch_model.bin").exists()
    assert sorted(p.name for p in out.parent.iterdir()) == ["out"]
    config, original = (json.loads((f / "config.json").read_text()) for f in (out, folder))
    block = config.pop("quantization_config")
    origin = config.pop("provenance")
    assert config == original
    assert (origin["method"], origin["options"]["symmetric"]) == ("gptq", False)
    assert json.loads((out / "quantize_config.json").read_text()) == block
    assert (block["bits"], block["group_size"], block["sym"]) == (4, 32, False)
    assert (block["quant_method"], block["checkpoint_format"]) == ("gptq", "gptq_v2")
    assert block["meta"]["quantizer"][0].startswith("nybble:")
    used = block["meta"]["calibration"]
    assert used["tokens"] == calibration(folder).num_tokens
    assert len(used["sha256"]) == 64
    tensors = load_file(out / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert torch.equal(tensors["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert summary["bytes_after"] == sum(t.nbytes for t in tensors.values())
    assert summary["bytes_before"] == sum(t.nbytes for t in load_file(folder / "model.safetensors").values())


def test_half_precision_originals(make_model: Any, tmp_path: Path) -> None:
    """Leftovers keep their dtype, rounding happens in fp32."""
    folder, model = make_model("qwen2")
    model.to(torch.bfloat16).save_pretrained(folder)
    run(folder, tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert tensors["model.norm.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.0.self_attn.q_proj.bias"].dtype == torch.bfloat16
    scales = [t for name, t in tensors.items() if name.endswith(".scales")]
    assert len(scales) == 21
    assert {t.dtype for t in scales} == {torch.float16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "--method magic: use one of rtn, gptq"),
        ({"method": "rtn", "actorder": "group"}, "--actorder group"),
        ({"bits": 5}, "--bits 5: use 2, 3, 4 or 8"),
        ({"group_size": 48}, "--group-size 48: use one of -1, 16"),
        ({"damping": float("nan")}, "--damping nan"),
        ({"damping": 0.0}, "--damping 0.0"),
        ({"mse": 0.5}, "--mse 0.5"),
        ({"num_samples": 0}, "--num-samples 0"),
        ({"seq_len": 1}, "--seq-len 1"),
        ({"calibration": "no/such/file"}, "--calibration no/such/file: cannot be read"),
        ({"method": "rtn", "calibration": "no/such/file"}, "--calibration no/such/file: cannot be read"),
        (
            {"checkpoint_format": "bnb"},
            "--checkpoint-format bnb: use gptq, gptq_v2, awq or compressed-tensors",
        ),
        ({"model": "no/such/model"}, "model 'no/such/model'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    options: dict[str, Any], message: str, make_model: Any, tmp_path: Path
) -> None:
    folder, _ = make_model("llama")
    with pytest.raises(ConfigError) as caught:
        run(folder, tmp_path / "out", **options)
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert [p.name for p in tmp_path.iterdir()] == ["original"]


def test_too_little_text_is_an_error_with_a_remedy(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama")
    text = tmp_path / "text.txt"
    text.write_text("the cat sang")
    with pytest.raises(ConfigError, match=r"--calibration text.txt: \d+ tokens are too few .*--method rtn"):
        run(folder, tmp_path / "out", calibration=str(text))
    run(folder, tmp_path / "out", calibration=str(text), method="rtn")


def test_out_is_never_overwritten_unasked(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama")
    out = tmp_path / "out"
    out.mkdir()
    run(folder, out, method="rtn")  # empty: fine
    before = (out / "model.safetensors").read_bytes()
    given = QuantizeOptions(str(folder), str(out), bits=8, calibration="no/such/file")
    lines: list[str] = []
    with pytest.raises(ConfigError, match=r"not empty.*--overwrite"):
        quantize(given, lambda *_: None, lines.append)
    assert lines == [], "the model was looked at first"
    assert (out / "model.safetensors").read_bytes() == before
    (out / "stale.txt").touch()
    run(folder, out, bits=8, method="rtn", overwrite=True)
    assert (out / "model.safetensors").read_bytes() != before
    assert not (out / "stale.txt").exists()
    for nested in (folder, folder / "inside", folder.parent):
        with pytest.raises(ConfigError, match="neither MODEL, nor inside it"):
            run(folder, nested, overwrite=True)
    with pytest.raises(ConfigError, match="is quantized already"):
        run(out, tmp_path / "twice")


def test_an_interrupt_leaves_nothing(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama")

    def interrupt(phase: str, done: int, total: int, *_: Any) -> None:
        if done == 5:
            raise KeyboardInterrupt

    options = QuantizeOptions(str(folder), str(tmp_path / "out"), group_size=32, method="rtn", report=False)
    with pytest.raises(KeyboardInterrupt):
        quantize(options, interrupt, lambda _: None)
    assert [p.name for p in tmp_path.iterdir()] == ["original"]


def test_memory_that_is_not_there_is_refused(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = make_model("llama")
    monkeypatch.setattr("nybble.engine.quantize.job.available_memory", lambda: 10_000)
    with pytest.raises(ConfigError, match=r"--num-samples: .* lower"):
        run(folder, tmp_path / "out")


@pytest.mark.parametrize(
    "options",
    [
        {"method": "rtn"},
        {},
        {"true_sequential": False},
        {"mse": 2.4, "actorder": "gar", "group_size": 128},
        {"method": "awq", "awq_steps": 3, "group_size": 128},
        {"method": "sparse24"},
        {"method": "sparse24", "bits": 16, "prune": "magnitude"},
    ],
)
def test_the_bound_of_memory_holds(options: dict[str, Any], make_model: Any, tmp_path: Path) -> None:
    """Every tensor that is alive at any allocation, by torch's own count of a larger run."""
    folder, _ = make_model("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    config = source.Source(folder).config
    text = tmp_path / "text.txt"
    text.write_text("the cat and the dog " * 1000)
    given = {"calibration": str(text), "num_samples": 20, **options}
    peak = peak_of_tensors(lambda: run(folder, tmp_path / "out", **given))
    method = get_method(QuantizeOptions("", "", **options))
    assert peak <= method.peak_bytes(config, 20 * 32 if method.statistics else 0)


@pytest.mark.parametrize("predict", [False, True])
def test_the_reports_bound_of_memory_holds(
    predict: bool, make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two chunks of text; the bound of RTN itself is lower."""
    folder, _ = make_model("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join(["the cat and the dog " * 100] * 16))
    monkeypatch.setattr("nybble.engine.compare.CHUNK_BYTES", 8 * 256 * 3000)
    given = {"method": "rtn", "report": True, "predict": predict, "eval_text": str(text)}
    options = QuantizeOptions(str(folder), "", **given)  # type: ignore[arg-type]
    with source.Source(folder) as opened:
        held = read_held_out(options, opened)
        assert sum(len(window.token_ids) for window in held.passage.windows) > 3000
        bounds = [peak_bytes(opened.config, held.passage), prediction_bytes(opened.config)]
    peak = peak_of_tensors(lambda: run(folder, tmp_path / "out", **given))
    assert peak <= (max(bounds) if predict else bounds[0])


def peak_of_tensors(work: Any) -> int:
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    total = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    assert peak > 0
    return peak


def test_the_shipped_text_is_enough() -> None:
    found = read_documents(Path(source.__file__).parent / "calibration.txt", "--calibration")
    assert sum(len(document.content) for document in found.items) > 20_000
    assert len(found.items) > 30
