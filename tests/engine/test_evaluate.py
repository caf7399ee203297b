"""Scores against transformers and float64 numpy."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nybble.engine.errors import ConfigError
from nybble.engine.evaluate import SHIPPED_TEXT, EvaluateOptions, evaluate
from nybble.engine.hardware import cpu_features
from nybble.engine.quantize.grid import round_nearest
from nybble.engine.quantize.job import quantize
from nybble.engine.quantize.options import QuantizeOptions
from nybble.engine.tokenizer import Tokenizer
from nybble.kernels.cpu.numba_linear import bf16_refusal, instruction_set
from nybble.kernels.dispatch import Target
from nybble.kernels.layout import QuantSpec
from tiny_models import tiny_transformer
from tiny_tokenizer import write_tokenizer

TEXT = "the cat and the dog<|endoftext|> in the rain, ünder the sea\n<|endoftext|>went <|endoftext|>"
DOCUMENTS = ["the cat and the dog", "in the rain, ünder the sea", "went"]
DEMO = Path(__file__).parents[2] / "engine" / "demo" / "gptq-4bit-g64"
CPU = Target(cpu_features=cpu_features(), cpu_kernels="auto")
compiled = pytest.mark.skipif(
    instruction_set(CPU) is None, reason="the CPU has neither AVX2 nor AVX-512 VNNI"
)
ROUNDED = ["int8"] + ["bf16"] * (bf16_refusal(CPU) is None)


def save(folder: Path, bos: bool = True, **fields: Any) -> Any:
    model = tiny_transformer("llama", vocab_size=300, eos_token_id=0, **fields).requires_grad_(False)
    model.save_pretrained(folder)
    write_tokenizer(folder, bos=bos)
    return model


def run(folder: Path, text: Path, **options: Any) -> dict[str, Any]:
    return evaluate(EvaluateOptions(str(folder), text=str(text), **options), lambda *_: None, lambda _: None)


def logprobs(model: Any, ids: list[int]) -> np.ndarray:
    """[T, vocab] float64."""
    logits = model(torch.tensor([ids])).logits[0].double().numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("bos", [True, False])
def test_equals_transformers_per_document(bos: bool, tmp_path: Path, text: Path) -> None:
    """Without a beginning-of-sequence token the end-of-sequence token stands in front."""
    model = save(tmp_path / "model", bos)
    tokenizer = Tokenizer.from_folder(tmp_path / "model")
    total, count = 0.0, 0
    for document in DOCUMENTS:
        ids = [1 if bos else 0, *tokenizer.encode(document, add_special_tokens=False)]
        found = logprobs(model, ids)
        total -= sum(found[place, ids[place + 1]] for place in range(len(ids) - 1))
        count += len(ids) - 1
    num_bytes = sum(len(document.encode()) for document in DOCUMENTS)
    found = run(tmp_path / "model", text)
    assert found["num_tokens"] == count
    assert found["num_bytes"] == num_bytes
    assert found["nll_per_token"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, rel=1e-5)
    assert "kl_per_token" not in found


def test_distance_to_another_model(tmp_path: Path, text: Path) -> None:
    original = save(tmp_path / "original")
    changed = save(tmp_path / "changed")
    changed.model.layers[1].mlp.down_proj.weight.mul_(0.8)
    changed.save_pretrained(tmp_path / "changed")
    tokenizer = Tokenizer.from_folder(tmp_path / "original")
    kl, agreed, count = 0.0, 0, 0
    for document in DOCUMENTS:
        ids = tokenizer.encode(document)
        p, q = logprobs(original, ids)[:-1], logprobs(changed, ids)[:-1]
        kl += float((np.exp(p) * (p - q)).sum())
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(ids) - 1
    found = run(tmp_path / "changed", text, against=str(tmp_path / "original"))
    assert 0 < agreed < count
    assert found["kl_per_token"] == pytest.approx(kl / count, rel=1e-3)
    assert found["top1_agreement"] == agreed / count
    same = run(tmp_path / "original", text, against=str(tmp_path / "original"))
    assert same["kl_per_token"] == pytest.approx(0, abs=1e-9)
    assert same["top1_agreement"] == 1


def test_long_documents_are_read_in_overlapping_windows(tmp_path: Path, text: Path) -> None:
    model = save(tmp_path / "model")
    text.write_text("the cat and the dog went to the sea in the rain")
    ids = Tokenizer.from_folder(tmp_path / "model").encode(text.read_text())
    assert len(ids) > 10
    total = 0.0
    for place in range(1, len(ids)):
        reached = 8 if place < 8 else min(len(ids), 8 + 4 * ((place - 8) // 4 + 1))
        start = max(0, reached - 8)
        total -= logprobs(model, ids[start:place])[-1, ids[place]]
    found = run(tmp_path / "model", text, max_len=8)
    assert found["nll_per_token"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)


def test_batches_and_slices_of_logits_change_nothing(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "model")
    whole = run(tmp_path / "model", text)
    monkeypatch.setattr("nybble.engine.scoring.BATCH_TOKENS", 12)
    monkeypatch.setattr("nybble.engine.scorers.LOGIT_ROWS", 3)
    assert run(tmp_path / "model", text)["nll_per_token"] == pytest.approx(whole["nll_per_token"], rel=1e-6)


def test_progress_and_the_shipped_text(tmp_path: Path) -> None:
    save(tmp_path / "model", num_hidden_layers=1)
    seen: list[tuple[str, int, int]] = []
    options = EvaluateOptions(str(tmp_path / "model"), max_documents=3)
    found = evaluate(options, lambda *event: seen.append(event), lambda _: None)
    assert found["text"] == SHIPPED_TEXT.name
    assert seen[-1] == ("score", found["num_tokens"], found["num_tokens"])
    assert any(phase == "weights" for phase, _, _ in seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "--dtype int8: use auto, float32, float16, bfloat16"),
        ({"cpu_kernels": "sse"}, "--cpu-kernels sse: use auto"),
        ({"lm_head_bits": 3}, "--lm-head-bits 3: use 4 or 8, or leave it out"),
        ({"cpu_activations": "fp8"}, "--cpu-activations fp8: use int8"),
        ({"cpu_activations": "int8"}, "--cpu-activations int8: MODEL has no low-bit weights"),
        ({"max_len": 3}, "--max-len 3: must be at least 4"),
        ({"max_len": 4096}, "--max-len 4096: the model's context is 128"),
        ({"max_documents": 0}, "--max-documents 0"),
        ({"max_tokens": 0}, "--max-tokens 0"),
        ({"json": "x.json"}, "--json x.json: reports a comparison; add --against"),
        ({"html": "no/such/x", "against": "x"}, "--html no/such/x: its folder does not exist"),
        ({"text": "no/such/file"}, "--text no/such/file: cannot be read"),
        ({"against": "small"}, "--against .*small: has 299 tokens, MODEL has 300"),
        ({"against": "no/such/model"}, "model 'no/such/model'"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str, tmp_path: Path, text: Path) -> None:
    save(tmp_path / "model", num_hidden_layers=1)
    if options.get("against") == "small":
        tiny_transformer("llama", vocab_size=299).save_pretrained(tmp_path / "small")
        options = {"against": str(tmp_path / "small")}
    with pytest.raises(ConfigError, match=message):
        evaluate(
            EvaluateOptions(**{"model": str(tmp_path / "model"), "text": str(text), **options}),
            lambda *_: None,
            lambda _: None,
        )


def test_an_empty_text_is_refused(tmp_path: Path, text: Path) -> None:
    save(tmp_path / "model", num_hidden_layers=1)
    text.write_text("<|endoftext|>\n")
    with pytest.raises(ConfigError, match="holds no text"):
        run(tmp_path / "model", text)


@pytest.fixture(scope="module")
def low_bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized model."""
    folder = tmp_path_factory.mktemp("low_bit")
    save(folder / "original", num_hidden_layers=2)
    options = QuantizeOptions(
        str(folder / "original"), str(folder / "out"), "rtn", group_size=32, report=False
    )
    quantize(options, lambda *_: None, lambda _: None)
    return folder / "out"


