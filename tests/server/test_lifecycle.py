"""The process itself: start, signals, drain, the engine's death, exit codes. Over a fake engine process."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateway_server import write_model
from tiny_models import tiny_transformer
from tiny_tokenizer import write_tokenizer
from waiting import until

HERE = Path(__file__).parent
SLOW, KILL = 9001, 9003  # fake_engine's commands


class Process:
    """A running ``nybble serve``."""

    def __init__(self, popen: "subprocess.Popen[str]", port: int) -> None:
        self.popen = popen
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=20, verify=False)

    def status(self, path: str) -> int | None:
        """The status of a new connection's GET, None if there is no connection."""
        try:
            return httpx.get(self.url + path, timeout=5, verify=False).status_code
        except httpx.TransportError:
            return None

    def ended(self, seconds: float = 15) -> int:
        return self.popen.wait(seconds)

    def engine_pids(self) -> list[int]:
        children = Path(f"/proc/{self.popen.pid}/task/{self.popen.pid}/children").read_text().split()
        return [int(pid) for pid in children]


@contextmanager
def process(
    folder: Path, environment: dict[str, str], *arguments: str, up: str = "/ready"
) -> Iterator[Process]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        str(HERE / "fake_serve.py"),
        "serve",
        str(folder),
        "--port",
        str(port),
        *arguments,
    ]
    popen = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    running = Process(popen, port)
    try:
        until(lambda: popen.poll() is not None or running.status(up) == 200, 30)
        yield running
    finally:
        running.http.close()
        popen.kill()
        popen.communicate()


@pytest.fixture
def environment(child_environment: dict[str, str]) -> dict[str, str]:
    clean = {key: text for key, text in child_environment.items() if not key.startswith("NYBBLE_")}
    return clean | {"PYTHONPATH": str(HERE.parent / "engine")}


def body(command: int, max_tokens: int, stream: bool = True) -> dict[str, Any]:
    return {"prompt": [command, 65, 66], "max_tokens": max_tokens, "stream": stream}


class Stream:
    """A streaming request in the background."""

    def __init__(self, server: Process, max_tokens: int) -> None:
        self.lines: list[str] = []
        self._arguments = (server, max_tokens)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        until(lambda: bool(self.lines), 10, 0.005)

    def _run(self) -> None:
        server, max_tokens = self._arguments
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json=body(SLOW, max_tokens), timeout=30, verify=False
        ) as answer:
            self.lines += [f"{answer.status_code}"]
            self.lines += [line for line in answer.iter_lines() if line]

    def ended(self) -> list[str]:
        self.thread.join(20)
        assert not self.thread.is_alive()
        return self.lines


def test_start_greets_with_a_line_to_copy(folder: Path, environment: dict[str, str]) -> None:
    with process(folder, environment, "--served-model-name", "it's") as server:
        assert server.status("/ready") == 200
        until(lambda: 'phase="total"' in server.http.get("/metrics").text, 5)
        samples = server.http.get("/metrics").text
        server.popen.terminate()
        assert server.ended() == 0
        output = server.popen.stdout.read()
    phases = dict(re.findall(r'nybble_startup_seconds\{.*phase="(\w+)"\} (\S+)', samples))
    total = float(phases.pop("total"))
    assert sum(map(float, phases.values())) == pytest.approx(total)
    assert float(phases["engine_process"]) > 0
    assert re.match(r"it's is ready at http://127\.0\.0\.1:\d+ after \d+\.\d s", output)
    words = shlex.split(output.splitlines()[1])
    assert words[0] == "curl"
    assert json.loads(words[words.index("-d") + 1])["model"] == "it's"


def test_sigterm_drains(folder: Path, environment: dict[str, str]) -> None:
    with process(folder, environment, "--drain-delay", "1", "--drain-timeout", "20") as server:
        long = Stream(server, 90)  # 1.8 s
        server.popen.terminate()
        until(lambda: server.status("/ready") == 503, 0.8, 0.01)  # at once
        assert server.status("/health") == 200
        answer = httpx.post(f"{server.url}/v1/completions", json=body(65, 3, stream=False), verify=False)
        assert answer.status_code == 200  # still served in the delay
        until(lambda: server.http.post("/v1/completions", json=body(65, 3)).status_code == 503, 5, 0.02)
        assert long.thread.is_alive()  # closed to new ones while the old one runs
        lines = long.ended()
        assert lines[0] == "200"
        assert lines[-1] == "data: [DONE]"
        assert "error" not in "".join(lines)
        assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert server.ended() == 0


