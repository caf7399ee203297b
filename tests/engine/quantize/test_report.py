"""The quality report: of the checkpoint as it is stored, before it is anybody's."""

import json
from pathlib import Path
from typing import Any

import pytest
from nybble.engine.errors import ConfigError
from nybble.engine.evaluate import EvaluateOptions, evaluate
from nybble.engine.quantize import report as report_module
from nybble.engine.quantize.job import quantize
from nybble.engine.quantize.options import QuantizeOptions
from nybble.engine.quantize.report import num_params, read_held_out
from nybble.engine.quantize.source import Source

TEXT = "<|endoftext|>".join(f"the cat and the dog went to the sea {n} " * 6 for n in range(6))


def run(folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    given = {"group_size": 32, "num_samples": 4, "seq_len": 32, **options}
    return quantize(QuantizeOptions(str(folder), str(out), **given), lambda *_: None, lambda _: None)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "held out.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"method": "rtn", "bits": 3},
        {"bits": 4, "symmetric": False, "checkpoint_format": "compressed-tensors"},
        {"method": "rtn", "transform": "awq", "dynamic": {"-:.*down_proj": {}}},
        {"method": "gwq", "bits": 2, "gradient_samples": 2, "outlier_percent": 5.0},
        {"method": "sparse24", "bits": 16, "prune": "sparsegpt"},
        {"method": "rtn", "lm_head_bits": 4, "checkpoint_format": "compressed-tensors"},
    ],
)
def test_it_says_what_eval_says_of_the_checkpoint(
    options: dict[str, Any], make_model: Any, text: Path, tmp_path: Path
) -> None:
    """Two ways to the same figures, for every way to store; the original is in half precision."""
    folder, model = make_model("llama")
    model.bfloat16().save_pretrained(folder)
    summary = run(folder, tmp_path / "out", eval_text=str(text), **options)
    report = json.loads((tmp_path / "out/quality.json").read_text())
    found = evaluate(
        EvaluateOptions(str(tmp_path / "out"), str(folder), str(text)), lambda *_: None, lambda _: None
    )
    assert report["model"] == found["report"]["model"] | {"name": "out"}
    assert report["original"] == found["report"]["original"]
    assert report["text"] == found["report"]["text"] | {"context": 128}
    for key in ("nll_increase", "kl", "top1_agreement", "layers"):
        assert report[key] == found["report"][key]
    assert report["kl"] > 0
    assert report["model"]["bytes"] == summary["bytes_after"]
    assert report["model"]["bits_per_weight"] == summary["bits_per_weight"]
    assert summary["report"] == {key: value for key, value in report.items() if key != "modules"}
    assert {m["name"] for m in summary["modules"]} == {m["name"] for m in report["modules"]}
    assert report["run"]["method"] == options.get("method", "gptq")
    provenance = json.loads((tmp_path / "out/config.json").read_text())["provenance"]
    assert report["run"]["options"] == provenance["options"]
    assert report["run"]["calibration"] == provenance["calibration"]
    assert f"nybble {report['run']['nybble']}" == provenance["tool"]
    assert f"{report['kl']:.5f}" in (tmp_path / "out/quality.html").read_text()


def test_the_provenance_has_its_figures_and_no_time(make_model: Any, text: Path, tmp_path: Path) -> None:
    folder, _ = make_model("llama")
    for name in ("first", "again"):
        run(folder, tmp_path / name, method="rtn", eval_text=str(text))
    first, again = ((tmp_path / name / "config.json").read_bytes() for name in ("first", "again"))
    assert first == again
    quality = json.loads(first)["provenance"]["quality"]
    report = json.loads((tmp_path / "first/quality.json").read_text())
    assert quality["nll_increase"] == report["nll_increase"] == quality["nll"] - quality["original_nll"]
    assert quality["text"]["name"] == "held out.txt"
    assert quality["text"]["whole"] is True
    assert "options" in json.loads(first)["provenance"]
    assert str(tmp_path) not in first.decode()


def test_what_gradients_predict_is_what_it_costs(make_model: Any, text: Path, tmp_path: Path) -> None:
    folder, _ = make_model("llama")
    run(folder, tmp_path / "out", method="rtn", bits=8, eval_text=str(text))
    report = json.loads((tmp_path / "out/quality.json").read_text())
    prediction = report["prediction"]
    assert prediction["computed"] is True
    assert prediction["predicted"] == pytest.approx(prediction["measured"], rel=0.02)
    assert sum(m["predicted"] for m in report["modules"]) == pytest.approx(prediction["predicted"])
    assert all(module["mass"] >= abs(module["predicted"]) for module in report["modules"])


