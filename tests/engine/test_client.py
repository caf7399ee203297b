"""The client against a real worker process with a fake engine (fake_engine.py), so without torch."""

import ast
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from nybble.engine.client import EngineClient, _merge
from nybble.engine.config import EngineConfig
from nybble.engine.errors import ConfigError, EngineDeadError, EngineError
from nybble.engine.records import SamplingParams, SequenceOutput, TokenLogprobs

HERE = str(Path(__file__).parent)
SLOW, CRASH, KILL, HANG, REFUSE, SEGFAULT = 9001, 9002, 9003, 9004, 9005, 9006


@pytest.fixture(autouse=True)
def _fake_engine_on_the_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", HERE)


def make_client(model="fake", **options):
    config = options.pop("config", EngineConfig(model))
    return EngineClient(config, worker_args=["--factory", "fake_engine:build"], **options)


@contextlib.asynccontextmanager
async def running(model="fake", **options):
    client = make_client(model, **options)
    await client.start()
    try:
        await asyncio.wait_for(client.wait_ready(), 20)
        yield client
    finally:
        await client.stop()


async def collect(stream):
    """(all token ids, last output)."""
    tokens, last = [], None
    async for output in stream:
        tokens += output.token_ids
        last = output
    return tokens, last


async def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_requests_get_their_own_outputs():
    stats, lines = [], []
    async with running(on_stats=stats.append, on_log=lines.append) as client:
        assert client.state == "ready"
        assert client.info.architecture == "Fake"
        assert lines == ["half of it"]
        assert (client.progress.phase, client.progress.done, client.progress.total) == ("load", 2, 2)
        streams = [client.submit([i, i + 1000], SamplingParams(5)) for i in range(1, 51)]
        assert client.outstanding == 50
        for i, (tokens, last) in enumerate(await asyncio.gather(*map(collect, streams)), 1):
            assert tokens == [i, i + 1000, i, i + 1000, i]
            assert last.finish_reason == "length"
        assert client.outstanding == 0
        assert client.seconds_since_progress() == 0.0
        assert client.stats == stats[-1]
        assert stats[-1].generation_tokens == 250
    assert client.state == "stopped"


async def test_slow_consumer_gets_merged_outputs():
    async with running() as client:
        stream = client.submit([1, 2, 3], SamplingParams(90))
        await until(lambda: client.outstanding == 0)
        outputs = [output async for output in stream]
        assert len(outputs) == 1
        assert outputs[0].token_ids == [1, 2, 3] * 30
        assert outputs[0].finish_reason == "length"


def test_merging_keeps_everything():
    logprobs = [TokenLogprobs(i, -1.0, [], []) for i in range(3)]
    first = SequenceOutput(
        1, [0], [logprobs[0]], prompt_logprobs=[None], num_cached_tokens=16, queued_seconds=0.5
    )
    then = SequenceOutput(1, [1, 2], logprobs[1:], finish_reason="stop", stop_token_id=7, error="e")
    assert _merge(first, then) == SequenceOutput(
        1, [0, 1, 2], logprobs, [None], "stop", 7, "e", num_cached_tokens=16, queued_seconds=0.5
    )
    assert _merge(SequenceOutput(1, [0]), SequenceOutput(1, [1])).logprobs is None


async def test_abort_ends_the_request_on_both_sides():
    async with running() as client:
        stream = client.submit([SLOW], SamplingParams(10_000))
        await anext(stream)
        stream.abort()
        stream.abort()
        assert [output async for output in stream] == []
        assert client.outstanding == 0
        await until(lambda: client.stats.num_running == 0)


async def test_cancelled_consumer_aborts():
    async with running() as client:
        task = asyncio.create_task(collect(client.submit([SLOW], SamplingParams(10_000))))
        await until(lambda: client.stats is not None)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert client.outstanding == 0
        await until(lambda: client.stats.num_running == 0)


async def test_closing_aborts():
    async with running() as client:
        async with contextlib.aclosing(client.submit([SLOW], SamplingParams(10_000))) as stream:
            await anext(stream)
        assert client.outstanding == 0


