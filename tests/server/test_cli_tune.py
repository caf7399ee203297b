"""``nybble tune`` as a user meets it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from nybble.server import cli, cli_tune


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["nybble", "tune", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_a_rehearsal_in_a_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--rehearse", "--kind", "w8", "--kind", "w4-24", "--out", str(tmp_path)) == 0
    captured = capsys.readouterr()
    assert "rehearsal: 28 rules" in captured.out
    assert "serve does not read this folder" in captured.out
    assert "w8, up to 8 tokens, up to 33554432 weights: mma 8x" in captured.err
    assert {rule["bits"] for rule in json.loads((tmp_path / "rehearsal.json").read_text())["rules"]} == {4, 8}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("arguments", [[], ["--warm", "engine/demo/gptq-4bit-g64"]])
def test_without_a_gpu(
    arguments: list[str], root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    assert call(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "nybble: tune: no GPU: torch" in captured.err


def test_what_was_compiled_is_said() -> None:
    assert cli_tune.Tune(warm="m").task() == ("warm", {"model": "m", "dtype": "bfloat16"})
    found = {"kernels": 5, "seconds": 4.25, "folder": "/cache/triton-3.7.1"}
    assert list(cli_tune.describe(found)) == ["5 kernels in /cache/triton-3.7.1, 4.2 s"]
