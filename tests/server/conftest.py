"""A tiny model folder, a shared server over a fake engine, and OpenAI's own client."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import openai
import pytest
from fake_client import FakeClient, continue_prompt
from gateway_server import GatewayServer, running, write_model
from played_jobs import Played


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without weights."""
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def _shared(folder: Path) -> Iterator[GatewayServer]:
    with running(folder) as server:
        yield server


@pytest.fixture
def server(_shared: GatewayServer) -> Iterator[GatewayServer]:
    """One server for all tests, its fake engine as new for each. Leaves nothing running in it."""

    def reset() -> None:
        fake: FakeClient = _shared.client
        fake.script, fake.budget, fake.dead, fake.error = continue_prompt, None, None, None
        fake.step_seconds = fake.stalled_seconds = 0.0
        fake.submitted.clear()
        fake.aborted.clear()

    _shared.call(reset)
    yield _shared
    _shared.call(reset)
    admission = _shared.gateway.admission
    _shared.wait(lambda: (admission.requests, admission.sequences, admission.waiting_tokens) == (0, 0, 0))
    assert _shared.call(lambda: _shared.client.outstanding) == 0


@pytest.fixture
def openai_client(server: GatewayServer) -> Iterator[openai.OpenAI]:
    """OpenAI's client, without its retries."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture
async def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Played]:
    found = Played(tmp_path, monkeypatch)
    await found.jobs.start()
    yield found
    await found.jobs.stop()
