"""Models loaded, switched and unloaded while requests run, over real engines."""

import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import DEMO, LiveServer, serve
from nybble.engine.errors import ConflictError
from nybble.server.fleet import Fleet
from nybble.server.metrics import Metrics
from nybble.server.settings import load_settings
from nybble.server.switch import Switch
from waiting import until

ADMIN = {"authorization": "Bearer adm"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("switch") / "models"
    for name in ("second", "broken"):
        shutil.copytree(DEMO, models / name)
    weights = models / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return models


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[LiveServer]:
    with serve(
        models.parent / "log",
        *("--models-dir", str(models), "--admin-key", "adm", "--served-model-name", "demo"),
        *("--kv-cache-memory", "64MiB", "--max-num-seqs", "8"),
    ) as found:
        yield found


def post(server: LiveServer, path: str, body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, headers=ADMIN, timeout=120)


def complete(server: LiveServer, model: str, max_tokens: int = 4) -> httpx.Response:
    return post(server, "/v1/completions", {"model": model, "prompt": "One day", "max_tokens": max_tokens})


def served(server: LiveServer) -> list[str]:
    return [card["id"] for card in httpx.get(f"{server.url}/v1/models").json()["data"]]


def test_a_second_model_beside_the_first(server: LiveServer) -> None:
    assert complete(server, "beside").status_code == 404
    answer = post(server, "/v1/models/load", {"model": "second", "alias": "beside"})
    assert answer.status_code == 200, answer.text
    assert (answer.json()["id"], answer.json()["load_seconds"] > 0) == ("beside", True)
    assert served(server) == ["demo", "beside"]
    cards = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert [card["root"] for card in cards] == ["nybble-demo", "second"]
    assert re.search(r"INFO loaded second as 'beside' in \d+\.\d s\n", server.log.read_text())
    texts = {complete(server, name).json()["choices"][0]["text"] for name in ("demo", "beside")}
    assert "" not in texts
    samples = httpx.get(f"{server.url}/metrics").text
    for name in ("demo", "beside"):
        assert f'nybble_engine_up{{model_name="{name}"}} 1.0' in samples
    assert post(server, "/v1/models/unload", {"model": "beside"}).json()["unloaded"] is True
    assert served(server) == ["demo"]
    assert "INFO 'beside' unloaded (second); its requests are finished first\n" in server.log.read_text()
    assert complete(server, "beside").status_code == 404


def test_what_is_served_already_is_not_loaded_again(server: LiveServer, models: Path) -> None:
    """Unless its files have changed."""
    (models / "second" / ".#README").symlink_to("nowhere")  # as editors do
    until(lambda: len(engines(server)) == 1, 30)  # without what an earlier test unloaded
    load = {"model": "second", "alias": "again"}
    assert post(server, "/v1/models/load", load).json()["load_seconds"] > 0
    before = engines(server)
    for strategy in ("both", "replace"):
        answer = post(server, "/v1/models/load", load | {"strategy": strategy})
        assert (answer.status_code, answer.json()["load_seconds"]) == (200, 0)
    assert "INFO second as 'again' is served already\n" in server.log.read_text()
    assert engines(server) == before
    os.utime(models / "second" / "config.json")
    assert post(server, "/v1/models/load", load).json()["load_seconds"] > 0
    assert re.search(r"loaded second as 'again' in \S+ s, in place of second\n", server.log.read_text())
    assert post(server, "/v1/models/unload", {"model": "again"}).json()["unloaded"] is True


@pytest.mark.parametrize("strategy", ["both", "replace"])
def test_a_name_changes_its_model(server: LiveServer, models: Path, strategy: str) -> None:
    """ "both": every request is answered meanwhile. "replace": 503 while it loads, and nothing else."""
    until(lambda: len(engines(server)) == 1, 30)  # without what an earlier test unloaded
    before = engines(server)
    os.utime(models / "second" / "config.json")  # else there is nothing to do the second time
    stream: list[str] = []
    statuses: list[int] = []
    done = threading.Event()

    def long_request() -> None:
        body = {"model": "demo", "prompt": "One day", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            stream.extend(line for line in answer.iter_lines() if line)

    def requests() -> None:
        while not done.is_set():
            statuses.append(complete(server, "demo").status_code)

    threads = [threading.Thread(target=target) for target in (requests, long_request)]
    for thread in threads:
        thread.start()
    until(lambda: bool(stream) and bool(statuses), 30)
    answer = post(server, "/v1/models/load", {"model": "second", "alias": "demo", "strategy": strategy})
    assert answer.status_code == 200, answer.text
    seen = len(statuses)
    until(lambda: len(statuses) > seen + 3, 30)
    done.set()
    for thread in threads:
        thread.join(60)
    assert stream[-1] == "data: [DONE]"
    assert json.loads(stream[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert set(statuses) == ({200} if strategy == "both" else {200, 503})
    assert statuses[-1] == 200
    until(lambda: len(engines(server)) == 1, 30)  # the old one is gone
    assert engines(server) != before
    assert server.metric("nybble_engine_up") == 1


def engines(server: LiveServer) -> list[int]:
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"engine.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("load", {"model": "broken", "alias": "demo"}, 400, "model.safetensors"),
        ("load", {"model": "broken", "alias": "demo", "strategy": "replace"}, 400, "model.safetensors"),
        ("load", {"model": "missing", "alias": "demo"}, 404, "neither served nor a model"),
        ("load", {"model": "../models/second", "alias": "demo"}, 400, "must lie under --models-dir"),
        ("load", {"model": "second"}, 400, "'alias' is required"),
        ("load", {"model": "second", "alias": "x", "strategy": "swap"}, 400, "strategy"),
        ("unload", {"model": "demo"}, 409, "the only model"),
        ("unload", {"model": "nobody"}, 404, "does not exist"),
    ],
)
def test_refusals_change_nothing(server: LiveServer, path: str, body: Any, status: int, said: str) -> None:
    answer = post(server, f"/v1/models/{path}", body)
    assert answer.status_code == status, answer.text
    assert said in answer.json()["error"]["message"]
    if "model.safetensors" in said:
        assert "WARNING broken as 'demo' could not be loaded: " in server.log.read_text()
    assert served(server) == ["demo"]
    assert complete(server, "demo").status_code == 200


class Crowded(Switch):
    """Where a model needs 7 GiB and 5 are free."""

    async def _check(self, settings: Any, folder: Path) -> dict[str, Any]:
        return {"weight_bytes": 6 << 30, "kv_bytes_one_request": 1 << 30, "free_bytes": 5 << 30}


@pytest.mark.parametrize(
    ("alias", "strategy", "remedy"),
    [
        ("demo", "both", 'are free; use "strategy": "replace", which ends'),
        ("new", "both", "are free; unload another model"),
        ("new", "replace", "are free; unload another model"),  # there is nothing that would end
    ],
)
async def test_what_does_not_fit_beside_is_a_conflict(alias: str, strategy: Any, remedy: str) -> None:
    settings = load_settings({})
    fleet = Fleet(settings, Metrics("demo"))
    served = fleet.prepare(settings, DEMO, "demo")  # its engine is never started
    fleet.serve(served)
    with pytest.raises(ConflictError) as refused:
        await Crowded(settings, fleet).load(DEMO, alias, strategy)
    assert remedy in refused.value.message
    assert fleet.models.all() == [served]
