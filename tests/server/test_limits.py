"""The bounded queue, and clients that leave."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fake_client import FakeClient
from gateway_server import GatewayServer, running
from nybble.engine.errors import OverloadedError, RequestError
from nybble.server.limits import Admission


@pytest.fixture
def small(folder: Path) -> Iterator[GatewayServer]:
    """Room for two running and two waiting sequences, 100 waiting tokens; its engine waits to be let go."""
    client = FakeClient()
    client.budget = 0
    options = {"max_num_seqs": 2, "max_queued_requests": 2, "max_queued_tokens": 100}
    with running(folder, client, **options) as server:
        yield server
        server.call(lambda: setattr(client, "budget", None))
        server.wait(lambda: server.gateway.admission.sequences == 0)


Background = tuple[threading.Thread, list[httpx.Response]]


def in_background(server: GatewayServer, body: dict[str, Any]) -> Background:
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", body)))
    thread.start()
    return thread, answers


def test_a_full_queue_is_429_with_retry_after(small: GatewayServer) -> None:
    threads = [in_background(small, {"prompt": "a", "max_tokens": 2}) for _ in range(4)]
    small.wait(lambda: len(small.client.submitted) == 4)
    assert small.get("/ready").status_code == 503
    assert small.get("/health").status_code == 200
    answer = small.post("/v1/completions", {"prompt": "a"})
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["code"] == "queue_full"
    with openai.OpenAI(base_url=f"{small.url}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="tiny", prompt="a")
        small.call(lambda: setattr(small.client, "budget", None))
        for thread, answers in threads:
            thread.join(10)
            assert answers[0].status_code == 200
        assert client.completions.create(model="tiny", prompt="a").choices
    assert small.get("/ready").status_code == 200


def test_openais_client_retries_until_there_is_room(small: GatewayServer) -> None:
    threads = [in_background(small, {"prompt": "a", "max_tokens": 2}) for _ in range(4)]
    small.wait(lambda: len(small.client.submitted) == 4)
    threading.Timer(0.3, lambda: small.call(lambda: setattr(small.client, "budget", None))).start()
    with openai.OpenAI(base_url=f"{small.url}/v1", api_key="x", max_retries=3) as client:
        assert client.completions.create(model="tiny", prompt="a").choices
    for thread, _ in threads:
        thread.join(10)


def test_waiting_tokens_are_limited_too(small: GatewayServer) -> None:
    thread, _ = in_background(small, {"prompt": [5] * 200, "max_tokens": 1})  # alone it may exceed the limit
    small.wait(lambda: len(small.client.submitted) == 1)
    assert small.post("/v1/completions", {"prompt": [5]}).status_code == 429
    small.call(lambda: setattr(small.client, "budget", None))
    thread.join(10)


def test_more_sequences_than_fit_at_all_is_400(small: GatewayServer) -> None:
    answer = small.post("/v1/completions", {"prompt": "a", "n": 5})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "n"


def test_admission_counts_to_zero() -> None:
    admission = Admission(2, 2, 100)
    permits = [admission.admit([30]), admission.admit([30, 30])]
    with pytest.raises(OverloadedError):
        admission.admit([30])
    permits[0].started(0)
    assert admission.waiting_tokens == 60
    permits[1].ended(1)
    assert (admission.sequences, admission.waiting_tokens) == (2, 30)
    with pytest.raises(RequestError):
        admission.admit([1] * 5)
    for permit in [*permits, *permits]:
        permit.close()
    assert (admission.requests, admission.sequences, admission.waiting_tokens) == (0, 0, 0)


# --- clients that leave


def connect(server: GatewayServer, body: dict[str, Any]) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("messages", [0, 7])  # gone while it waits, or in the middle
def test_a_disconnect_aborts(server: GatewayServer, stream: bool, copies: int, messages: int) -> None:
    server.call(lambda: setattr(server.client, "budget", messages))
    connection = connect(server, {"prompt": "abc", "max_tokens": 100, "stream": stream, "n": copies})
    server.wait(lambda: len(server.client.submitted) == copies and server.client.budget == 0)
    if stream and messages:
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
    assert server.client.aborted == []
    connection.close()
    server.wait(lambda: len(server.client.aborted) == copies)
    server.wait(lambda: server.gateway.admission.requests == 0)


def test_a_disconnect_does_not_disturb_others(server: GatewayServer) -> None:
    server.call(lambda: setattr(server.client, "step_seconds", 0.005))
    connection = connect(server, {"prompt": "abc", "max_tokens": 200, "stream": True})
    with server.http.stream(
        "POST", "/v1/completions", json={"prompt": "xyz", "max_tokens": 30, "stream": True}
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        connection.close()
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    server.wait(lambda: len(server.client.aborted) == 1)


def test_a_client_that_does_not_read_holds_nobody_up(server: GatewayServer) -> None:
    slow = connect(server, {"prompt": [5] * 20, "max_tokens": 230, "stream": True, "n": 128, "logprobs": 20})
    time.sleep(0.1)
    assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 5}).status_code == 200
    slow.close()
    server.wait(lambda: server.gateway.admission.requests == 0)
