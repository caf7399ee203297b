"""API keys: every route needs one but the probes."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from gateway_server import GatewayServer, running

KEY, OTHER = "sk-first-ключ", "sk-second"


@pytest.fixture(scope="module")
def guarded(folder: Path) -> Iterator[GatewayServer]:
    with running(folder, api_key=[KEY, OTHER]) as server:
        yield server


def bearer(key: str) -> dict[bytes, bytes]:
    return {b"authorization": b"Bearer " + key.encode()}


def all_routes(server: GatewayServer) -> list[tuple[str, str]]:
    """(path, method) of everything that the application routes, its own documentation included."""
    app = server.app
    while not hasattr(app, "routes"):
        app = app._app
    found = [(route.path, method) for route in app.routes for method in sorted(route.methods)]
    assert {"/v1/completions", "/metrics", "/health", "/openapi.json"} <= {path for path, _ in found}
    return [(path.replace("{model_id:path}", "tiny"), method) for path, method in found]


def test_every_route_but_the_probes_needs_a_key(guarded: GatewayServer) -> None:
    for path, method in all_routes(guarded):
        answer = guarded.http.request(method, path)
        if path in ("/health", "/ready"):
            assert answer.status_code == 200, path
            continue
        assert answer.status_code == 401, (path, method)
        assert answer.headers["www-authenticate"] == "Bearer"
        if method != "HEAD":
            assert answer.json()["error"]["code"] == "invalid_api_key"
        answer = guarded.http.request(method, path, headers=bearer(OTHER))
        if answer.status_code == 403:
            assert "admin key" in answer.json()["error"]["message"], path
        else:
            assert answer.status_code != 401, path


ALMOST_OPEN = [
    "/nope",
    "//health",
    "/health/",
    "/health/../metrics",
    "/ready/../v1/models",
    "/health%2f",
    "/HEALTH",
]


@pytest.mark.parametrize("path", ALMOST_OPEN)
def test_paths_that_are_not_quite_open(guarded: GatewayServer, path: str) -> None:
    assert guarded.get(path).status_code == 401


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"Bearer",
        b"Basic " + KEY.encode(),
        KEY.encode(),
        b"Bearer " + KEY.encode()[:-1],
        b"Bearer " + KEY.encode() + b"x",
        b"Bearer \xff\xfe",
        b"Bearer " + KEY.encode() + b" " + OTHER.encode(),
    ],
)
def test_wrong_keys(guarded: GatewayServer, value: bytes) -> None:
    assert guarded.get("/v1/models", headers={b"authorization": value}).status_code == 401


def test_two_authorization_headers_are_none(guarded: GatewayServer) -> None:
    headers = [(b"authorization", b"Bearer x"), (b"authorization", b"Bearer " + KEY.encode())]
    assert guarded.get("/v1/models", headers=headers).status_code == 401


def test_the_host_header_changes_nothing(guarded: GatewayServer) -> None:
    for host in ("x/health?", "localhost/health", "x#/ready"):
        assert guarded.get("/v1/models", headers={"host": host}).status_code == 401


def test_right_keys(guarded: GatewayServer) -> None:
    for key in (KEY, OTHER):
        assert guarded.get("/v1/models", headers=bearer(key)).status_code == 200
    assert guarded.get("/v1/models", headers={"authorization": f"bearer  {OTHER}"}).status_code == 200


def test_openais_client_raises_authentication_error(guarded: GatewayServer) -> None:
    with (
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=OTHER, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]


def test_refused_requests_never_reach_the_engine_or_the_counters(guarded: GatewayServer) -> None:
    before = _accepted(guarded)
    assert guarded.post("/v1/completions", {"prompt": "a"}).status_code == 401
    assert guarded.client.submitted == []
    assert _accepted(guarded) == before


def _accepted(server: GatewayServer) -> str:
    lines = server.get("/metrics", headers=bearer(KEY)).text.splitlines()
    return next(line for line in lines if line.startswith("nybble_requests_accepted_total"))
