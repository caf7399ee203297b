"""The gateway's metrics: vLLM's names and meanings after ``nybble_``; one process, closed label sets."""

import time
from collections.abc import Iterable, Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from ..engine.records import EngineStats

Outcome = Literal["finished", "aborted", "rejected", "failed"]
OUTCOMES: tuple[Outcome, ...] = ("finished", "aborted", "rejected", "failed")
FINISH_REASONS = ("stop", "length", "abort", "error")

_FIRST_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10,
                20, 40, 80, 160, 640, 2560)  # fmt: skip
_TOKEN = (0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075,
          0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)  # fmt: skip
_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60,
            120, 240, 480, 960, 1920, 3840, 7680)  # fmt: skip
_LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)
_STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

# Help and further labels by name.
_COUNTERS: dict[str, tuple[str, ...]] = {
    "prompt_tokens": ("Prompt tokens of requests that got an output",),
    "generation_tokens": ("Output tokens sent to clients",),
    "requests_accepted": (
        "Requests that reached a generation route with a valid key; the outcomes add up to it",
    ),
    "request_outcomes": ("Requests by how they ended", "outcome"),
    "request_success": ("Sequences by why they ended", "finished_reason"),
}
# Help and buckets by name.
_HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("From the request's arrival to a sequence's first token", _FIRST_TOKEN),
    "inter_token_latency_seconds": ("Between two messages of one sequence, per token", _TOKEN),
    "request_queue_time_seconds": ("From the engine's receipt of a sequence to its first step", _LATENCY),
    "e2e_request_latency_seconds": ("From a request's arrival to its end, where it finished", _LATENCY),
    "request_prompt_tokens": ("Prompt tokens of a prompt", _LENGTHS),
    "request_generation_tokens": ("Output tokens of a sequence that ended", _LENGTHS),
    "iteration_tokens_total": ("Tokens computed in one step of the engine", _STEP_TOKENS),
}


