"""The worker process over its bare socket, with a fake engine; its gateway is this test."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from nybble.engine.errors import RequestError
from nybble.engine.messages import (
    FRAME_HEADER,
    Abort,
    Add,
    Failed,
    Progress,
    Ready,
    StepDone,
    Stop,
    body_length,
    decode_from_engine,
    encode,
)
from nybble.engine.records import EngineRequest, EngineStats, SamplingParams, SequenceOutput
from nybble.engine.worker import serve

HERE = str(Path(__file__).parent)
SLOW, HANG = 9001, 9004


class Gateway:
    def __init__(self, connection, process):
        self.connection = connection
        self.process = process
        self.stream = connection.makefile("rb")

    def send(self, message):
        self.connection.sendall(encode(message))

    def receive(self):
        return decode_from_engine(self.stream.read(body_length(self.stream.read(FRAME_HEADER.size))))

    def until(self, kind):
        while not isinstance(message := self.receive(), kind):
            pass
        return message

    def hang_up(self):
        self.stream.close()
        self.connection.close()


@contextmanager
def worker(model="fake", prefix=(), config=None, **options):
    ours, theirs = socket.socketpair()
    config = config or f'{{"model": "{model}"}}'
    command = [*prefix, sys.executable, "-P", "-m", "nybble.engine.worker"]
    arguments = ["--fd", str(theirs.fileno()), "--config", config, "--factory", "fake_engine:build"]
    process = subprocess.Popen(
        command + arguments, pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": HERE}, **options
    )
    theirs.close()
    gateway = Gateway(ours, process)
    try:
        yield gateway
    finally:
        gateway.hang_up()
        process.kill()
        process.wait()


def request(request_id, *tokens, max_tokens=10_000):
    return EngineRequest(request_id, list(tokens), SamplingParams(max_tokens))


def test_load_then_one_message_a_step():
    with worker() as gateway:
        assert gateway.receive() == Progress("load", 1, 2, "half of it")
        assert gateway.receive() == Progress("load", 2, 2)
        assert isinstance(gateway.receive(), Ready)
        gateway.send(Add([request(1, 5, 6, max_tokens=2), request(2, 7, max_tokens=1)]))
        first = gateway.receive()
        assert first.outputs == [SequenceOutput(1, [5]), SequenceOutput(2, [7], finish_reason="length")]
        assert first.stats.num_running == 1
        assert gateway.receive().outputs == [SequenceOutput(1, [6], finish_reason="length")]


def test_abort_is_answered_with_new_stats():
    with worker() as gateway:
        gateway.until(Ready)
        gateway.send(Add([request(1, SLOW)]))
        assert gateway.until(StepDone).stats.num_running == 1
        gateway.send(Abort([1, 99]))
        while gateway.until(StepDone).stats.num_running:
            pass


def test_idle_worker_sleeps():
    with worker() as gateway:
        gateway.until(Ready)
        before = cpu_seconds(gateway.process.pid)
        time.sleep(1.0)
        assert cpu_seconds(gateway.process.pid) - before <= 0.01


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("model", ["fake", "load-hang"])
def test_leaves_when_told(model):
    with worker(model) as gateway:
        gateway.until(Progress if model == "load-hang" else Ready)
        gateway.send(Stop())
        assert gateway.process.wait(2) == 0


@pytest.mark.parametrize("when", ["loading", "idle", "computing", "hung"])
def test_leaves_with_its_gateway(when):
    with worker("load-hang" if when == "loading" else "fake") as gateway:
        gateway.until(Progress if when == "loading" else Ready)
        if when in ("computing", "hung"):
            gateway.send(Add([request(1, SLOW if when == "computing" else HANG)]))
            time.sleep(0.1)
        gateway.hang_up()
        assert gateway.process.wait(2) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_dies_with_its_parent_even_if_the_socket_lives(tmp_path):
    """The parent is a shell that is killed; this test keeps the other end of the socket open."""
    pid_file = tmp_path / "pid"
    shell = ["sh", "-c", f'"$@" & echo $! > {pid_file}; wait', "sh"]
    with worker(prefix=shell) as gateway:
        gateway.until(Ready)
        gateway.process.kill()
        pid = int(pid_file.read_text())
        deadline = time.monotonic() + 2
        while running(pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_ignores_signals_that_are_the_gateways_to_judge():
    with worker() as gateway:
        gateway.until(Ready)
        gateway.process.send_signal(signal.SIGINT)
        gateway.process.send_signal(signal.SIGTERM)
        gateway.send(Add([request(1, 5, max_tokens=1)]))
        assert gateway.receive().outputs[0].token_ids == [5]


@pytest.mark.parametrize(
    ("model", "failed", "code", "words"),
    [
        ("config-error", Failed("--model config-error: cannot work; name another", True), 2, None),
        ("load-crash", Failed("OSError: the disk is on fire", False), 1, "Traceback"),
    ],
)
def test_failure_to_load(model, failed, code, words):
    with worker(model, stderr=subprocess.PIPE, text=True) as gateway:
        assert gateway.until(Failed) == failed
        err = gateway.process.communicate(timeout=5)[1]
        assert gateway.process.returncode == code
        assert ("Traceback" in err) == (words is not None)


def test_config_is_checked():
    with worker(config='{"model": "fake", "lag": 7}', stderr=subprocess.PIPE) as gateway:
        assert gateway.until(Failed) == Failed("--lag 7: use 0 or 1", True)
        assert gateway.process.communicate(timeout=5) == (None, b"")
        assert gateway.process.returncode == 2


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", FRAME_HEADER.pack(3) + b"abc"])
def test_garbage_from_the_gateway_ends_the_worker(garbage):
    with worker(stderr=subprocess.PIPE, text=True) as gateway:
        gateway.until(Ready)
        gateway.connection.sendall(garbage)
        err = gateway.process.communicate(timeout=5)[1]
        assert gateway.process.returncode == 1
        assert "no message" in err


class Script:
    """An engine for serve() in this thread. It refuses odd ids and ends all others in one step."""

    def __init__(self):
        self.ids = []

    @property
    def has_work(self):
        return bool(self.ids)

    def add(self, new):
        if new.request_id % 2:
            raise RequestError(f"{new.request_id} is odd")
        self.ids.append(new.request_id)

    def abort(self, request_id):
        self.ids.remove(request_id)

    def step(self):
        done, self.ids = self.ids, []
        return [SequenceOutput(request_id, [1], finish_reason="stop") for request_id in done]

    def stats(self):
        return EngineStats(0, len(self.ids), 0, 0, 0.0, 0, 0, 0, 0, 0)


class ScriptedChannel:
    def __init__(self, batches):
        self.batches = list(batches)
        self.waits = []
        self.sent = []

    def receive(self, wait):
        self.waits.append(wait)
        yield from self.batches.pop(0)  # IndexError ends the test's serve()

    def send(self, message):
        self.sent.append(message.outputs)


def test_each_request_gets_exactly_one_ending():
    channel = ScriptedChannel([[Add([request(i, 1) for i in range(4)]), Abort([2])], [Add([request(4, 1)])]])
    with pytest.raises(IndexError):
        serve(Script(), channel)
    assert channel.sent == [
        [
            SequenceOutput(1, [], finish_reason="error", error="1 is odd", refused=True),
            SequenceOutput(3, [], finish_reason="error", error="3 is odd", refused=True),
            SequenceOutput(0, [1], finish_reason="stop"),
        ],
        [SequenceOutput(4, [1], finish_reason="stop")],
    ]
    assert channel.waits == [True, True, True]
