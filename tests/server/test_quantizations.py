"""Quantization jobs over HTTP: a real task process on a tiny model, beside a fake engine."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gateway_server import GatewayServer, running
from tiny_models import tiny_transformer
from tiny_tokenizer import write_tokenizer

ADMIN = {"authorization": "Bearer adm"}
TEXTS = ["the cat and the dog went to the sea in the rain and then sang " * 4] * 8
SMALL = {
    "group_size": 32,
    "num_samples": 4,
    "seq_len": 64,
    "predict": False,
    "calibration": {"source": {"texts": TEXTS}},
    "evaluation": {"source": {"texts": TEXTS[:2]}},
}


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_transformer("llama", vocab_size=300).save_pretrained(root / "original")
    write_tokenizer(root / "original")
    for name, config in (("quantized", '{"quantization_config": {"quant_method": "awq"}}'), ("garbled", "{")):
        (root / name).mkdir()
        (root / name / "config.json").write_text(config)
    (root.parent / "data").mkdir()
    (root.parent / "data" / "mine.txt").write_text("\n<|endoftext|>\n".join(TEXTS))
    (root.parent / "secret.txt").write_text("not for calibration")
    return root


@pytest.fixture(scope="module")
def server(folder: Path, models_dir: Path) -> Iterator[GatewayServer]:
    data = models_dir.parent / "data"
    with running(folder, models_dir=models_dir, data_dir=data, admin_key="adm") as found:
        found.http.headers.update(ADMIN)
        yield found


def submit(server: GatewayServer, output: str, **fields: Any) -> Any:
    answer = server.post("/v1/quantizations", {"model": "original", "output": output, **SMALL, **fields})
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v1/quantizations/{answer.json()['id']}"
    return answer.json()


def follow(server: GatewayServer, job_id: str) -> list[tuple[str, Any]]:
    """All events of a job as (name, job)."""
    found, name = [], ""
    with server.http.stream("GET", f"/v1/quantizations/{job_id}/events", timeout=120) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                found.append((name, json.loads(line.removeprefix("data: "))))
    return found


def test_a_job_from_its_request_to_its_checkpoint(server: GatewayServer, models_dir: Path) -> None:
    job = submit(server, "rtn4", method="rtn", bits=4)
    assert (job["object"], job["model"], job["output"], job["bits"]) == (
        "quantization",
        "original",
        "rtn4",
        4,
    )
    events = follow(server, job["id"])
    assert [name for name, _ in events[:-1]] == ["progress"] * (len(events) - 1)
    name, last = events[-1]
    assert (name, last["status"], last["error"]) == ("end", "succeeded", None)
    assert last["progress"]["done"] == last["progress"]["total"] > 0
    assert last["started_at"] <= last["finished_at"]
    assert last["result"]["out"] == "rtn4"
    config = json.loads((models_dir / "rtn4" / "config.json").read_text())
    assert config["quantization_config"]["bits"] == 4
    listed = server.get("/v1/quantizations").json()["data"]
    assert listed[0] == server.get(f"/v1/quantizations/{job['id']}").json() == last
    assert "options" not in last


def test_calibration_from_a_file_and_what_it_was_is_kept(server: GatewayServer, models_dir: Path) -> None:
    job = submit(server, "gptq3", bits=3, calibration={"source": "mine.txt"})
    last = follow(server, job["id"])[-1][1]
    assert (last["status"], last["calibration"]) == ("succeeded", {"source": "mine.txt"})
    assert last["result"]["meta"]["calibration"]["name"] == "mine.txt"
    assert last["progress"]["num_layers"] == 3
    assert {path.name for path in models_dir.iterdir()} >= {"gptq3", "original"}
    assert [path for path in models_dir.iterdir() if path.name.startswith(".gptq3")] == []


def test_texts_of_a_request_stay_whole(server: GatewayServer, models_dir: Path) -> None:
    """Also where they hold what separates documents in a text file; the report says what was scored."""
    texts = [f"{text} <|endoftext|> {text}" for text in TEXTS[:3]]
    job = submit(server, "whole", method="rtn", evaluation={"source": {"texts": texts}})
    last = follow(server, job["id"])[-1][1]
    assert (last["status"], last["evaluation"]) == ("succeeded", {"source": {"texts": 3}})
    text = last["result"]["report"]["text"]
    assert text["bytes"] == sum(len(text.encode()) for text in texts)
    assert text["name"].startswith("texts-")
    assert texts_of(models_dir) == [], "they outlived the job"


def test_what_another_job_of_the_output_left_is_not_in_the_way(
    server: GatewayServer, models_dir: Path
) -> None:
    """It failed, say, with other options: this one begins anew, and takes none of its blocks."""
    stage = models_dir / ".again.work" / "quantize"
    stage.mkdir(parents=True)
    (stage.parent / "run.json").write_text('{"options": {"bits": 2}}')
    (stage / "block-00000.safetensors").write_bytes(b"of other options")
    last = follow(server, submit(server, "again", method="rtn")["id"])[-1][1]
    assert (last["status"], last["error"]) == ("succeeded", None)
    assert not stage.parent.exists()


def texts_of(models_dir: Path) -> list[Path]:
    """Those of requests that the server keeps."""
    return list((models_dir / ".nybble").glob("texts-*"))


def test_the_gate(server: GatewayServer, models_dir: Path, folder: Path, tmp_path: Path) -> None:
    """What does not pass is kept, and not served; what passes is."""
    load = {"model": "coarse", "alias": "another"}
    # Two bits cost this random model 0.18 nats on this text; on others they gain.
    text = {"source": {"texts": ["went sang dog rain" * 5]}}
    job = submit(server, "coarse", method="rtn", bits=2, gate={"max_nll_increase": 0}, evaluation=text)
    last = follow(server, job["id"])[-1][1]
    assert (last["status"], last["gate"]) == ("succeeded", {"max_nll_increase": 0})
    rise = last["result"]["report"]["nll_increase"]
    report = json.loads((models_dir / "coarse" / "quality.json").read_text())
    assert rise == report["nll_increase"] == report["model"]["nll"] - report["original"]["nll"] > 0
    assert last["result"]["gate"] == {"max_nll_increase": 0, "nll_increase": rise, "passed": False}
    for spelling in ("coarse", "./coarse", "coarse/", "coarse//."):
        answer = server.post("/v1/models/load", load | {"model": spelling})
        assert answer.status_code == 409, spelling
        assert f"did not pass its gate: NLL {rise:+.4f} > 0" in answer.text
    config = models_dir / "coarse" / "config.json"
    text_of_config, content = config.read_text(), json.loads(config.read_text())
    del content["provenance"]["gate"]  # as checkpoints were once: then the job still knows it
    config.write_text(json.dumps(content))
    answer = server.post("/v1/models/load", load | {"model": "./coarse"})
    assert answer.status_code == 409
    assert f"did not pass its gate: NLL {rise:+.4f} > 0" in answer.text
    config.write_text(text_of_config)
    # The checkpoint knows it itself: without the job, under another name, and on a server that made nothing.
    assert server.http.delete(f"/v1/quantizations/{job['id']}").json()["deleted"] is True
    assert server.post("/v1/models/load", load).status_code == 409
    shutil.copytree(models_dir / "coarse", tmp_path / "copy")
    with running(folder, models_dir=tmp_path, admin_key="adm") as other:
        answer = other.post("/v1/models/load", load | {"model": "copy"}, headers=ADMIN)
        assert (answer.status_code, answer.json()["error"]["param"]) == (409, "model")
    job = submit(server, "fine", method="rtn", bits=8, gate={"max_nll_increase": rise / 2}, evaluation=text)
    assert follow(server, job["id"])[-1][1]["result"]["gate"]["passed"] is True
    answer = server.post("/v1/models/load", load | {"model": "fine"}, timeout=120)
    assert answer.status_code == 200, answer.text
    assert server.post("/v1/models/unload", {"model": "another"}).status_code == 200


BAD = [
    ({"bits": "4"}, 400, "'bits'"),
    ({"bits": 5}, 400, "'bits' 5: use 2, 3, 4 or 8"),
    ({"method": "magic"}, 400, "'method': should be 'rtn', 'gptq'"),
    ({"prune": "wanda"}, 400, "'prune' wanda: has no effect with 'method' gptq, only with sparse24"),
    ({"dynamic": {"a": {"bits": 7}}}, 400, "'dynamic' 'a': bits 7: use bits"),
    ({"report": False}, 400, "'evaluation': has no effect without 'report'"),
    ({"calibration": "mine.txt"}, 400, "'calibration': must be an object (found 'mine.txt')"),
    ({"no_such_option": 1}, 400, "unknown parameter 'no_such_option'"),
    ({"output": "../escape"}, 400, "'output' ../escape"),
    ({"output": ".hidden"}, 400, "'output' .hidden"),
    ({"output": "original"}, 409, "exists already"),
    ({"model": "../models/original"}, 400, "must lie under --models-dir"),
    ({"model": "/etc"}, 400, "must lie under --models-dir"),
    (
        {"model": "nothing"},
        404,
        "'model' nothing: neither served nor a model under --models-dir; there are: ",
    ),
    ({"model": "quantized"}, 400, "'model' quantized: is quantized already (awq); give the original"),
    ({"model": "garbled"}, 400, "garbled/config.json: not valid JSON"),
    ({"model": ".nybble"}, 400, "must lie under"),
    ({"model": "n" * 300}, 404, "neither served nor a model"),
    ({"calibration": {"source": "n" * 300}}, 404, "no file under --data-dir"),
    ({"calibration": {"source": "../secret.txt"}}, 400, "must lie under --data-dir"),
    ({"calibration": {"source": "other.txt"}}, 404, "no file under --data-dir"),
    ({"calibration": {"source": 5}}, 400, "'calibration.source': should be a text (found 5)"),
    ({"calibration": {"source": {"texts": []}}}, 400, "'calibration.source.texts': must not be empty"),
    (
        {"calibration": {"source": {"texts": ["", "\n "]}}},
        400,
        "'calibration.source.texts': holds empty texts",
    ),
    (
        {"evaluation": {"source": {"texts": [1]}}},
        400,
        "'evaluation.source.texts.0': should be a text (found 1)",
    ),
    ({"calibration": {"source": {"text": ["a"]}}}, 400, "'calibration.source.text'; use 'texts'"),
    ({"calibration": {"source": {"corpus": ["a"]}}}, 400, "'calibration.source.texts' is required"),
    ({"gate": {"max_nll_increase": -1}}, 400, "gate.max_nll_increase"),
    ({"gate": {"max_nll_increase": 1}, "report": False}, 400, "'gate': needs the quality report"),
    ({"eval_text": "/etc/passwd"}, 400, "unknown parameter 'eval_text'"),
    ({"evaluation": {"source": "../secret.txt"}}, 400, "'evaluation.source' ../secret.txt: must lie under"),
]


@pytest.mark.parametrize(("fields", "status", "said"), BAD)
def test_requests_that_make_no_job(
    server: GatewayServer, models_dir: Path, fields: Any, status: int, said: str
) -> None:
    before = len(server.get("/v1/quantizations").json()["data"])
    answer = server.post("/v1/quantizations", {"model": "original", "output": "x", **SMALL, **fields})
    assert answer.status_code == status, answer.text
    assert said in answer.json()["error"]["message"]
    assert str(models_dir) not in answer.text
    assert answer.json()["error"]["param"].partition(".")[0] in {"evaluation", *fields}
    assert len(server.get("/v1/quantizations").json()["data"]) == before
    assert texts_of(models_dir) == []


def test_a_model_that_is_not_there_is_answered_with_those_that_are(folder: Path, tmp_path: Path) -> None:
    for name in ("b", "a", "no-model", ".hidden"):
        (tmp_path / name).mkdir()
        if name != "no-model":
            (tmp_path / name / "config.json").write_text("{}")
    with running(folder, models_dir=tmp_path, admin_key="adm") as server:
        for path, rest in (("quantizations", {"output": "x"}), ("models/load", {"alias": "y"})):
            answer = server.post(f"/v1/{path}", {"model": "c", **rest}, headers=ADMIN)
            assert answer.status_code == 404
            assert answer.json()["error"]["message"].endswith("--models-dir; there are: 'tiny', 'a', 'b'")


def test_a_link_out_of_the_folder_is_no_way_out(server: GatewayServer, models_dir: Path) -> None:
    (models_dir / "link").symlink_to(models_dir.parent)
    answer = server.post("/v1/quantizations", {"model": "link/models", "output": "x"})
    assert answer.status_code == 400
    assert "must lie under" in answer.json()["error"]["message"]


def test_an_error_names_no_folder_of_the_servers(server: GatewayServer, models_dir: Path) -> None:
    shutil.copytree(models_dir / "original", models_dir / "cut")
    weights = models_dir / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    job = submit(server, "of-cut", model="cut")
    message = follow(server, job["id"])[-1][1]["error"]["message"]
    assert message.startswith("cut/model.safetensors: tensor ")
    assert "it is truncated" in message
    assert str(models_dir) not in message


def test_a_setting_that_cannot_work_ends_the_job_with_its_reason(server: GatewayServer) -> None:
    job = submit(server, "bad", dynamic={"no.such.module": {"bits": 8}})
    last = follow(server, job["id"])[-1][1]
    assert (last["status"], last["error"]["code"]) == ("failed", "invalid")
    assert "no.such.module" in last["error"]["message"]
    assert server.http.delete(f"/v1/quantizations/{job['id']}").json()["deleted"] is True
    assert server.get(f"/v1/quantizations/{job['id']}").status_code == 404


def test_an_error_names_the_fields_of_the_request(server: GatewayServer, models_dir: Path) -> None:
    """Though the same sentence names options on a terminal (tests/engine/quantize/test_job.py)."""
    job = submit(server, "short", calibration={"source": {"texts": ["the cat sang"]}})
    error = follow(server, job["id"])[-1][1]["error"]
    assert error["code"] == "invalid"
    assert re.fullmatch(
        r"'calibration' texts: \d+ tokens are too few to tell inputs apart; give 64 at the least \(some "
        r"thousand are usual\), or use 'method' rtn",
        error["message"],
    )
    left_out = submit(server, "parts", method="rtn", dynamic={"-:.*q_proj": {}})
    dense = follow(server, left_out["id"])[-1][1]["result"]["dense"]
    assert set(dense.values()) == {"left out by 'dynamic'"}


def test_cancel_while_queued_and_while_running(server: GatewayServer, models_dir: Path) -> None:
    running_job = submit(server, "long", num_samples=4096, calibration={"source": {"texts": TEXTS * 400}})
    waiting = submit(server, "later")
    second = server.post("/v1/quantizations", {"model": "original", "output": "later"})
    assert second.status_code == 409
    told = f"'output' later: job {waiting['id']} makes it; choose another name, or cancel that job first"
    assert second.json()["error"]["message"] == told
    assert server.http.delete(f"/v1/quantizations/{waiting['id']}").status_code == 409
    server.wait(lambda: job_process(server) is not None)
    for job in (waiting, running_job):
        assert server.post(f"/v1/quantizations/{job['id']}/cancel").json()["status"] == "cancelled"
    assert server.post(f"/v1/quantizations/{waiting['id']}/cancel").status_code == 409
    left = [path.name for path in models_dir.iterdir() if "long" in path.name or "later" in path.name]
    assert left == []


def job_process(server: GatewayServer) -> int | None:
    children = Path("/proc/self/task").glob("*/children")
    for pid in (pid for path in children for pid in path.read_text().split()):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"nybble.engine.tasks" in command and b"quantize" in command:
            return int(pid)
    return None


def test_a_killed_process_is_started_again(server: GatewayServer) -> None:
    job = submit(server, "killed")
    server.wait(lambda: job_process(server) is not None)
    victim = job_process(server)
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    last = follow(server, job["id"])[-1][1]
    assert (last["status"], last["error"]) == ("succeeded", None)


def test_a_process_that_is_always_killed_fails_the_job(server: GatewayServer) -> None:
    job = submit(server, "hopeless")
    victims: set[int] = set()
    deadline = time.monotonic() + 60
    while server.get(f"/v1/quantizations/{job['id']}").json()["finished_at"] is None:
        assert time.monotonic() < deadline
        if (victim := job_process(server)) is not None and victim not in victims:
            victims.add(victim)
            os.kill(victim, signal.SIGKILL)
        time.sleep(0.02)
    last = server.get(f"/v1/quantizations/{job['id']}").json()
    assert (last["status"], last["error"]["code"], len(victims)) == ("failed", "killed", 3)
    assert "signal 9" in last["error"]["message"]


def test_keys(folder: Path, tmp_path: Path, server: GatewayServer, caplog: pytest.LogCaptureFixture) -> None:
    bare = {"authorization": ""}
    assert server.http.get("/v1/quantizations", headers=bare).status_code == 401
    assert server.http.get("/v1/quantizations", headers={"authorization": "Bearer no"}).status_code == 403
    with running(folder, models_dir=tmp_path, api_key=["user"]) as plain:
        user = {"authorization": "Bearer user"}
        for method, path in (
            ("GET", ""),
            ("POST", ""),
            ("GET", "/x"),
            ("DELETE", "/x"),
            ("POST", "/x/cancel"),
        ):
            answer = plain.http.request(method, f"/v1/quantizations{path}", headers=user)
            assert answer.status_code == 403
            assert "--admin-key" in answer.json()["error"]["message"]
    off = "quantizing, loading and unloading models answer 403; set --admin-key"
    assert caplog.messages == [f"--models-dir without --admin-key: {off}"]
    caplog.clear()
    with running(folder, models_dir=tmp_path, admin_key="adm") as bare_texts:
        job = {"model": "tiny", "output": "x", "calibration": {"source": "a.txt"}}
        said = bare_texts.post("/v1/quantizations", job, headers=ADMIN).json()["error"]["message"]
        assert said.endswith('; start it with --data-dir, or send {"texts": [...]} instead of a name')
    with running(folder, admin_key="adm", api_key=["user"]) as without:
        answer = without.get("/v1/quantizations", headers=ADMIN)
        assert answer.status_code == 403
        assert "--models-dir" in answer.json()["error"]["message"]
        off = "quantizing and loading (/v1/quantizations, /v1/models/load) answer 403; set --models-dir"
        assert caplog.messages == [f"--admin-key without --models-dir: {off}"]
        assert without.get("/v1/quantizations", headers={"authorization": "Bearer user"}).status_code == 403
        assert without.get("/v1/models", headers=ADMIN).status_code == 200


def test_jobs_are_there_after_a_restart(folder: Path, tmp_path: Path) -> None:
    with running(folder, models_dir=tmp_path, admin_key="adm") as first:
        first.http.headers.update(ADMIN)
        job = first.post("/v1/quantizations", {"model": "tiny", "output": "o"}).json()
        ended = follow(first, job["id"])[-1][1]
    with running(folder, models_dir=tmp_path, admin_key="adm") as second:
        second.http.headers.update(ADMIN)
        assert second.get("/v1/quantizations").json()["data"] == [ended]
