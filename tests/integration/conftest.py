"""A served demo model."""

from collections.abc import Iterator

import pytest
from live_server import DEMO, LiveServer, serve


@pytest.fixture(scope="module")
def live_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The dense demo model in fp32, so that transformers is its oracle."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    with serve(log, str(DEMO), "--dtype", "float32", "--served-model-name", "demo") as server:
        yield server
