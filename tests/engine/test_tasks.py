"""The protocol of the task process."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from nybble.engine import tasks
from nybble.engine.errors import ConfigError, EngineError
from nybble.engine.tasks import Reporter, run
from tiny_models import tiny_transformer
from tiny_tokenizer import write_tokenizer

COMMAND = [sys.executable, "-P", "-m", "nybble.engine.tasks"]


def talk(name: str, options: Any) -> tuple[int, list[dict[str, Any]]]:
    stream = io.StringIO()
    source = io.StringIO(options if isinstance(options, str) else json.dumps(options))
    code = run(name, source, Reporter(stream))
    return code, [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_transformer("llama", vocab_size=300).save_pretrained(tmp_path / "model")
    return write_tokenizer(tmp_path / "model")


def test_quantize_then_evaluate_then_check(folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    code, events = talk("quantize", {"model": str(folder), "out": out, "group_size": 32, "num_samples": 4})
    assert code == 0
    lines = [event["line"] for event in events if event["event"] == "log"]
    assert lines[0].startswith("output head: stays as it is")
    assert lines[1].startswith("calibration: 4 sequences")
    progress = [event for event in events if event["event"] == "progress"]
    assert progress[0] == {"event": "progress", "phase": "quantize", "done": 0, "total": 21, "layer": 0}
    last = {event["phase"]: (event["done"], event["total"]) for event in progress}
    assert last == {"quantize": (21, 21), "report": (3, 3), "sensitivity": (4, 4)}
    assert [event["event"] for event in events].count("result") == 1
    assert events[-1]["event"] == "result"
    assert len(events[-1]["modules"]) == 21
    code, events = talk("evaluate", {"model": out, "against": str(folder), "max_documents": 2})
    assert code == 0
    assert events[-1]["kl_per_token"] > 0
    code, events = talk("check", {"model": out, "max_num_seqs": 3})
    assert code == 0
    assert events[-1]["loads"]
    assert any("4-bit group 32 sym" in line for line in events[-1]["lines"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cook", {}, "task cook: use one of check, quantize, evaluate, tune, warm"),
        ("quantize", "{", "options: not JSON"),
        ("quantize", "[1]", "options: a JSON list, expected an object"),
        ("quantize", {"model": "x", "out": "y", "speed": 9}, "option speed: not known"),
        ("quantize", {"model": "x"}, "options: .*'out'"),
        ("quantize", {"model": "no/such", "out": "y"}, "model 'no/such'"),
        ("evaluate", {"model": "no/such"}, "model 'no/such'"),
        ("check", {"model": "no/such"}, "model 'no/such'"),
        ("check", {"model": "no/such", "block_size": 3}, "model 'no/such'"),
    ],
)
def test_mistakes_are_user_errors(
    name: str, options: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, events = talk(name, options)
    assert code == 2
    assert events[-1]["event"] == "error"
    assert events[-1]["user_error"] is True
    assert re.search(message, events[-1]["message"])


@pytest.mark.parametrize("error", [RuntimeError("a bug"), EngineError("a bug")])
def test_other_errors_are_not_the_users(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: Any, reporter: Reporter) -> Any:
        raise error

    monkeypatch.setitem(tasks.TASKS, "check", fail)
    code, events = talk("check", {})
    assert code == 1
    assert events[-1]["user_error"] is False
    assert "a bug" in events[-1]["message"]
    assert ("Traceback" in capsys.readouterr().err) == isinstance(error, RuntimeError)


def test_progress_is_throttled_but_complete() -> None:
    stream = io.StringIO()
    reporter = Reporter(stream)
    for phase in ("a", "b"):
        for done in range(1001):
            reporter.progress(phase, done, 1000)
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert len(events) < 100
    for phase in ("a", "b"):
        dones = [event["done"] for event in events if event["phase"] == phase]
        assert (dones[0], dones[-1]) == (0, 1000)


def _told(*, full: bool) -> None:
    """As quantizing tells it: an error for the user, with its cause."""
    try:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        torch.empty(1 << 55)
    except (OSError, RuntimeError) as error:
        raise ConfigError("words and a remedy") from error


@pytest.mark.parametrize(
    ("fails", "code", "said"),
    [
        (lambda: torch.empty(1 << 55), "out_of_memory", "lower --num-samples"),  # torch's own words
        (lambda: bytearray(1 << 55), "out_of_memory", "lower --num-samples"),
        (lambda: os.write(os.open("/dev/full", os.O_WRONLY), b"x"), "disk_full", "free some"),
        (lambda: _told(full=False), "out_of_memory", "words and a remedy"),
        (lambda: _told(full=True), "disk_full", "words and a remedy"),
        (lambda: [][1], "failed", "IndexError"),
    ],
)
def test_what_is_lacking_has_a_code(
    fails: Any, code: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tasks.TASKS, "check", lambda options, reporter: fails())
    _, events = talk("check", {})
    assert (events[-1]["event"], events[-1]["code"]) == ("error", code)
    assert said in events[-1]["message"]


@pytest.mark.parametrize(
    "numbers", [(signal.SIGINT,), (signal.SIGTERM,), (signal.SIGINT, signal.SIGTERM)], ids=str
)
def test_a_signal_ends_the_process_and_leaves_nothing(
    numbers: tuple[signal.Signals, ...], folder: Path, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    options = {"model": str(folder), "out": str(tmp_path / "out"), "group_size": 32, "num_samples": 10**6}
    (tmp_path / "text").write_text("the cat and the dog went to the sea <|endoftext|>" * 120_000)
    options["calibration"] = str(tmp_path / "text")
    with subprocess.Popen(
        [*COMMAND, "quantize"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=child_environment,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdin.write(json.dumps(options))
        child.stdin.close()
        for line in child.stdout:
            if json.loads(line)["event"] == "progress":
                break
        assert any(path.name.endswith(".partial") for path in tmp_path.iterdir())
        for number in numbers:
            os.kill(child.pid, number)
        rest = [json.loads(line)["event"] for line in child.stdout]
        assert child.wait(30) == 130
        assert "Traceback" not in child.stderr.read()
    assert "result" not in rest
    assert "error" not in rest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text"]


def test_stdout_belongs_to_the_protocol(folder: Path, child_environment: dict[str, str]) -> None:
    """A library that prints in the process prints to stderr."""
    script = (
        "import sys; from nybble.engine import tasks\n"
        "tasks.TASKS['check'] = lambda options, reporter: print('noise') or {'fine': True}\n"
        "sys.argv = ['tasks', 'check']; tasks.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        input="{}",
        capture_output=True,
        text=True,
        env=child_environment,
        check=False,
    )
    assert done.returncode == 0
    assert [json.loads(line) for line in done.stdout.splitlines()] == [{"event": "result", "fine": True}]
    assert "noise" in done.stderr