async def test_refused_request_harms_nobody():
    async with running() as client:
        good, bad = client.submit([SLOW, 1], SamplingParams(4)), client.submit([REFUSE], SamplingParams(4))
        (tokens, _), (none, last) = await asyncio.gather(collect(good), collect(bad))
        assert tokens == [SLOW, 1, SLOW, 1]
        assert (none, last.finish_reason, last.error) == ([], "error", "refused by the fake")
        assert last.refused


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (CRASH, "ZeroDivisionError: asked to crash"),
        (KILL, "killed by SIGKILL"),
        (SEGFAULT, "killed by SIGSEGV"),
    ],
)
async def test_death_ends_every_stream_and_restarts(command, words):
    lines = []
    async with running(on_log=lines.append) as client:
        pid = client.pid
        streams = [client.submit([SLOW], SamplingParams(10_000)) for _ in range(16)]
        first = [await anext(stream) for stream in streams]
        assert all(output.token_ids for output in first)
        killer = client.submit([command], SamplingParams(5))
        began = time.monotonic()
        for stream in [*streams, killer]:
            with pytest.raises(EngineDeadError, match=words):
                await collect(stream)
        assert client.outstanding == 0
        assert client.state != "ready"
        with pytest.raises(EngineError, match="loading"):
            client.submit([1], SamplingParams(1))
        await client.wait_ready()
        assert await collect(client.submit([7], SamplingParams(2))) == ([7, 7], client_last(7))
        assert time.monotonic() - began < 5
        assert client.restarts == 1
        assert client.pid != pid
        assert any(words in line for line in lines)
        assert not client.gave_up.is_set()


def client_last(token):
    class Last:
        def __eq__(self, output):
            return output.token_ids[-1] == token and output.finish_reason == "length"

    return Last()


async def test_three_deaths_give_up():
    async with running() as client:
        for _ in range(3):
            await client.wait_ready()
            os.kill(client.pid, signal.SIGKILL)
            await until(lambda: not client.ready.is_set())
        await asyncio.wait_for(client.gave_up.wait(), 10)
        assert client.state == "dead"
        assert client.restarts == 2
        assert "3 times" in str(client.failure)
        with pytest.raises(EngineDeadError, match="3 times within 300 s"):
            await client.wait_ready()
        with pytest.raises(EngineError, match="dead"):
            client.submit([1], SamplingParams(1))


async def test_deaths_long_ago_do_not_count(monkeypatch):
    monkeypatch.setattr("nybble.engine.client.DEATH_WINDOW", 0.05)
    async with running() as client:
        for death in range(4):
            await client.wait_ready()
            os.kill(client.pid, signal.SIGKILL)
            await until(lambda death=death: client.restarts == death + 1)
        await client.wait_ready()


async def test_config_error_is_not_retried():
    client = make_client("config-error")
    await client.start()
    with pytest.raises(ConfigError) as caught:
        await asyncio.wait_for(client.wait_ready(), 10)
    assert caught.value.message == "--model config-error: cannot work; name another"
    assert client.gave_up.is_set()
    assert (client.state, client.restarts) == ("dead", 0)
    await client.stop()


async def test_crash_at_load_is_retried_then_given_up(capfd):
    client = make_client("load-crash")
    await client.start()
    with pytest.raises(EngineDeadError, match="OSError: the disk is on fire"):
        await asyncio.wait_for(client.wait_ready(), 20)
    assert client.restarts == 2
    await client.stop()
    assert capfd.readouterr().err.count("OSError: the disk is on fire") == 3  # the tracebacks


async def test_hung_engine_is_killed_and_restarted():
    async with running(watchdog_seconds=1.0) as client:
        await asyncio.sleep(1.3)  # idle is not hung
        assert client.restarts == 0
        began = time.monotonic()
        with pytest.raises(EngineDeadError, match=r"no step for 1 s"):
            await collect(client.submit([HANG], SamplingParams(1)))
        assert time.monotonic() - began < 5
        await client.wait_ready()
        assert (await collect(client.submit([1], SamplingParams(1))))[0] == [1]