def test_no_report_and_no_prediction(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama")
    summary = run(folder, tmp_path / "plain", method="rtn", report=False)
    assert "report" not in summary
    assert not list((tmp_path / "plain").glob("quality*"))
    assert json.loads((tmp_path / "plain/config.json").read_text())["provenance"]["quality"] is None
    summary = run(folder, tmp_path / "out", method="rtn", predict=False, eval_tokens=50)
    assert summary["report"]["prediction"] == {
        "computed": False,
        "reason": "not asked for (--no-predict)",
    }
    assert (summary["report"]["text"]["tokens"], summary["report"]["text"]["whole"]) == (50, False)
    assert summary["report"]["text"]["name"] == "evaluation.txt"


def test_large_models_are_scored_on_less(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = make_model("llama")
    with Source(folder) as source:
        assert num_params(source) == sum(p.numel() for p in model.parameters())
        options = QuantizeOptions(str(folder), "")
        monkeypatch.setattr(report_module, "MAX_TOKENS", 70)
        assert read_held_out(options, source).passage.whole
        monkeypatch.setattr(report_module, "WHOLE_BELOW", 1000)
        assert read_held_out(options, source).passage.num_scored == 70
        more = QuantizeOptions(str(folder), "", eval_tokens=100)
        assert read_held_out(more, source).passage.num_scored == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_text": "no/such/file"}, "--eval-text no/such/file: cannot be read"),
        (
            {"eval_text": "no/such/file", "calibration": "nor/this"},
            "--eval-text no/such/file: cannot be read",
        ),
        (
            {"eval_text": "/dev/null"},
            "--eval-text null: holds no text that could be scored; give some thousand",
        ),
        ({"eval_tokens": 0}, "--eval-tokens 0: must be at least 1"),
        ({"eval_tokens": 5, "report": False}, "--eval-tokens: has no effect without --report"),
        ({"predict": True, "report": False}, "--predict: has no effect without --report"),
    ],
)
def test_mistakes_are_told_before_the_work(
    options: dict[str, Any], message: str, make_model: Any, tmp_path: Path
) -> None:
    folder, _ = make_model("llama")
    told: list[Any] = []
    with pytest.raises(ConfigError, match=message):
        quantize(
            QuantizeOptions(str(folder), str(tmp_path / "out"), group_size=32, **options),
            lambda *event: told.append(event),
            lambda _: None,
        )
    assert told == []
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_an_interrupt_while_it_is_measured_leaves_nothing(
    make_model: Any, text: Path, tmp_path: Path
) -> None:
    folder, _ = make_model("llama")

    def interrupt(phase: str, done: int, *_: Any) -> None:
        if phase == "report" and done == 2:
            raise KeyboardInterrupt

    options = QuantizeOptions(str(folder), str(tmp_path / "out"), "rtn", group_size=32, eval_text=str(text))
    with pytest.raises(KeyboardInterrupt):
        quantize(options, interrupt, lambda _: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held out.txt", "original"]


def test_the_gate_is_part_of_the_checkpoint(make_model: Any, text: Path, tmp_path: Path) -> None:
    folder, _ = make_model("llama")
    rise = run(folder, tmp_path / "free", method="rtn", bits=2, eval_text=str(text))["report"]["nll_increase"]
    assert json.loads((tmp_path / "free/config.json").read_text())["provenance"]["gate"] is None
    for name, limit in (("passed", abs(rise)), ("failed", abs(rise) * 0.5)):
        given = {"method": "rtn", "bits": 2, "eval_text": str(text), "max_nll_increase": limit}
        summary = run(folder, tmp_path / name, **given)
        gate = {"max_nll_increase": limit, "nll_increase": rise, "passed": rise <= limit}
        origin = json.loads((tmp_path / name / "config.json").read_text())["provenance"]
        assert summary["gate"] == origin["gate"] == gate
        assert json.loads((tmp_path / name / "quality.json").read_text())["gate"] == gate
    assert gate["passed"] is False, "else this proves nothing"
