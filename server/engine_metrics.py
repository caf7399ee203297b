"""The engine's numbers for /metrics, read at each scrape; and the line of the log that tells the load."""

import asyncio
import logging
from collections.abc import Iterable, Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..engine.records import EngineStats
from .metrics import Metrics
from .models import ServedModel

logger = logging.getLogger("nybble")
REPORT_SECONDS = 10.0


class EngineTotals:
    """The engine's counters, which start at 0 with each of its lives, as totals over all of them."""

    def __init__(self) -> None:
        self._before = dict.fromkeys(_TOTALS, 0)  # of earlier lives
        self._stats: EngineStats | None = None

    def update(self, stats: EngineStats) -> None:
        """Take the numbers of a step."""
        if self._stats is not None and stats.step < self._stats.step:
            self._before = self.values()
        self._stats = stats

    def values(self) -> dict[str, int]:
        """Totals by name."""
        return {name: before + getattr(self._stats, name, 0) for name, before in self._before.items()}


_TOTALS = {
    "num_preemptions": "Sequences that were put back for lack of KV blocks",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache",
}


def queue_state(model: ServedModel) -> tuple[int, int, float]:
    """Running and waiting sequences and the share of KV blocks in use, as of the last step; 0 when idle."""
    stats, outstanding = model.client.stats, model.client.outstanding
    if stats is None or outstanding == 0:
        return 0, outstanding, 0.0
    running = min(stats.num_running, outstanding)
    return running, outstanding - running, stats.kv_usage


class EngineCollector(Collector):
    """Gauges and totals of one model's engine."""

    def __init__(self, model: ServedModel, totals: EngineTotals, gateway_seconds: dict[str, float]) -> None:
        """``gateway_seconds``: the gateway's own start-up phases; may still grow."""
        self._model = model
        self._totals = totals
        self._gateway_seconds = gateway_seconds

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time: what there is, ``collect`` says."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The numbers of now."""
        client, name = self._model.client, self._model.name
        running, waiting, kv_usage = queue_state(self._model)
        yield _gauge("num_requests_running", "Sequences that are being computed", name, running)
        yield _gauge("num_requests_waiting", "Sequences that wait for their turn", name, waiting)
        yield _gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", name, kv_usage)
        yield _gauge("engine_up", "1 while the engine answers", name, float(client.ready.is_set()))
        for total, value in self._totals.values().items():
            yield _counter(total, _TOTALS[total], name, value)
        yield _counter("engine_restarts", "Times the engine was started again", name, client.restarts)
        info = client.info
        startup = GaugeMetricFamily(
            "nybble_startup_seconds", "Seconds of each phase of the start", labels=("model_name", "phase")
        )
        phases = {**self._gateway_seconds, **(info.startup_seconds if info else {})}
        for phase, seconds in phases.items():
            startup.add_metric((name, phase), seconds)
        yield startup
        if info is not None:
            yield _info(
                "model",
                "What is served",
                {
                    "model_name": name,
                    "quant_method": info.quant_method,
                    "bits": str(info.bits),
                    "group_size": str(info.group_size),
                    "kernel": info.kernel,
                },
            )
            blocks = {"block_size": str(info.block_size), "num_gpu_blocks": str(info.num_kv_blocks)}
            yield _info("cache_config", "The KV cache", {"model_name": name, **blocks})


def _gauge(name: str, text: str, model: str, value: float) -> Metric:
    family = GaugeMetricFamily(f"nybble_{name}", text, labels=("model_name",))
    family.add_metric((model,), value)
    return family


def _counter(name: str, text: str, model: str, value: float) -> Metric:
    family = CounterMetricFamily(f"nybble_{name}", text, labels=("model_name",))
    family.add_metric((model,), value)
    return family


def _info(name: str, text: str, labels: dict[str, str]) -> Metric:
    # As a gauge of 1, which is what vLLM's own *_info series are.
    family = GaugeMetricFamily(f"nybble_{name}_info", text, labels=tuple(labels))
    family.add_metric(tuple(labels.values()), 1)
    return family


async def report_load(model: ServedModel, metrics: Metrics) -> None:
    """Log one line every REPORT_SECONDS while there is work, none when idle. Runs until it is cancelled."""
    before = (0, 0)
    while True:
        await asyncio.sleep(REPORT_SECONDS)
        now = (metrics.num_prompt_tokens, metrics.num_generation_tokens)
        running, waiting, kv_usage = queue_state(model)
        if now != before or running or waiting:
            logger.info(
                "running %d, waiting %d, prompt %.1f tokens/s, output %.1f tokens/s, KV use %.1f %%",
                running,
                waiting,
                (now[0] - before[0]) / REPORT_SECONDS,
                (now[1] - before[1]) / REPORT_SECONDS,
                kv_usage * 100,
            )
        before = now
