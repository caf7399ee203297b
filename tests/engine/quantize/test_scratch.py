"""What outlives a run, and what does not."""

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from nybble.engine.errors import ConfigError
from nybble.engine.quantize import results, scratch
from nybble.engine.quantize.job import quantize
from nybble.engine.quantize.options import QuantizeOptions, resumable
from nybble.engine.quantize.scratch import Scratch
from nybble.engine.quantize.work import Log
from safetensors.torch import load_file
from waiting import until


def options(folder: Path, out: Path, **more: Any) -> QuantizeOptions:
    given = {"group_size": 32, "num_samples": 8, "seq_len": 32, "resume": True, "report": False, **more}
    return QuantizeOptions(str(folder), str(out), **given)


def run(given: QuantizeOptions, log: Log = lambda _: None) -> list[tuple[int | None, float | None]]:
    """(block, loss) of every module that was told."""
    told: list[tuple[int | None, float | None]] = []
    quantize(given, lambda *progress: told.append(progress[3:5]), log)
    return told[1:]


KILLED = """
import json, os, signal, sys
from nybble.engine.quantize.job import quantize
from nybble.engine.quantize.options import QuantizeOptions

def progress(phase, done, *_):
    if done == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

quantize(QuantizeOptions(**json.loads(sys.argv[1])), progress, lambda _: None)
"""


# What choosing modules was before GPTQ v1 had a least zero point.
ZEROS_OF_0 = """
from dataclasses import replace
from nybble.engine.quantize import job

spec_of = job.general_spec
job.general_spec = lambda options: replace(spec_of(options), least_zero=0)
"""


def killed(given: QuantizeOptions, after: int, before: str = "") -> None:
    """In a process of its own, which is killed after ``after`` modules; ``before``: what it runs first."""
    command = [sys.executable, "-P", "-c", before + KILLED, json.dumps(asdict(given)), str(after)]
    assert subprocess.run(command, timeout=120, check=False).returncode == -signal.SIGKILL


