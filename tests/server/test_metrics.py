"""/metrics parses, and its counts are the clients' counts."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_client import FakeClient
from gateway_server import GatewayServer, running
from nybble.engine.errors import EngineDeadError
from nybble.engine.records import EngineStats
from nybble.server import engine_metrics
from nybble.server.metrics import FINISH_REASONS, OUTCOMES, VLLM_NAMES, EngineTotals
from prometheus_client.parser import text_string_to_metric_families


@pytest.fixture
def fresh(folder: Path) -> Iterator[GatewayServer]:
    with running(folder, vllm_metrics=True) as server:
        yield server


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(server: GatewayServer, accept: str = "text/plain") -> Samples:
    answer = server.get("/metrics", headers={"accept": accept})
    assert answer.status_code == 200
    found: Samples = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    wanted = {"model_name": "tiny", **labels}.items()
    matching = [count for (key, have), count in samples.items() if key == name and wanted <= have]
    assert len(matching) == 1, (name, labels, matching)
    return matching[0]


def test_counts_are_the_clients_counts(fresh: GatewayServer) -> None:
    prompt_tokens = generation_tokens = requests = stopped = lengths = 0

    def count(answer: httpx.Response) -> dict[str, Any]:
        nonlocal prompt_tokens, generation_tokens, requests, stopped, lengths
        assert answer.status_code == 200
        body = answer.json()
        requests += 1
        prompt_tokens += body["usage"]["prompt_tokens"]
        generation_tokens += body["usage"]["completion_tokens"]
        stopped += sum(choice["finish_reason"] == "stop" for choice in body["choices"])
        lengths += sum(choice["finish_reason"] == "length" for choice in body["choices"])
        return body

    count(fresh.post("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 20}))
    count(fresh.post("/v1/completions", {"prompt": ["Hello", "world"], "n": 3, "max_tokens": 5}))
    count(fresh.post("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 99, "stop": "upon"}))
    count(fresh.post("/v1/completions", {"prompt": "a", "max_tokens": 0, "echo": True, "logprobs": 1}))
    messages_body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    count(fresh.post("/v1/chat/completions", messages_body))
    for bad in ({"prompt": 5}, {"prompt": "a", "n": 0}, {"prompt": "a", "model": "other"}):
        assert fresh.post("/v1/completions", bad).status_code in (400, 404)

    samples = scrape(fresh)
    assert value(samples, "nybble_prompt_tokens_total") == prompt_tokens
    assert value(samples, "nybble_generation_tokens_total") == generation_tokens
    assert value(samples, "nybble_request_outcomes_total", outcome="finished") == requests
    assert value(samples, "nybble_request_outcomes_total", outcome="rejected") == 3
    assert value(samples, "nybble_request_success_total", finished_reason="stop") == stopped
    assert value(samples, "nybble_request_success_total", finished_reason="length") == lengths
    assert value(samples, "nybble_request_generation_tokens_sum") == generation_tokens
    assert value(samples, "nybble_request_prompt_tokens_sum") == prompt_tokens
    assert value(samples, "nybble_e2e_request_latency_seconds_count") == requests
    # One observation per sequence with a token, one per further message.
    first = value(samples, "nybble_time_to_first_token_seconds_count")
    assert first == stopped + lengths - 1
    assert value(samples, "nybble_inter_token_latency_seconds_count") == generation_tokens - first
    _adds_up(samples)
    routes = {dict(labels)["route"] for name, labels in samples if name == "nybble_http_responses_total"}
    assert routes == {"/v1/completions", "/v1/chat/completions"}


def _adds_up(samples: Samples) -> None:
    accepted = value(samples, "nybble_requests_accepted_total")
    outcomes = [value(samples, "nybble_request_outcomes_total", outcome=name) for name in OUTCOMES]
    assert accepted == sum(outcomes)


def test_aborted_and_failed_requests_are_counted_once(fresh: GatewayServer) -> None:
    fresh.call(lambda: setattr(fresh.client, "budget", 3))
    with fresh.http.stream(
        "POST", "/v1/completions", json={"prompt": "a", "max_tokens": 50, "stream": True}
    ) as it:
        lines = it.iter_lines()  # kept: without it the stream is closed
        next(lines)
        running_now = scrape(fresh)
        assert value(running_now, "nybble_num_requests_running") == 1
        assert value(running_now, "nybble_kv_cache_usage_perc") == 0.25
    fresh.wait(lambda: fresh.gateway.admission.requests == 0)
    fresh.call(lambda: setattr(fresh.client, "dead", EngineDeadError("died")))
    assert fresh.post("/v1/completions", {"prompt": "a"}).status_code == 503
    samples = scrape(fresh)
    assert value(samples, "nybble_request_outcomes_total", outcome="aborted") == 1
    assert value(samples, "nybble_request_outcomes_total", outcome="failed") == 1
    assert value(samples, "nybble_request_success_total", finished_reason="abort") == 1
    assert value(samples, "nybble_request_success_total", finished_reason="error") == 1
    assert value(samples, "nybble_num_requests_running") == 0
    assert value(samples, "nybble_kv_cache_usage_perc") == 0
    _adds_up(samples)


def test_what_is_served_and_how_it_started(fresh: GatewayServer) -> None:
    samples = scrape(fresh)
    info = {"quant_method": "gptq", "bits": "4", "group_size": "64", "kernel": "fake-w4"}
    assert value(samples, "nybble_model_info", **info) == 1
    assert value(samples, "nybble_startup_seconds", phase="weights") == 0.5
    assert value(samples, "nybble_startup_seconds", phase="gateway") == 0.1
    assert value(samples, "nybble_engine_up") == 1
    assert value(samples, "nybble_engine_restarts_total") == 0


def test_a_model_that_was_loaded_later_has_its_own_start_only(fresh: GatewayServer) -> None:
    models = fresh.gateway.models
    fresh.call(lambda: models.put(replace(models.get("tiny"), name="later", client=FakeClient())))
    samples = scrape(fresh)
    found = [dict(labels) for name, labels in samples if name == "nybble_startup_seconds"]
    started = {(labels["model_name"], labels["phase"]) for labels in found}
    assert started == {("tiny", "gateway"), ("tiny", "weights"), ("later", "weights")}


def test_vllms_names_show_the_same_numbers(fresh: GatewayServer) -> None:
    fresh.post("/v1/completions", {"prompt": "Hello", "max_tokens": 3})
    samples = scrape(fresh)
    theirs = {key: count for key, count in samples.items() if key[0].startswith("vllm:")}
    assert theirs
    for (name, labels), count in theirs.items():
        ours = ("nybble_" + name.removeprefix("vllm:"), labels - {("engine", "0")})
        assert samples[ours] == count
    assert value(samples, "vllm:num_requests_waiting", engine="0") == 0
    assert value(samples, "vllm:kv_cache_usage_perc", engine="0") == 0
    assert value(samples, "vllm:cache_config_info", engine="0", block_size="16", num_gpu_blocks="64") == 1
    families = {name.removeprefix("vllm:") for name, _ in theirs}
    for name in VLLM_NAMES:
        assert any(family.startswith(name) for family in families), name


def test_without_the_flag_there_are_none(server: GatewayServer) -> None:
    assert "vllm:" not in server.get("/metrics").text


def test_openmetrics_too(server: GatewayServer) -> None:
    answer = server.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_no_label_comes_from_a_client(server: GatewayServer) -> None:
    for path in ("/surprise", "/v1/models/surprise"):
        server.get(path)
    server.http.request("BREW", "/surprise")
    server.post("/v1/completions", {"prompt": "a", "model": "surprise", "user": "surprise"})
    text = server.get("/metrics").text
    assert "surprise" not in text
    assert "BREW" not in text


def test_inter_token_buckets_begin_at_half_a_millisecond(server: GatewayServer) -> None:
    assert (
        'nybble_inter_token_latency_seconds_bucket{le="0.0005",model_name="tiny"}'
        in server.get("/metrics").text
    )


def test_every_finish_reason_and_outcome_is_there_from_the_start(fresh: GatewayServer) -> None:
    samples = scrape(fresh)
    for reason in FINISH_REASONS:
        assert value(samples, "nybble_request_success_total", finished_reason=reason) == 0


def _stats(step: int, hits: int) -> EngineStats:
    return EngineStats(step, 0, 0, hits * 10, 0.0, 1, hits * 2, hits, 0, 0)


def test_totals_go_on_when_the_engine_starts_again() -> None:
    totals = EngineTotals()
    for step, hits in [(1, 5), (2, 7), (1, 1), (2, 4)]:
        totals.update(_stats(step, hits))
    assert totals.values() == {"num_preemptions": 110, "prefix_cache_queries": 22, "prefix_cache_hits": 11}


def test_the_load_is_logged_only_under_load(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    client = FakeClient()
    with pytest.MonkeyPatch.context() as patch, caplog.at_level("INFO", "nybble"):
        patch.setattr(engine_metrics, "REPORT_SECONDS", 0.1)
        with running(folder, client) as server:
            gateway = server.gateway
            task = server.call(
                lambda: server.loop.create_task(engine_metrics.report_load(gateway.models, gateway.metrics))
            )
            server.post("/v1/completions", {"prompt": "a", "max_tokens": 30})
            server.wait(lambda: len(caplog.records) == 1)
            server.wait(lambda: client.outstanding == 0)
            time.sleep(0.3)
            server.call(task.cancel)
    assert len(caplog.records) == 1
    line = caplog.records[0].getMessage()
    assert line.startswith("running 0, waiting 0, prompt 20.0 tokens/s, output 300.0 tokens/s, KV use 0.0 %")