async def test_progress_is_measured():
    async with running() as client:
        assert client.seconds_since_progress() == 0.0
        stream = client.submit([HANG], SamplingParams(1))
        await asyncio.sleep(0.2)
        assert 0.15 < client.seconds_since_progress() < 5
        stream.abort()
        assert client.seconds_since_progress() == 0.0


async def test_stop_ends_streams_and_process():
    async with running() as client:
        stream, pid = client.submit([SLOW], SamplingParams(10_000)), client.pid
        await anext(stream)
        await client.stop()
        with pytest.raises(EngineError, match="shutting down"):
            await collect(stream)
        assert not alive(pid)
        with pytest.raises(EngineError, match="shutting down"):
            client.submit([1], SamplingParams(1))


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.3])
async def test_stop_while_loading(seconds):
    client = make_client("load-hang")
    await client.start()
    await asyncio.sleep(seconds)
    waiting = asyncio.create_task(client.wait_ready())
    await asyncio.sleep(0)
    began = time.monotonic()
    await client.stop(timeout=3)
    assert time.monotonic() - began < 3
    with pytest.raises(EngineError, match="stopped"):
        await waiting
    assert client.pid is None


async def test_stop_kills_an_engine_that_does_not_listen():
    async with running() as client:
        pid = client.pid
        os.kill(pid, signal.SIGSTOP)
        await client.stop(timeout=0.2)
        assert not alive(pid)


async def test_submit_before_start():
    with pytest.raises(EngineError, match="loading"):
        make_client().submit([1], SamplingParams(1))


async def test_large_messages_do_not_stall():
    """A megabyte each way while the engine is busy: a blocking pipe would stop the event loop."""
    async with running() as client:
        client.submit([SLOW], SamplingParams(10_000))
        began = time.monotonic()
        streams = [client.submit([i] * 200_000, SamplingParams(1)) for i in range(1, 6)]
        assert time.monotonic() - began < 3
        assert [(await collect(stream))[0] for stream in streams] == [[i] for i in range(1, 6)]


async def test_thread_environment(monkeypatch):
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    async with running(config=EngineConfig("fake", num_threads=3)) as client:
        assert ast.literal_eval(client.info.kernel) == {
            "OMP_NUM_THREADS": "3",
            "OMP_WAIT_POLICY": "PASSIVE",
            "GOMP_SPINCOUNT": "0",
        }
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    async with running() as client:
        assert ast.literal_eval(client.info.kernel) == {
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "ACTIVE",
            "GOMP_SPINCOUNT": "0",
        }


async def test_callback_that_fails_is_not_hidden():
    def fail(stats):
        raise ZeroDivisionError("in the metrics")

    client = make_client(on_stats=fail)
    await client.start()
    await client.wait_ready()
    pid = client.pid
    stream = client.submit([1], SamplingParams(50))
    with pytest.raises(EngineError):
        await collect(stream)
    assert client.gave_up.is_set()
    assert "in the metrics" in str(client.failure)
    with pytest.raises(ZeroDivisionError):
        await client.stop()
    assert not alive(pid)


def test_uvloop():
    uvloop = pytest.importorskip("uvloop")

    async def run():
        async with running() as client:
            os.kill(client.pid, signal.SIGKILL)
            await until(lambda: client.restarts == 1)
            await client.wait_ready()
            return await collect(client.submit([4, 5], SamplingParams(3)))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(run())[0] == [4, 5, 4]


def test_client_needs_no_torch():
    code = (
        "import sys, nybble.engine.client, nybble.engine.tokenizer, nybble.engine.detokenizer, "
        "nybble.engine.chat_template; "
        "heavy = ('torch', 'numpy', 'transformers', 'numba', 'huggingface_hub', 'pydantic'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    command = [sys.executable, "-P", "-c", code]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"[]\n"
