"""``nybble`` with the engine of tests/engine/fake_engine.py: PYTHONPATH must lead there."""

from functools import partial

from nybble.engine.client import EngineClient
from nybble.server import fleet
from nybble.server.cli import main

if __name__ == "__main__":
    fleet.EngineClient = partial(EngineClient, worker_args=["--factory", "fake_engine:build"])  # type: ignore[misc, assignment]
    main()