def test_who_watches_a_job_is_told_that_the_server_leaves(
    folder: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """The next start goes on with the job."""
    tiny_transformer("llama", vocab_size=300).save_pretrained(tmp_path / "original")
    write_tokenizer(tmp_path / "original")
    texts = ["the cat and the dog went to the sea in the rain and then sang " * 4] * 3200
    job = {"model": "original", "output": "x", "num_samples": 4096, "seq_len": 64, "group_size": 32}
    job |= {"predict": False, "calibration": {"source": {"texts": texts}}}
    lines: list[str] = []

    def follow(server: Process) -> None:
        submitted = server.http.post("/v1/quantizations", json=job)
        assert submitted.status_code == 202, submitted.text
        path = f"{server.url}/v1/quantizations/{submitted.json()['id']}/events"
        with httpx.stream("GET", path, headers=server.http.headers, timeout=60) as answer:
            lines.extend(line for line in answer.iter_lines() if line)

    with process(folder, environment, "--models-dir", str(tmp_path), "--admin-key", "adm") as server:
        server.http.headers["authorization"] = "Bearer adm"
        watching = threading.Thread(target=follow, args=(server,))
        watching.start()
        until(lambda: '"status":"running"' in "".join(lines), 60)  # its process will need seconds to begin
        server.popen.terminate()
        watching.join(30)
        assert server.ended(30) == 0
        log = server.popen.stderr.read()
    assert lines[-2] == "event: error"
    assert "shutting down" in json.loads(lines[-1].removeprefix("data: "))["error"]["message"]
    assert "Traceback" not in log
    assert "ERROR" not in log
    assert "(x): interrupted; the next start goes on with it" in log
    assert log.splitlines()[-1].endswith("INFO stopped")


def test_who_waits_for_a_model_is_told_that_the_server_leaves(
    folder: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "other")
    answers: list[httpx.Response] = []

    def load(server: Process) -> None:
        body, key = {"model": "other", "alias": "x"}, {"authorization": "Bearer adm"}
        answers.append(httpx.post(f"{server.url}/v1/models/load", json=body, headers=key, timeout=60))

    with process(folder, environment, "--models-dir", str(tmp_path), "--admin-key", "adm") as server:
        loading = threading.Thread(target=load, args=(server,))
        loading.start()
        until(lambda: len(server.engine_pids()) == 2, 30)  # the second will import torch for seconds
        server.popen.send_signal(signal.SIGINT)
        loading.join(30)
        assert server.ended(30) == 0
        log = server.popen.stderr.read()
    assert answers[0].status_code == 503
    assert "the server is shutting down" in answers[0].json()["error"]["message"]
    assert "Traceback" not in log
    assert "WARNING other as 'x' could not be loaded: the server is shutting down" in log


def test_what_does_not_finish_in_time_ends_with_an_error_event(
    folder: Path, environment: dict[str, str]
) -> None:
    with process(folder, environment, "--drain-delay", "0", "--drain-timeout", "0.3") as server:
        long = Stream(server, 97)
        began = time.monotonic()
        server.popen.terminate()
        lines = long.ended()
        assert "shutting down" in json.loads(lines[-2].removeprefix("data: "))["error"]["message"]
        assert server.ended() == 0
        assert time.monotonic() - began < 5


def test_a_second_signal_exits_now(folder: Path, environment: dict[str, str]) -> None:
    with process(folder, environment, "--drain-delay", "30", "--drain-timeout", "30") as server:
        engines = server.engine_pids()
        assert len(engines) == 1
        server.popen.terminate()
        until(lambda: server.status("/ready") == 503, 5)
        server.popen.terminate()
        assert server.ended(2) == 128 + signal.SIGTERM
        until(lambda: not _alive(engines[0]), 3)


def test_a_server_that_still_loads_lives_and_leaves_at_once(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    with process(write_model(tmp_path / "load-hang"), environment, up="/health") as server:
        assert server.status("/ready") == 503
        assert server.http.post("/v1/completions", json=body(65, 3)).status_code == 503
        assert server.http.post("/tokenize", json={"prompt": "a"}).status_code == 200
        server.popen.terminate()
        assert server.ended(10) == 0


def test_interrupt_at_a_terminal_has_no_delay(folder: Path, environment: dict[str, str]) -> None:
    with process(folder, environment, "--drain-delay", "30") as server:
        server.popen.send_signal(signal.SIGINT)
        assert server.ended(10) == 0


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_engine_dies_with_the_gateway(folder: Path, environment: dict[str, str]) -> None:
    with process(folder, environment) as server:
        engine = server.engine_pids()[0]
        server.popen.kill()
        until(lambda: not _alive(engine), 4)


def test_engine_death_ends_streams_and_is_survived(folder: Path, environment: dict[str, str]) -> None:
    with process(folder, environment) as server:
        streams = [Stream(server, 97) for _ in range(4)]
        until(lambda: all(len(stream.lines) > 1 or stream.lines == ["200"] for stream in streams), 10)
        os.kill(server.engine_pids()[0], signal.SIGKILL)
        for stream in streams:
            assert (
                json.loads(stream.ended()[-2].removeprefix("data: "))["error"]["type"]
                == "service_unavailable"
            )
        until(lambda: server.status("/ready") == 200, 5)
        assert server.http.post("/v1/completions", json=body(65, 3, stream=False)).status_code == 200
        assert "nybble_engine_restarts_total{model_name=" in server.http.get("/metrics").text


def test_three_deaths_end_the_server(folder: Path, environment: dict[str, str]) -> None:
    with process(folder, environment) as server:
        for _ in range(3):
            until(lambda: server.status("/ready") in (200, None), 10)
            assert server.http.post("/v1/completions", json=body(KILL, 3, stream=False)).status_code == 503
        assert server.ended() == 1
        assert "3 times" in server.popen.stderr.read()


def test_a_model_that_cannot_work_is_one_line_and_exit_code_2(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    # The engine itself finds out: fake_engine refuses this folder's name.
    with process(write_model(tmp_path / "config-error"), environment) as server:
        assert server.ended() == 2
        lines = server.popen.stderr.read().splitlines()
        assert server.popen.stdout.read() == ""
    told = [line for line in lines if "cannot work" in line]
    assert told == ["nybble: --model config-error: cannot work; name another"]  # once
    assert "Traceback" not in "".join(lines)
