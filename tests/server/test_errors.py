"""Failures of the engine as clients see them, and the probes."""

import json

import httpx
import openai
import pytest
from gateway_server import GatewayServer
from nybble.engine.errors import EngineDeadError
from nybble.engine.records import SequenceOutput
from nybble.server.gateway import Phase

PATHS = {
    "/v1/completions": {"prompt": "a", "max_tokens": 50},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 50},
}


def kill(server: GatewayServer) -> None:
    server.call(
        lambda: setattr(server.client, "dead", EngineDeadError("the engine died (SIGKILL); try again"))
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("n", [1, 3])
def test_an_error_within_a_stream_is_an_event(server: GatewayServer, path: str, n: int) -> None:
    server.call(lambda: setattr(server.client, "budget", 5))
    with server.http.stream("POST", path, json={**PATHS[path], "n": n, "stream": True}) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        first = next(lines)
        kill(server)
        rest = [line for line in lines if line]
    assert "error" not in json.loads(first.removeprefix("data: "))
    error = json.loads(rest[-2].removeprefix("data: "))["error"]
    assert error["type"] == "service_unavailable"
    assert rest[-1] == "data: [DONE]"
    assert "abort" not in "".join(rest)


def test_openais_client_raises_it(server: GatewayServer, openai_client: openai.OpenAI) -> None:
    server.call(lambda: setattr(server.client, "budget", 2))
    stream = openai_client.completions.create(model="tiny", prompt="a", max_tokens=9, stream=True)
    next(iter(stream))
    kill(server)
    with pytest.raises(openai.APIError, match="died"):
        list(stream)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
def test_death_before_the_first_token_is_503(server: GatewayServer, path: str, stream: bool) -> None:
    kill(server)
    answer = server.post(path, {**PATHS[path], "stream": stream})
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["code"] == "engine_unavailable"


@pytest.mark.parametrize(("refused", "status"), [(True, 400), (False, 500)])
@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_alone_fails(server: GatewayServer, refused: bool, status: int, stream: bool) -> None:
    server.client.error = SequenceOutput(0, [], error="the logits are not finite", refused=refused)
    answer = server.post("/v1/completions", {"prompt": "a", "max_tokens": 1, "stream": stream})
    assert answer.status_code == status
    assert answer.json()["error"]["message"] == "the logits are not finite"
    with server.http.stream(
        "POST", "/v1/completions", json={"prompt": "a", "max_tokens": 5, "stream": True}
    ) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["message"] == "the logits are not finite"


def test_while_the_engine_restarts(server: GatewayServer, openai_client: openai.OpenAI) -> None:
    server.call(server.client.ready.clear)
    try:
        for path, body in PATHS.items():
            assert server.post(path, body).status_code == 503
        with pytest.raises(openai.InternalServerError):
            openai_client.completions.create(model="tiny", prompt="a")
        assert server.get("/ready").status_code == 503
        assert server.get("/health").status_code == 200  # a start is no illness
        assert server.post("/tokenize", {"prompt": "a"}).status_code == 200
        assert "nybble_engine_up" in server.get("/metrics").text
    finally:
        server.call(server.client.ready.set)
    assert server.get("/ready").status_code == 200


def test_health_tells_of_a_hang_and_of_the_end(server: GatewayServer) -> None:
    server.call(lambda: setattr(server.client, "stalled_seconds", 119.0))
    assert server.get("/health").status_code == 200
    server.call(lambda: setattr(server.client, "stalled_seconds", 121.0))
    answer = server.get("/health")
    assert answer.status_code == 503
    assert "121 s" in answer.json()["error"]["message"]
    server.call(lambda: setattr(server.client, "stalled_seconds", 0.0))
    server.call(server.client.gave_up.set)
    try:
        assert server.get("/health").status_code == 503
    finally:
        server.call(server.client.gave_up.clear)
    assert server.get("/health").status_code == 200


def test_draining_and_closed(server: GatewayServer) -> None:
    try:
        server.call(lambda: setattr(server.gateway, "phase", Phase.DRAINING))
        assert server.get("/ready").status_code == 503
        assert server.post("/v1/completions", PATHS["/v1/completions"]).status_code == 200
        server.call(lambda: setattr(server.gateway, "phase", Phase.CLOSED))
        assert server.post("/v1/completions", PATHS["/v1/completions"]).status_code == 503
        assert server.get("/health").status_code == 200
        assert server.get("/metrics").status_code == 200
    finally:
        server.call(lambda: setattr(server.gateway, "phase", Phase.SERVING))


def test_a_bug_is_a_500_without_its_details(server: GatewayServer, caplog: pytest.LogCaptureFixture) -> None:
    def broken(prompt: object, params: object) -> list[list[int]]:
        raise ZeroDivisionError("secret detail")

    server.client.script = broken
    answer = server.post("/v1/completions", {"prompt": "a"})
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text
    server.wait(lambda: "secret detail" in caplog.text)  # the log has it
    assert server.gateway.admission.sequences == 0


def test_head_of_the_probes(server: GatewayServer) -> None:
    for path in ("/health", "/ready", "/metrics", "/version", "/v1/models"):
        answer = server.http.head(path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_every_response_is_json_but_metrics_and_streams(server: GatewayServer) -> None:
    for path in ("/health", "/ready", "/version", "/v1/models", "/v1/models/tiny", "/nope", "/openapi.json"):
        assert server.get(path).headers["content-type"] == "application/json"
    answer = server.post("/v1/completions", {"prompt": "a", "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert isinstance(answer, httpx.Response)
    assert answer.headers["x-request-id"].startswith("cmpl-")
