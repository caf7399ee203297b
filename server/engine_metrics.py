"""The engine's numbers for /metrics, read at each scrape; and the line of the log that tells the load."""

import asyncio
import logging
from collections.abc import Iterable, Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .metrics import ENGINE_TOTALS, Metrics
from .models import ModelTable, ServedModel

logger = logging.getLogger("nybble")
REPORT_SECONDS = 10.0
_COUNTERS = frozenset({*ENGINE_TOTALS, "engine_restarts"})
_STARTUP_HELP = (
    "Seconds of each phase of the start; total is their sum at the first one, without the server's imports"
)

Sample = tuple[str, str, dict[str, str], float]  # name, help, labels, value


def queue_state(model: ServedModel) -> tuple[int, int, float]:
    """Running and waiting sequences and the share of KV blocks in use, as of the last step; 0 when idle."""
    stats, outstanding = model.client.stats, model.client.outstanding
    if stats is None or outstanding == 0:
        return 0, outstanding, 0.0
    running = min(stats.num_running, outstanding)
    return running, outstanding - running, stats.kv_usage


class EngineCollector(Collector):
    """Gauges and totals of the engines behind all names."""

    def __init__(self, models: ModelTable, gateway_seconds: dict[str, float]) -> None:
        """``gateway_seconds``: the gateway's own start-up phases, with the first model; may still grow."""
        self._models = models
        self._first = models.all()[0].client
        self._gateway_seconds = gateway_seconds

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time: what there is, ``collect`` says."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The numbers of now."""
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for model in self._models.all():
            for name, text, labels, value in self._samples(model):
                if name not in families:
                    kind = CounterMetricFamily if name in _COUNTERS else GaugeMetricFamily
                    families[name] = kind(f"nybble_{name}", text, labels=tuple(labels))
                families[name].add_metric(tuple(labels.values()), value)
        yield from families.values()

    def _samples(self, model: ServedModel) -> Iterator[Sample]:
        client, name = model.client, {"model_name": model.name}
        running, waiting, kv_usage = queue_state(model)
        yield "num_requests_running", "Sequences that are being computed", name, running
        yield "num_requests_waiting", "Sequences that wait for their turn", name, waiting
        yield "kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", name, kv_usage
        yield "engine_up", "1 while the engine answers", name, client.ready.is_set()
        for total, value in model.metrics.totals.values().items():
            yield total, ENGINE_TOTALS[total], name, value
        yield "engine_restarts", "Times the engine was started again", name, client.restarts
        info = client.info
        phases = {} if info is None else info.startup_seconds
        if client is self._first:
            phases = {**self._gateway_seconds, **phases}
        for phase, seconds in phases.items():
            yield "startup_seconds", _STARTUP_HELP, {**name, "phase": phase}, seconds
        # As gauges of 1, which is what vLLM's own *_info series are.
        if info is not None:
            loaded = {
                "quant_method": info.quant_method,
                "bits": str(info.bits),
                "group_size": str(info.group_size),
                "kernel": info.kernel,
            }
            yield "model_info", "What is served", {**name, **loaded}, 1
            blocks = {"block_size": str(info.block_size), "num_gpu_blocks": str(info.num_kv_blocks)}
            yield "cache_config_info", "The KV cache", {**name, **blocks}, 1


async def report_load(models: ModelTable, metrics: Metrics) -> None:
    """Log one line every REPORT_SECONDS while there is work, none when idle. Runs until it is cancelled."""
    before = (0, 0)
    while True:
        await asyncio.sleep(REPORT_SECONDS)
        now = metrics.num_tokens
        states = [queue_state(model) for model in models.all()]
        running, waiting = (sum(state[i] for state in states) for i in range(2))
        if now != before or running or waiting:
            logger.info(
                "running %d, waiting %d, prompt %.1f tokens/s, output %.1f tokens/s, KV use %.1f %%",
                running,
                waiting,
                (now[0] - before[0]) / REPORT_SECONDS,
                (now[1] - before[1]) / REPORT_SECONDS,
                max((state[2] for state in states), default=0.0) * 100,
            )
        before = now
