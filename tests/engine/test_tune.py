"""``nybble tune`` without a GPU: the error, the rehearsal, and what a server reads of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nybble.engine import build, tune
from nybble.engine.config import EngineConfig
from nybble.engine.errors import ConfigError, EngineError
from nybble.engine.tune import TuneOptions
from nybble.kernels.triton import launch, tuning


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path / "nybble"
    launch._USERS.folder = None
    launch._file.cache_clear()
    launch.choose.cache_clear()


def go(**options: Any) -> tuple[dict[str, Any], list[tuple[str, int, int]], list[str]]:
    steps: list[tuple[str, int, int]] = []
    lines: list[str] = []
    found = tune.tune(TuneOptions(**options), lambda *step: steps.append(step), lines.append)
    return found, steps, lines


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(
        ConfigError, match=r"tune: no GPU: torch .* sees none; run it on the machine that serves"
    ):
        go()
    config = EngineConfig("nowhere", "cuda", "float16")
    with pytest.raises(ConfigError, match="tune: no GPU"):
        tune.compile_model(config, lambda *_: None, lambda _: None)


def test_a_rehearsal_goes_through_all_of_it(cache: Path) -> None:
    found, steps, lines = go(rehearse=True, kinds=["w4", "16-24"])
    assert found["path"] == str(cache / "tuned" / "rehearsal.json")
    assert found["read"]
    rules = json.loads(Path(found["path"]).read_text())["rules"]
    assert len(rules) == len(found["rules"]) == len(lines) == 28
    assert json.loads(Path(found["path"]).read_text())["environment"]["rehearsal"] is True
    assert steps[-1] == ("tune", steps[-1][2], steps[-1][2])
    assert [done for _, done, _ in steps] == list(range(1, len(steps) + 1))
    assert any("times the default's speed" in line for line in lines)
    assert any("(the default)" in line for line in lines)


def test_another_folder(tmp_path: Path) -> None:
    found, _, _ = go(rehearse=True, out=str(tmp_path / "here"))
    assert not found["read"]
    assert (tmp_path / "here" / "rehearsal.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ["w5"]}, "--kind w5: use some of w2, w3"),
        ({"kinds": []}, "--kind: name at least one"),
        ({"dtype": "float32"}, "--dtype float32: use float16 or bfloat16"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TuneOptions(**options)


def test_a_default_that_does_not_run_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(problem: object, tried: object) -> float:
        raise tuning.DoesNotRun("OutOfResources: shared memory")

    monkeypatch.setattr(tune, "rehearsed", lambda machine: fail)
    with pytest.raises(EngineError, match=r"w4: the default .* does not run: OutOfResources"):
        go(rehearse=True)


def test_what_failed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tuning.rehearsed(tune.REHEARSED)

    def measure(problem: tuning.Problem, tried: launch.Launch) -> float:
        if tried.stages == 6:
            raise tuning.DoesNotRun("OutOfResources: shared memory")
        return real(problem, tried)

    monkeypatch.setattr(tune, "rehearsed", lambda machine: measure)
    found, _, lines = go(rehearse=True)
    assert found["rules"][0]["failed"] > 0
    assert "did not run (OutOfResources: shared memory)" in lines[0]


def test_a_server_takes_what_was_tuned(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache / "tuned"
    rule = {"tokens": None, "kernel": "mma", "BM": 8, "BN": 128, "warps": 8, "stages": 2, "programs": 1}
    folder.mkdir(parents=True)
    (folder / "nvidia-h200.json").write_text(json.dumps({"rules": [rule]}))
    h200 = launch.Machine("NVIDIA H200", "sm_90", 132)
    assert launch.choose(h200, 4, (4096, 4096), 1).warps == 4
    tune.read_tuned()
    assert launch.choose(h200, 4, (4096, 4096), 1) == launch.Launch("mma", 8, 128, 8, 2, 1)
    (folder / "nvidia-h200.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"nvidia-h200\.json: not a file of launch rules .*; remove it"):
        tune.read_tuned()


def test_a_gpu_engine_reads_it_before_it_loads(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Read(Exception):
        pass

    def read() -> None:
        raise Read

    config = EngineConfig(str(root / "engine/demo/gptq-4bit-g64"), "cpu")
    target = build.Target("cuda", torch.float16)
    monkeypatch.setattr(build, "_plan_load", lambda *_: target)
    monkeypatch.setattr(build, "keep_compiled", lambda folder: None)
    monkeypatch.setattr(build, "read_tuned", read)
    with pytest.raises(Read):
        build.build_engine(config, lambda *_: None)
