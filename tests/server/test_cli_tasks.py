"""``nybble check``, ``quantize`` and ``eval``, as a user meets them."""

import json
import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer
from nybble.engine.errors import ConfigError
from nybble.server import cli, cli_progress, cli_tasks
from tiny_models import tiny_transformer
from tiny_tokenizer import write_tokenizer
from waiting import until


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_transformer("llama", vocab_size=300, intermediate_size=80).save_pretrained(tmp_path / "model")
    return write_tokenizer(tmp_path / "model")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["nybble", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_the_three_commands(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real children; the summary names what stays dense."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = str(tmp_path / "out")
    assert call(monkeypatch, "quantize", str(folder), out, "--group-size", "32", "--num-samples", "4") == 0
    shown = capsys.readouterr().out
    assert "dense: model.layers.2.mlp.down_proj (80 inputs are not a multiple of 32)" in shown
    assert "18 modules quantized" in shown
    assert "3 left dense" in shown
    assert "largest of 18 errors" in shown
    assert shown.count("_proj  ") + shown.count("_proj ") >= 12
    assert "tokens of evaluation.txt, context 128:" in shown
    for figure in ("NLL per token", "perplexity", "KL per token", "top-1 agreement", "by gradients"):
        assert figure in shown
    assert f"more in {out}/quality.html" in shown
    assert call(monkeypatch, "eval", out, "--against", str(folder), "--max-documents", "2") == 0
    shown = capsys.readouterr().out
    assert "NLL per token" in shown
    assert "KL per token" in shown
    served = ("--cpu-kernels", "torch", "--dtype", "auto", "--lm-head-bits", "8")
    assert call(monkeypatch, "eval", out, "--max-documents", "2", *served) == 0
    shown = capsys.readouterr().out
    assert "auto, dequant-fp16, output head in 8 bits" in shown
    assert "from itself in fp32" in shown
    assert call(monkeypatch, "check", out, "--kv-cache-memory", "1MiB") == 0
    assert "will load" in capsys.readouterr().out
    assert call(monkeypatch, "quantize", str(folder), out) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip().endswith("exists and is not empty; choose another folder or add --overwrite")


def test_a_model_that_will_not_load_is_exit_code_2(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert call(monkeypatch, "check", str(folder)) == 2
    shown = capsys.readouterr().out
    assert "will NOT load" in shown
    assert "truncated" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "only-one"], "Missing argument"),
        (["quantize", "a", "b", "--bits", "x"], "--bits"),
        (["quantize", "a", "b", "--actorder", "some"], "--actorder"),
        (["quantize", "a", "b", "--surprise"], "No such option"),
        (["check", "a", "--kv-cache-memory", "much"], "--kv-cache-memory 'much': should be a size in bytes"),
        (["quantize", "a", "b", "--method", "magic"], "--method 'magic': 'magic' is not one of 'rtn'"),
        (["eval", "a", "--dtype", "int8"], "--dtype"),
        (["eval", "a", "--num-threads", "0"], "--num-threads"),
        (["quantize", "a", "b", "--num-threads", "-1"], "--num-threads"),
        (["eval", "a", "--cpu-activations", "fp8"], "--cpu-activations"),
    ],
)
def test_mistakes_start_no_child(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("started")

    monkeypatch.setattr(subprocess, "Popen", never)
    assert call(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def fake_child(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let run_task start ``script`` in place of a task."""
    real = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        assert command[1:4] == ["-P", "-m", "nybble.engine.tasks"]
        return real([sys.executable, "-c", script], **options)

    monkeypatch.setattr(subprocess, "Popen", start)


def test_events_reach_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events = [
        {"event": "log", "line": "three [words] here"},
        {"event": "progress", "phase": "score", "done": 1, "total": 2},
        {"event": "progress", "phase": "score", "done": 2, "total": 2},
        {"event": "result", "answer": 42},
    ]
    script = f"import sys, json\nsys.stdin.read()\nfor event in {events!r}: print(json.dumps(event))"
    fake_child(monkeypatch, script)
    assert cli_tasks.run_task("evaluate", {"a": 1}) == events[-1]
    captured = capsys.readouterr()
    assert "three [words] here" in captured.err
    assert captured.err.splitlines() == ["three [words] here", "score: 1 of 2", "score: 2 of 2"]
    assert captured.out == ""


def test_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At once, some seconds apart; each phase's beginning and end."""
    now = [0.0]
    monkeypatch.setattr(cli_progress.time, "monotonic", lambda: now[0])
    plain = cli_progress.Plain()
    shown = []
    for seconds, done in ((0, 0), (1, 1), (12, 2), (13, 3), (14, 4), (200, 40), (201, 42), (201, 42)):
        now[0] = float(seconds)
        loss = {"loss": 0.012345} if done else {}
        plain.show({"event": "progress", "phase": "quantize", "done": done, "total": 42, "layer": 1, **loss})
        shown.append(capsys.readouterr().err)
    assert shown == [
        "quantize: 0 of 42, layer 1\n",
        "",
        "quantize: 2 of 42, layer 1, loss 0.01235, about 4 min left\n",
        *("", ""),
        "quantize: 40 of 42, layer 1, loss 0.01235, about 10 s left\n",
        "quantize: 42 of 42, layer 1, loss 0.01235\n",
        "",
    ]
    plain.show({"event": "progress", "phase": "report", "done": 0, "total": 3})
    assert capsys.readouterr().err == "report: 0 of 3\n"


def test_bars_on_a_terminal_and_no_empty_line_before_an_error(folder: Path) -> None:
    def shown(*arguments: str) -> str:
        ours, theirs = pty.openpty()
        command = [sys.executable, "-P", "-m", "nybble.server.cli", *arguments]
        environment = {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, stderr=theirs, stdout=subprocess.DEVNULL, env=environment) as child:
            os.close(theirs)
            found = b""
            with suppress(OSError):  # EIO: the other end is closed
                while part := os.read(ours, 4096):
                    found += part
            child.wait(60)
        os.close(ours)
        return found.decode()

    assert shown("check", str(folder / "none")).startswith("nybble: ")
    assert "━" in shown("eval", str(folder), "--max-documents", "1")


@pytest.mark.parametrize("passed", [True, False, None])
def test_a_gate_that_is_not_passed_fails_the_command(
    passed: bool | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it measured is shown all the same."""
    side = {"nll": 1.0, "perplexity": 2.7}
    report = {
        "text": {"whole": True, "tokens": 9, "name": "t", "context": 4},
        "model": side,
        "original": side,
    }
    report |= {"nll_increase": 0.2, "kl": 0.1, "top1_agreement": 0.9}
    report |= {"standard_error": {"nll_increase": 0.0123, "windows": 7} if passed else {"nll_increase": None}}
    report |= {"prediction": {"computed": False, "reason": "none"}}
    summary = {"event": "result", "out": "b", "modules": [], "dense": {}, "warnings": [], "report": report}
    summary |= {"bytes_before": 2, "bytes_after": 1, "bits_per_weight": 4.0, "seconds": 1.0}
    summary |= {"bits_per_quantized_weight": None, "peak_rss_bytes": 1}
    if passed is not None:
        summary["gate"] = {"max_nll_increase": 0.1, "nll_increase": 0.2, "passed": passed}
    fake_child(monkeypatch, f"import sys\nsys.stdin.read()\nprint({json.dumps(summary)!r})")
    assert call(monkeypatch, "quantize", "a", "b", "--max-nll-increase", "0.1") == (
        1 if passed is False else 0
    )
    captured = capsys.readouterr()
    assert "more in b/quality.html" in captured.out
    error = "± 0.0123 nats (standard error over 7 windows)" if passed else "nats (one window of text: its "
    assert f"  change          +0.2000 {error}" in captured.out
    assert ("--max-nll-increase 0.1: not passed" in captured.err) == (passed is False)


def test_how_a_task_can_fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    error = {"event": "error", "message": "too bad", "user_error": True}
    fake_child(monkeypatch, f"print({json.dumps(error)!r})")
    with pytest.raises(ConfigError, match="too bad"):
        cli_tasks.run_task("check", {})
    monkeypatch.undo()
    fake_child(monkeypatch, f"print({json.dumps({**error, 'user_error': False})!r})")
    with pytest.raises(typer.Exit) as caught:
        cli_tasks.run_task("check", {})
    assert caught.value.exit_code == 1
    assert "check failed: too bad" in capsys.readouterr().err
    monkeypatch.undo()
    fake_child(monkeypatch, "import os; os._exit(7)")
    with pytest.raises(typer.Exit) as caught:
        cli_tasks.run_task("check", {"large": "x" * 10**6})
    assert caught.value.exit_code == 1
    assert "ended without a word (exit code 7)" in capsys.readouterr().err
    monkeypatch.undo()
    fake_child(monkeypatch, "import os; os._exit(130)")
    with pytest.raises(KeyboardInterrupt):
        cli_tasks.run_task("check", {})


def test_a_line_that_an_interrupt_cut_does_not_hide_it() -> None:
    lines = """print('{"event": "log"}'); print('{"event": "l', end="")"""
    seen: list[Any] = []
    with subprocess.Popen([sys.executable, "-c", lines], stdout=subprocess.PIPE, text=True) as child:
        child.wait()
        with pytest.raises(KeyboardInterrupt), cli_tasks._ended(child, seen.append):
            raise KeyboardInterrupt
    assert seen == [{"event": "log"}]


def quantize_command(folder: Path, tmp_path: Path) -> list[str]:
    """``nybble quantize`` in a process of its own."""
    return [
        *(sys.executable, "-P", "-m", "nybble.server.cli", "quantize"),
        str(folder),
        str(tmp_path / "out"),
    ]


def test_an_interrupt_while_the_child_starts_is_no_traceback(folder: Path, tmp_path: Path) -> None:
    """As a terminal sends it: to both."""
    command = quantize_command(folder, tmp_path)
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=listening, start_new_session=True
    ) as parent:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")

        def starts() -> bool:
            ours = [Path("/proc", pid, "cmdline").read_bytes() for pid in children.read_text().split()]
            return any(b"nybble.engine.tasks" in line for line in ours)

        until(starts, 60)
        lines = Path("/proc", children.read_text().strip(), "status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        assert int(status["SigIgn"], 16) >> (signal.SIGINT - 1) & 1, "its imports would end with a traceback"
        os.killpg(parent.pid, signal.SIGINT)
        _, said = parent.communicate(timeout=60)
    assert (parent.returncode, said) == (
        130,
        "nybble: interrupted; nothing is kept (--resume keeps finished blocks)\n",
    )


def test_an_interrupt_ends_the_child(folder: Path, tmp_path: Path, child_environment: dict[str, str]) -> None:
    """SIGINT to the command alone, as from a supervisor: the child cleans up, nothing is left."""
    text = tmp_path / "text"
    text.write_text("the cat and the dog went to the sea <|endoftext|>" * 120_000)
    command = quantize_command(folder, tmp_path)
    command += ["--group-size", "32", "--num-samples", "1000000", "--calibration", str(text)]
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    with subprocess.Popen(
        command, env=child_environment, stderr=subprocess.PIPE, text=True, preexec_fn=listening
    ) as parent:
        until(lambda: any(path.name.endswith(".partial") for path in tmp_path.iterdir()), 60)
        os.kill(parent.pid, signal.SIGINT)
        _, said = parent.communicate(timeout=60)
        assert parent.returncode == 130
    assert said.endswith("nybble: interrupted; nothing is kept (--resume keeps finished blocks)\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text"]