def test_a_killed_run_loses_the_block_at_hand(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama")
    out = tmp_path / "out"
    run(options(folder, tmp_path / "whole"))
    killed(options(folder, out), after=17)  # of 21: in the third block
    assert not out.exists()
    lines: list[str] = []
    told = run(options(folder, out), lines.append)
    assert "quantize: goes on after block 2 of 3" in lines
    assert [told[0][0], told[1][0]] == [0, 1]  # whole blocks, taken over
    assert len([loss for _, loss in told if loss is not None]) == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["original", "out", "whole"]
    found, expected = (load_file(f / "model.safetensors") for f in (out, tmp_path / "whole"))
    assert found.keys() == expected.keys()
    assert all(bool((found[name] == expected[name]).all()) for name in expected)


@pytest.mark.parametrize("anew", [{"resume": "anew"}, {"overwrite": True}], ids=str)
@pytest.mark.parametrize("change", ["option", "model", "calibration"])
def test_blocks_of_another_run_are_not_taken(
    change: str, anew: dict[str, Any], make_model: Any, tmp_path: Path
) -> None:
    """They stay, an error, where nobody says that they may go."""
    folder, model = make_model("llama")
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and sang to the dog " * 40)
    first = options(folder, tmp_path / "out", calibration=str(text))
    killed(first, after=17)
    assert len(results.Stage(resumable(tmp_path / "out") / "quantize")) == 2
    second = first
    said = {"option": "damping", "model": "model", "calibration": "calibration-sha256"}[change]
    if change == "option":
        second = options(folder, tmp_path / "out", calibration=str(text), damping=0.02)
    elif change == "model":
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
        model.save_pretrained(folder)
    else:
        text.write_text("the dog ran to the sea " * 60)
    lines: list[str] = []
    with pytest.raises(ConfigError, match=f"an earlier run left has other {said}; to go on give the same"):
        run(second, lines.append)
    assert len(results.Stage(resumable(tmp_path / "out") / "quantize")) == 2
    assert not any("removed" in line for line in lines)
    second = replace(second, **anew)
    assert len([loss for _, loss in run(second, lines.append) if loss is not None]) == 21
    assert f"Begins anew: what an earlier run left, with other {said}, is removed" in lines
    assert not resumable(tmp_path / "out").exists()


@pytest.mark.parametrize("note", ["as it was", "half written"])
def test_blocks_of_an_earlier_rounding_are_not_taken(note: str, make_model: Any, tmp_path: Path) -> None:
    """Zero points of 0, which v1 groups had once, would fail the run after all its work."""
    folder, model = make_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data.abs_()
    model.save_pretrained(folder)
    given = options(folder, tmp_path / "out", method="rtn", bits=2, symmetric=False, checkpoint_format="gptq")
    left = resumable(tmp_path / "out")
    killed(given, after=17, before=ZEROS_OF_0)
    block = results.Stage(left / "quantize").load(0)
    assert any(m.weight is not None and bool((m.weight.zeros == 0).any()) for m in block.modules)
    run_json = left / "run.json"
    text = run_json.read_text()
    was = {part: value for part, value in json.loads(text).items() if part != "rounding"}
    run_json.write_text(json.dumps(was, sort_keys=True) if note == "as it was" else text[:90])
    lines: list[str] = []
    assert run(replace(given, resume="anew"), lines.append)[-1][0] == 2
    said = "other rounding" if note == "as it was" else "unreadable options"
    assert f"Begins anew: what an earlier run left, with {said}, is removed" in lines


def test_threads_and_place_do_not_matter_to_blocks(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama")
    killed(options(folder, tmp_path / "out", num_threads=1), after=17)
    again = options(folder, tmp_path / "out", overwrite=True)
    assert len([loss for _, loss in run(again) if loss is not None]) == 7


def test_two_runs_never_share_a_folder(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "WAIT_SECONDS", 0.2)
    folder, _ = make_model("llama")
    given = options(folder, tmp_path / "out")
    with (
        Scratch(tmp_path / "out", given, folder, print),
        pytest.raises(ConfigError, match="another run is making it"),
        Scratch(tmp_path / "out", given, folder, print),
    ):
        pass
    assert not resumable(tmp_path / "out").exists()
    with Scratch(tmp_path / "out", given, folder, print) as mine:  # the lock ended with its holder
        assert json.loads((mine.folder / "run.json").read_text())["options"]["group_size"] == 32


def test_a_process_that_is_about_to_end_is_waited_for(make_model: Any, tmp_path: Path) -> None:
    """That of a killed server, which may be inside one long operation when the next server starts."""
    folder, _ = make_model("llama")
    given = options(folder, tmp_path / "out")
    script = "import fcntl, os, sys, time; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)"
    script += "; print(flush=True); time.sleep(1)"
    resumable(tmp_path / "out").mkdir()
    command = [sys.executable, "-c", script, str(resumable(tmp_path / "out"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as dying:
        assert dying.stdout is not None
        dying.stdout.readline()
        with Scratch(tmp_path / "out", given, folder, print):
            assert dying.wait(10) == 0


def test_a_run_that_was_waited_for_and_succeeded(make_model: Any, tmp_path: Path) -> None:
    """Its folder is gone, with the lock in it."""
    folder, _ = make_model("llama")
    given = options(folder, tmp_path / "out")
    lines: list[str] = []
    with Scratch(tmp_path / "out", given, folder, print) as first, ThreadPoolExecutor(1) as thread:
        second = thread.submit(Scratch(tmp_path / "out", given, folder, lines.append).__enter__)
        until(lambda: bool(lines), 60)
        shutil.rmtree(first.folder)
        os.close(first._lock)
        first._lock = os.open(os.devnull, os.O_RDONLY)
        with pytest.raises(ConfigError, match="another run was making it, and has ended"):
            second.result(60)
    assert lines == [f"another run is making {tmp_path / 'out'}; waits up to 20 s for its end"]


@pytest.mark.parametrize(("resume", "said"), [(True, True), ("anew", False), (False, False)])
def test_what_an_interrupt_keeps_is_told(resume: Any, said: bool, make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama")
    lines: list[str] = []

    def interrupt(_: str, done: int, *__: Any) -> None:
        if done == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(options(folder, tmp_path / "out", resume=resume), interrupt, lines.append)
    assert ("2 of 3 blocks kept in .out.work; the same command goes on" in lines) == said
    assert resumable(tmp_path / "out").exists() == bool(resume)
    lines.clear()
    run(options(folder, tmp_path / "out", resume=False), lines.append)
    said = ".out.work: finished blocks of an interrupted run stay there, unused by this one" in lines
    assert said == resumable(tmp_path / "out").exists() == bool(resume)


def test_without_resume_nothing_outlives_a_run(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama")
    given = options(folder, tmp_path / "out", resume=False)
    for error in (KeyboardInterrupt, RuntimeError, ConfigError):
        with pytest.raises(error), Scratch(tmp_path / "out", given, folder, print):
            raise error("x")
    assert [p.name for p in tmp_path.iterdir()] == ["original"]
    assert resumable(tmp_path / "a").name == ".a.work"


def test_a_place_that_cannot_be_written(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama")
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match="cannot be written"),
        Scratch(tmp_path / "file" / "out", options(folder, tmp_path / "out"), folder, print),
    ):
        pass


def test_what_the_dead_left_is_removed(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama")
    given = options(folder, tmp_path / "out", method="rtn", num_samples=128, seq_len=2048, resume=False)
    killed(given, after=17)
    assert len(list(tmp_path.glob(".out.*"))) == 2
    (tmp_path / ".out.1.partial").mkdir()  # of a process that is there
    run(given)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.1.partial", "original", "out"]