@compiled
@pytest.mark.parametrize("activations", ROUNDED)
def test_rounded_activations_are_compared_with_exact_ones(
    activations: Any, low_bit: Path, text: Path
) -> None:
    """The exact mode of the compiled kernels scores as torch does; a model against itself costs nothing."""
    plain = run(low_bit, text, max_len=8)
    exact = run(low_bit, text, max_len=8, cpu_activations="fp32")
    rounded = run(low_bit, text, max_len=8, cpu_activations=activations)
    assert exact["nll_per_token"] == pytest.approx(plain["nll_per_token"], rel=1e-5)
    assert (exact["kernel"], rounded["kernel"]) == ("cpu-fp32", f"cpu-{activations}")
    assert "kl_per_token" not in exact
    assert rounded["against_nll_per_token"] == pytest.approx(exact["nll_per_token"], rel=1e-6)
    assert 0 < rounded["kl_per_token"] < 1e-3
    assert rounded["nll_per_token"] != exact["nll_per_token"]
    assert rounded["nll_per_token"] == pytest.approx(exact["nll_per_token"], rel=0.01)
    other = run(low_bit, text, max_len=8, cpu_activations="fp32", against=str(low_bit))
    assert other["against"] == str(low_bit)
    assert other["kl_per_token"] == pytest.approx(0, abs=1e-7)
    assert other["top1_agreement"] == 1


