"""A server and its jobs' processes, killed at random points of a job: what is lost, and what comes out."""

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import LiveServer, serve
from nybble.engine.quantize.options import resumable
from safetensors.torch import load_file
from tiny_models import tiny_transformer
from tiny_tokenizer import write_tokenizer

ADMIN = {"authorization": "Bearer adm"}
LAYERS = 16
TEXTS = ["the cat and the dog went to the sea in the rain and then sang " * 8] * 64
JOB = {
    "model": "original",
    "group_size": 32,
    "num_samples": 128,
    "seq_len": 64,
    "report": False,
    "calibration": {"source": {"texts": TEXTS}},
}


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kills") / "models"
    model = tiny_transformer("llama", vocab_size=300, num_hidden_layers=LAYERS)
    model.save_pretrained(root / "original")
    write_tokenizer(root / "original")
    return root


class Jobs:
    """The jobs of a server that comes back from the same folder after each kill."""

    def __init__(self, models_dir: Path, log: Path) -> None:
        self._models_dir = models_dir
        self._log = log
        self._stack: Any = None
        self.server: LiveServer
        self.start()

    def start(self) -> None:
        folder = str(self._models_dir / "original")
        options = ("--models-dir", str(self._models_dir), "--admin-key", "adm", "--num-threads", "1")
        self._stack = serve(self._log, folder, "--served-model-name", "original", *options)
        self.server = self._stack.__enter__()

    def stop(self) -> None:
        self._stack.__exit__(None, None, None)

    def post(self, output: str) -> str:
        body = JOB | {"output": output}
        answer = httpx.post(f"{self.server.url}/v1/quantizations", json=body, headers=ADMIN, timeout=30)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def get(self, job_id: str) -> Any:
        url = f"{self.server.url}/v1/quantizations/{job_id}"
        return httpx.get(url, headers=ADMIN, timeout=30).json()

    def process(self) -> int | None:
        """Of the running job, once it has one."""
        for path in Path(f"/proc/{self.server.process.pid}/task").glob("*/children"):
            for pid in path.read_text().split():
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    if b"nybble.engine.tasks" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        return int(pid)
        return None

    def blocks(self, output: str) -> dict[str, int]:
        """When each finished block was written, by name."""
        stage = resumable(self._models_dir / output) / "quantize"
        return {path.name: path.stat().st_mtime_ns for path in sorted(stage.glob("block-*.safetensors"))}

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        self.server.wait_until(condition, 120, what)

    def has_ended(self, job_id: str) -> bool:
        return self.get(job_id)["finished_at"] is not None

    def ended(self, job_id: str) -> Any:
        self.wait(lambda: self.has_ended(job_id), f"the end of {job_id}")
        return self.get(job_id)


@pytest.fixture(scope="module")
def jobs(models_dir: Path) -> Iterator[Jobs]:
    found = Jobs(models_dir, models_dir.parent / "log")
    yield found
    found.stop()


@pytest.fixture(scope="module")
def whole(jobs: Jobs, models_dir: Path) -> Path:
    """What a job writes that nobody kills."""
    assert jobs.ended(jobs.post("whole"))["status"] == "succeeded"
    return models_dir / "whole"


def killed_amid(jobs: Jobs, chance: random.Random, how: str, output: str) -> tuple[str, bool]:
    """A job, killed at a random point, and whether that was seen.

    Seen: a kill met finished blocks, and later there were more, none of these lost or made again. A busy
    machine may look too late, when the job has ended.
    """
    job = jobs.post(output)
    point = chance.randrange(1, LAYERS - 5)
    jobs.wait(lambda: len(jobs.blocks(output)) >= point or jobs.has_ended(job), f"block {point}")
    time.sleep(chance.uniform(0, 0.1))  # somewhere in the next block
    victim = jobs.server.process.pid if how == "server" else jobs.process()
    if victim is None:
        return job, False
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    if how == "server":
        jobs.stop()
    known = jobs.blocks(output)
    if how == "server":
        jobs.start()
    later: dict[str, int] = {}

    def goes_on() -> bool:
        later.clear()
        later.update(jobs.blocks(output))
        return len(later) > len(known)

    jobs.wait(lambda: goes_on() or jobs.has_ended(job), "a block after the kill")
    if not known or len(later) <= len(known):
        return job, False
    assert later.items() >= known.items(), "a finished block was lost or made again"
    return job, True


@pytest.mark.parametrize("how", ["process", "server"])
def test_a_kill_loses_the_block_at_hand_at_the_most(
    jobs: Jobs, models_dir: Path, whole: Path, how: str
) -> None:
    seed = time.time_ns() % 2**32
    print(f"seed {seed}")
    chance = random.Random(seed)
    for output in (f"{how}-{attempt}" for attempt in range(5)):
        job, seen = killed_amid(jobs, chance, how, output)
        if seen:
            break
        assert jobs.ended(job)["status"] == "succeeded"
    else:
        raise AssertionError(f"no kill of a {how} was seen to interrupt its job")
    weights = load_file(whole / "model.safetensors")
    last = jobs.ended(job)
    assert (last["status"], last["error"]) == ("succeeded", None)
    found = load_file(models_dir / output / "model.safetensors")
    assert found.keys() == weights.keys()
    assert all(bool((found[name] == weights[name]).all()) for name in weights)
    configs = [json.loads((out / "config.json").read_text()) for out in (models_dir / output, whole)]
    assert configs[0] == configs[1]
    assert list(models_dir.glob(f".{output}.*")) == [], "what was killed left something"
    assert list((models_dir / ".nybble").glob("texts-*")) == [], "the texts of the request are left"