class Metrics:
    """What happened to requests, counted where it happens, by model. The engines' own numbers join at each
    scrape (``engine_metrics``)."""

    def __init__(self, default_model: str, vllm_names: bool = False) -> None:
        """``default_model``: under its name are counted requests that named no model we serve.
        ``vllm_names``: show VLLM_NAMES under ``vllm:`` too."""
        self.registry = CollectorRegistry()
        self.exposed = CollectorRegistry(auto_describe=False)  # what /metrics shows
        self.exposed.register(self.registry)
        if vllm_names:
            self.exposed.register(VllmNames(self.registry))
        ProcessCollector(registry=self.registry)
        self.http_responses = Counter(
            "nybble_http_responses", "HTTP responses", ("route", "method", "status"), registry=self.registry
        )
        self._counters = {
            name: Counter(f"nybble_{name}", text, ("model_name", *labels), registry=self.registry)
            for name, (text, *labels) in _COUNTERS.items()
        }
        self._histograms = {
            name: Histogram(f"nybble_{name}", text, ("model_name",), registry=self.registry, buckets=buckets)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._models: dict[str, ModelMetrics] = {}
        self._default = self.of(default_model)

    def of(self, model_name: str) -> "ModelMetrics":
        """The series of one model; all of them exist from then on."""
        if model_name not in self._models:
            self._models[model_name] = ModelMetrics(model_name, self._counters, self._histograms)
        return self._models[model_name]

    def accept(self) -> "RequestRecord":
        """A request came in. Its record must see exactly one ``end``."""
        return RequestRecord(self._default)

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Prompt and output tokens of all models so far."""
        models = self._models.values()
        return sum(m.num_prompt_tokens for m in models), sum(m.num_generation_tokens for m in models)


class ModelMetrics:
    """The series of one model, under the names of _COUNTERS and _HISTOGRAMS."""

    def __init__(
        self, model_name: str, counters: dict[str, Counter], histograms: dict[str, Histogram]
    ) -> None:
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.prompt_tokens = counters["prompt_tokens"].labels(model_name)
        self.generation_tokens = counters["generation_tokens"].labels(model_name)
        self.accepted = counters["requests_accepted"].labels(model_name)
        outcomes, success = counters["request_outcomes"], counters["request_success"]
        self.outcomes = {name: outcomes.labels(model_name, name) for name in OUTCOMES}
        self.success = {name: success.labels(model_name, name) for name in FINISH_REASONS}
        self.first_token = histograms["time_to_first_token_seconds"].labels(model_name)
        self.inter_token = histograms["inter_token_latency_seconds"].labels(model_name)
        self.queue_time = histograms["request_queue_time_seconds"].labels(model_name)
        self.e2e = histograms["e2e_request_latency_seconds"].labels(model_name)
        self.request_prompt_tokens = histograms["request_prompt_tokens"].labels(model_name)
        self.request_generation_tokens = histograms["request_generation_tokens"].labels(model_name)
        self.iteration_tokens = histograms["iteration_tokens_total"].labels(model_name)
        self.totals = EngineTotals()

    def step(self, stats: EngineStats, engine: int = 0) -> None:
        """A step of an engine of this name ended; ``engine`` tells it from the name's others."""
        self.totals.update(stats, engine)
        self.iteration_tokens.observe(stats.num_batched_tokens)


ENGINE_TOTALS = {
    "num_preemptions": "Sequences that were put back for lack of KV blocks",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache",
}


class EngineTotals:
    """Counters of all engines that had one name; an engine's own start at 0 with each of its lives."""

    def __init__(self) -> None:
        self._before = dict.fromkeys(ENGINE_TOTALS, 0)  # of earlier lives
        self._stats: dict[int, EngineStats] = {}

    def update(self, stats: EngineStats, engine: int = 0) -> None:
        """Take the numbers of a step. ``engine``: its own number, no other engine's."""
        last = self._stats.get(engine)
        if last is not None and stats.step < last.step:
            for name in self._before:
                self._before[name] += getattr(last, name)
        self._stats[engine] = stats

    def values(self) -> dict[str, int]:
        """Totals by name."""
        living = self._stats.values()
        return {name: count + sum(getattr(s, name) for s in living) for name, count in self._before.items()}


class RequestRecord:
    """The life of one HTTP request in the metrics."""

    def __init__(self, metrics: ModelMetrics) -> None:
        """``metrics``: where it counts until it is known which model it wants."""
        self._metrics = metrics
        self._counted = False
        self._arrival = time.perf_counter()
        self._last: dict[int, float] = {}  # sequence -> when its last tokens came
        self._ended = False

    def serve(self, metrics: ModelMetrics) -> None:
        """The model is known. Call at most once."""
        self._metrics, self._counted = metrics, True
        metrics.accepted.inc()

    def first_output(self, num_prompt_tokens: int, queued_seconds: float) -> None:
        """A sequence left the queue. ``num_prompt_tokens``: 0 for further sequences of the same prompt."""
        self._metrics.queue_time.observe(queued_seconds)
        if num_prompt_tokens:
            self._metrics.num_prompt_tokens += num_prompt_tokens
            self._metrics.prompt_tokens.inc(num_prompt_tokens)
            self._metrics.request_prompt_tokens.observe(num_prompt_tokens)

    def tokens(self, index: int, count: int) -> None:
        """Sequence ``index`` has ``count`` more tokens, in one message."""
        metrics, now = self._metrics, time.perf_counter()
        last = self._last.get(index)
        if last is None:
            metrics.first_token.observe(now - self._arrival)
        else:
            metrics.inter_token.observe((now - last) / count)
        self._last[index] = now
        metrics.num_generation_tokens += count
        metrics.generation_tokens.inc(count)

    def sequence_ended(self, reason: str, num_tokens: int) -> None:
        """A sequence is over; ``reason`` is one of FINISH_REASONS."""
        self._metrics.success[reason].inc()
        self._metrics.request_generation_tokens.observe(num_tokens)

    def end(self, outcome: Outcome) -> None:
        """The request is over. Only the first call counts."""
        if self._ended:
            return
        self._ended = True
        if not self._counted:
            self.serve(self._metrics)
        self._metrics.outcomes[outcome].inc()
        if outcome == "finished":
            self._metrics.e2e.observe(time.perf_counter() - self._arrival)


# What gateways (GAIE's protocol), KEDA's scalers and the public dashboards of vLLM read.
VLLM_NAMES = frozenset(
    {
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "cache_config_info",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "num_preemptions",
        "prompt_tokens",
        "generation_tokens",
        "request_success",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_queue_time_seconds",
        "e2e_request_latency_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "iteration_tokens_total",
    }
)


class VllmNames(Collector):
    """The same numbers once more under ``vllm:`` names, with the label ``engine`` that vLLM has."""

    def __init__(self, source: CollectorRegistry) -> None:
        self._source = source

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time: what there is, ``collect`` says."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Renamed copies of the metrics in VLLM_NAMES."""
        for metric in self._source.collect():
            name = metric.name.removeprefix("nybble_")
            if name not in VLLM_NAMES:
                continue
            copy = Metric(f"vllm:{name}", metric.documentation, metric.type)
            for sample in metric.samples:
                suffix = sample.name.removeprefix(metric.name)
                labels = {**sample.labels, "engine": "0"}
                copy.add_sample(f"vllm:{name}{suffix}", labels, sample.value)
            yield copy
