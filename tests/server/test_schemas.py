"""Whatever comes in: a 4xx with OpenAI's error body, and the server goes on."""

import contextlib
import json
import socket
from typing import Any

import httpx
import openai
import pytest
from fake_client import VOCAB
from gateway_server import GatewayServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nybble.server import wire

COMPLETION = {"prompt": "a", "max_tokens": 2}
CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
ROUTES = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}
HUGE = 10**400


def refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert "\n" not in error["message"]
    return error


# Every numeric field with values outside its range; each also meets NaN, infinities, wrong types below.
OUT_OF_RANGE: dict[str, list[Any]] = {
    "temperature": [-0.1, 2.1],
    "top_p": [0, -1, 1.01],
    "top_k": [-2, 2**31],
    "min_p": [-0.01, 1.01],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "repetition_penalty": [0, -1, 101],
    "n": [0, -1, 129],
    "max_tokens": [-1, 257, 2**31],
    "min_tokens": [-1, 3],
    "seed": [2**63, -(2**63) - 1],
}
INTEGERS = ("top_k", "n", "max_tokens", "min_tokens", "seed")
CASES = [(field, value) for field, values in OUT_OF_RANGE.items() for value in values]
CASES += [(field, bad) for field in OUT_OF_RANGE for bad in ("1", [], {}, True, HUGE, -HUGE, [1])]
CASES += [(field, 1.5) for field in INTEGERS]
CASES += [
    ("stop", ""),
    ("stop", [""]),
    ("stop", list("abcde")),
    ("stop", [1]),
    ("stop", 5),
    ("stop", "x" * 1025),
    ("stop_token_ids", [VOCAB]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", 3),
    ("stop_token_ids", [1.0]),
    ("logit_bias", {str(VOCAB): 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"1": HUGE}),
    ("logit_bias", {"1": True}),
    ("logit_bias", {"1" * 5000: 1}),
    ("logit_bias", [1]),
    ("stream", "yes"),
    ("stream", 1),
    ("stream_options", {"include_usage": 1}),
    ("stream_options", {"surprise": True}),
    ("stream_options", 1),
    ("cache_salt", "x" * 257),
    ("ignore_eos", 1),
    ("skip_special_tokens", "no"),
    ("model", 1),
    ("surprise", 0),
]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(("field", "value"), CASES, ids=lambda value: str(value)[:24])
def test_a_bad_value_is_refused_by_name(server: GatewayServer, path: str, field: str, value: Any) -> None:
    error = refused(server.post(path, {**ROUTES[path], field: value}))
    assert error["param"].startswith(field)
    assert server.client.submitted == []


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("field", [*OUT_OF_RANGE, "logprobs"])
def test_numbers_that_are_none(server: GatewayServer, field: str, number: str) -> None:
    body = f'{{"prompt": "a", "{field}": {number}}}'
    refused(server.post("/v1/completions", content=body, headers={"content-type": "application/json"}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("logprobs", 21), ("logprobs", -1), ("logprobs", True), ("echo", 1), ("max_tokens", 0), ("prompt", None)]
    + [("prompt", value) for value in (5, {}, [], [[]], [1, "a"], ["a", 1], [[1], "a"], [1.0], [True], [-1])]
    + [("prompt", value) for value in ([VOCAB], [[1], [VOCAB]], [[2**40]], [HUGE], [None], [[[1]]])]
    + [("prompt", [1] * 257), ("prompt", "a b " * 200), ("prompt", "x" * 100_000), ("best_of", 3)]
    + [("suffix", "x"), ("tools", [1]), ("guided_json", {"a": 1}), ("use_beam_search", True)],
    ids=lambda value: str(value)[:24],
)
def test_bad_completions(server: GatewayServer, field: str, value: Any) -> None:
    refused(server.post("/v1/completions", {**COMPLETION, field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("logprobs", 1), ("logprobs", "yes"), ("top_logprobs", 21), ("top_logprobs", 3), ("max_tokens", 0)]
    + [("max_completion_tokens", value) for value in (0, -1, 257, 1.5)]
    + [("messages", value) for value in (None, [], "hi", [1], [{}], [{"role": "user", "content": 3}], {})]
    + [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [1]),
        ("audio", {"a": 1}),
    ]
    + [("response_format", {"type": "json_object"}), ("modalities", ["audio"]), ("chat_template", "{{ 1 }}")]
    + [("chat_template_kwargs", 5), ("reasoning_effort", "enormous"), ("echo", True), ("verbosity", "low")],
    ids=lambda value: str(value)[:24],
)
def test_bad_chats(server: GatewayServer, field: str, value: Any) -> None:
    refused(server.post("/v1/chat/completions", {**CHAT, field: value}))


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b'"text"',
        b'{"prompt": "a",}',
        b"\xff\xfe{}",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": ' + b"9" * 10_000 + b"}",
        b"[" * 100_000,
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"messages": ' + b'[{"content":' * 50_000,
        b"prompt=a",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_bodies_that_are_no_json_object(server: GatewayServer, path: str, body: bytes) -> None:
    refused(server.post(path, content=body, headers={"content-type": "application/json"}))
    assert server.get("/health").status_code == 200


def test_other_media_types(server: GatewayServer) -> None:
    body = json.dumps(COMPLETION)
    for media_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        refused(server.post("/v1/completions", content=body, headers={"content-type": media_type}), 415)
    for media_type in ("application/json; charset=utf-8", "Application/JSON", "application/vnd.x+json"):
        answer = server.post("/v1/completions", content=body, headers={"content-type": media_type})
        assert answer.status_code == 200
    assert server.post("/v1/completions", content=body).status_code == 200  # none stated


def test_a_body_beyond_the_limit(server: GatewayServer) -> None:
    limit = server.gateway.settings.max_body_size

    def chunks() -> Any:
        for _ in range(limit // (1 << 20) + 2):
            yield b"x" * (1 << 20)

    headers = {"content-type": "application/json"}
    # The server may close before all of it is sent; then there is no answer to read.
    for content in (b"x" * (limit + 1), chunks()):
        try:
            refused(server.post("/v1/completions", content=content, headers=headers), 413)
        except httpx.TransportError:
            continue
    assert server.get("/health").status_code == 200


@pytest.mark.parametrize(
    "extra",
    [
        {f"field{index}": index for index in range(300)},
        {"messages": [{"role": "user", "content": "a"}] * 20_000},
        {"messages": [{f"field{index}": index for index in range(300)}]},
        {"logit_bias": {str(index): 0 for index in range(300_000)}},
        {"stop_token_ids": [1] * 2000},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_too_much_of_anything(server: GatewayServer, extra: dict[str, Any]) -> None:
    refused(server.post("/v1/chat/completions", {**CHAT, **extra}))
    refused(server.post("/v1/completions", {"prompt": [5] * 1_100_000}))


def test_a_body_that_never_arrives(server: GatewayServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_BODY_SECONDS", 0.1)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 408")


def test_headers_beyond_the_limit(server: GatewayServer) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\na: " + b"x" * 80_000)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 400")
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1 << 16) == b""
    assert server.get("/health").status_code == 200


def test_unknown_routes_methods_and_models(server: GatewayServer, openai_client: openai.OpenAI) -> None:
    assert refused(server.get("/nope"), 404)["code"] == "not_found"
    refused(server.get("/v1/completions"), 405)
    refused(server.post("/health"), 405)
    for path, body in ROUTES.items():
        error = refused(server.post(path, {**body, "model": "gpt-4"}), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        openai_client.models.retrieve("gpt-4")


NOTHING: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"best_of": 1, "suffix": "", "use_beam_search": False, "response_format": {"type": "text"}},
        {"best_of": 2, "n": 2, "user": 7, "metadata": {"a": [1]}, "priority": 3, "request_id": "x"},
        dict.fromkeys(["temperature", "n", "stop", "logprobs", "surprise", "echo", "stream"]),
        {"stop": [], "logit_bias": {}, "stop_token_ids": [], "guided_json": None, "bad_words": []},
        {"stream_options": {"include_usage": None}},
    ],
    "/v1/chat/completions": [
        {"tools": [], "tool_choice": "auto", "functions": [], "verbosity": "medium"},
        {"tools": [{"a": 1}], "tool_choice": "none", "modalities": ["text"], "store": True},
        {"response_format": {"type": "text"}, "reasoning_effort": "low", "audio": None},
        {"service_tier": "auto", "prediction": {"type": "content"}, "user": "me"},
        {"logprobs": False, "top_logprobs": 0, "parallel_tool_calls": True},
    ],
}


@pytest.mark.parametrize(("path", "extra"), [(path, extra) for path in NOTHING for extra in NOTHING[path]])
def test_what_changes_nothing_passes(server: GatewayServer, path: str, extra: dict[str, Any]) -> None:
    answer = server.post(path, {**ROUTES[path], **extra})
    assert answer.status_code == 200, answer.text


def test_a_prompt_that_just_fits(server: GatewayServer) -> None:
    assert server.post("/v1/completions", {"prompt": [5] * 255, "max_tokens": 1}).status_code == 200
    error = refused(server.post("/v1/completions", {"prompt": [5] * 256, "max_tokens": 1}))
    assert error["code"] == "context_length_exceeded"
    # The default of 16 gives way to what is left.
    assert server.post("/v1/completions", {"prompt": [5] * 250}).json()["usage"]["completion_tokens"] == 6


def test_fan_out_is_limited(server: GatewayServer) -> None:
    refused(server.post("/v1/completions", {"prompt": ["a"] * 1025}))
    refused(server.post("/v1/completions", {"prompt": ["a"] * 9, "n": 128}))
    refused(server.post("/v1/completions", {"prompt": ["a"] * 1000}))  # 64 + 256 is all that can be inside


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = [
    *OUT_OF_RANGE,
    "prompt",
    "messages",
    "stop",
    "logit_bias",
    "logprobs",
    "stream_options",
    "model",
    "tools",
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(sorted(ROUTES)), fields=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3)
)
def test_any_json_is_answered(server: GatewayServer, path: str, fields: dict[str, Any]) -> None:
    answer = server.post(path, {**ROUTES[path], **fields})
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        refused(answer, answer.status_code)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from([*ROUTES, "/tokenize", "/detokenize"]), body=st.binary(max_size=64))
def test_any_bytes_are_answered(server: GatewayServer, path: str, body: bytes) -> None:
    refused(server.post(path, content=body, headers={"content-type": "application/json"}))