@compiled
def test_batches_of_windows_reuse_the_pages(
    low_bit: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(low_bit, text, cpu_activations="int8")
    monkeypatch.setattr("nybble.engine.scoring.BATCH_TOKENS", 12)
    assert run(low_bit, text, cpu_activations="int8") == whole


@compiled
@pytest.mark.parametrize("activations", ROUNDED)
def test_the_demo_model_keeps_its_quality(activations: Any) -> None:
    options = EvaluateOptions(str(DEMO), cpu_activations=activations, num_threads=1)
    found = evaluate(options, lambda *_: None, lambda _: None)
    assert found["num_tokens"] > 2000
    assert found["nll_per_token"] < 1.005 * found["against_nll_per_token"]
    assert found["top1_agreement"] >= 0.98


def test_a_score_is_of_the_kernels_that_were_asked_for(low_bit: Path, text: Path) -> None:
    with pytest.raises(ConfigError, match=r"int8: --cpu-kernels torch was asked for"):
        run(low_bit, text, cpu_activations="int8", cpu_kernels="torch")
    eager = run(low_bit, text, cpu_kernels="torch")
    assert eager["kernel"] == "torch"
    assert eager["nll_per_token"] == pytest.approx(run(low_bit, text)["nll_per_token"], rel=1e-5)


def test_a_comparison_is_reported(tmp_path: Path, text: Path) -> None:
    """The same figures in the result, in JSON and, as shown, on the page; nothing is left beside them."""
    save(tmp_path / "original")
    changed = save(tmp_path / "changed")
    changed.model.layers[1].mlp.down_proj.weight.mul_(0.8)
    changed.save_pretrained(tmp_path / "changed")
    (tmp_path / "reports").mkdir()
    files = {"json": str(tmp_path / "reports/r.json"), "html": str(tmp_path / "reports/r.html")}
    found = run(tmp_path / "changed", text, against=str(tmp_path / "original"), **files)
    report = json.loads((tmp_path / "reports/r.json").read_text())
    assert report == found["report"]
    assert report["nll_increase"] == found["nll_per_token"] - found["against_nll_per_token"]
    assert (report["kl"], report["top1_agreement"]) == (found["kl_per_token"], found["top1_agreement"])
    errors = [layer["output_error"] for layer in report["layers"]]
    assert errors[0] == 0 < errors[1] < errors[2] * 10
    touched = {m["name"]: m["weight_error"] for m in report["modules"] if m["weight_error"]}
    assert touched == {"model.layers.1.mlp.down_proj": pytest.approx(0.04, rel=1e-3)}
    assert report["model"]["bytes"] == report["original"]["bytes"]
    assert report["model"]["bits_per_weight"] == 32
    assert f"{report['kl']:.5f}" in (tmp_path / "reports/r.html").read_text()
    assert sorted(path.name for path in (tmp_path / "reports").iterdir()) == ["r.html", "r.json"]


def test_block_by_block_is_the_whole_model(
    low_bit: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ways to compare: the second loads both models, as on a GPU."""
    against = {"against": str(low_bit.parent / "original")}
    streamed = run(low_bit, text, **against)
    monkeypatch.setattr("nybble.engine.evaluate._Task._side_by_side", lambda *_: False)
    whole = run(low_bit, text, **against)
    for key in ("nll_per_token", "against_nll_per_token", "kl_per_token"):
        assert streamed[key] == pytest.approx(whole[key], rel=1e-4)
    assert streamed["top1_agreement"] == whole["top1_agreement"]
    assert (len(streamed["report"]["layers"]), whole["report"]["layers"]) == (2, [])


def test_models_of_other_depth_have_no_errors_by_layer(tmp_path: Path, text: Path) -> None:
    save(tmp_path / "deep")
    save(tmp_path / "flat", num_hidden_layers=1)
    found = run(tmp_path / "flat", text, against=str(tmp_path / "deep"))
    assert found["report"]["layers"] == []
    assert found["kl_per_token"] > 0
    few = run(tmp_path / "flat", text, max_tokens=3)
    assert (few["num_tokens"], few["num_bytes"], few["bits_per_byte"]) == (3, None, None)


@compiled
def test_as_served_with_a_rounded_head(tmp_path: Path, text: Path) -> None:
    """The same head as the server's: groups of 32, to nearest, symmetric; beside exact numbers unasked."""
    model = save(tmp_path / "model")
    exact = run(tmp_path / "model", text)
    found = {bits: run(tmp_path / "model", text, lm_head_bits=bits) for bits in (8, 4)}
    for bits, figures in found.items():
        assert figures["against"] == "itself in fp32"
        assert figures["against_nll_per_token"] == pytest.approx(exact["nll_per_token"], rel=1e-6)
        rounded = round_nearest(model.lm_head.weight, QuantSpec(bits, 32, True)).dequantize()
        other = tmp_path / f"rounded-{bits}"
        save(other)
        copy = tiny_transformer("llama", vocab_size=300, eos_token_id=0).requires_grad_(False)
        copy.lm_head.weight.copy_(rounded)
        copy.save_pretrained(other)
        assert figures["nll_per_token"] == pytest.approx(run(other, text)["nll_per_token"], rel=1e-5)
    assert found[4]["kl_per_token"] > 10 * found[8]["kl_per_token"] > 0


@compiled
def test_a_page_of_a_model_as_served_has_the_errors_of_its_weights(low_bit: Path, text: Path) -> None:
    """Those of its blocks need the exact score."""
    original = str(low_bit.parent / "original")
    exact = run(low_bit, text, max_len=8, against=original)["report"]
    lines: list[str] = []
    page = low_bit.parent / "page.html"
    served = {"cpu_activations": "int8", "lm_head_bits": 8, "max_len": 8, "html": str(page)}
    options = EvaluateOptions(str(low_bit), original, str(text), **served)  # type: ignore[arg-type]
    report = evaluate(options, lambda *_: None, lines.append)["report"]
    assert report["modules"] == exact["modules"] != []
    assert (report["layers"], exact["layers"] != []) == ([], True)
    assert any(line.startswith("errors by layer need an exact score") for line in lines)
    assert page.read_text().count("<figure>") == 1
    assert "Error of each module&#x27;s weights" in page.read_text()


def test_models_of_other_shapes_have_no_errors_by_module(tmp_path: Path, text: Path) -> None:
    save(tmp_path / "one")
    save(tmp_path / "other", intermediate_size=64)
    report = run(tmp_path / "one", text, against=str(tmp_path / "other"))["report"]
    assert report["modules"] == []
    assert len(report["layers"]) == 3
