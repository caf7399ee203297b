"""Quantization jobs for /metrics, read at each scrape."""

from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .job_store import Status
from .jobs import Jobs

UNFINISHED: tuple[Status, ...] = ("queued", "running")
ENDED: tuple[Status, ...] = ("succeeded", "failed", "cancelled")


class JobCollector(Collector):
    """How many jobs wait and run; since the server started, how many have ended, by how, and how their gates
    came out."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time: what there is, ``collect`` says."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every status is always there, so that an alert sees the first one that fails."""
        now = Counter(job.status for job in self._jobs.all())
        gauge = GaugeMetricFamily(
            "nybble_quantization_jobs", "Quantization jobs that have not ended", labels=["status"]
        )
        ended = CounterMetricFamily(
            "nybble_quantization_jobs_ended", "Quantization jobs by how they ended", labels=["status"]
        )
        gates = CounterMetricFamily(
            "nybble_quantization_gates", "Gates of jobs that succeeded, by their outcome", labels=["outcome"]
        )
        for status in UNFINISHED:
            gauge.add_metric([status], now[status])
        for status in ENDED:
            ended.add_metric([status], self._jobs.num_ended[status])
        for outcome, passed in (("passed", True), ("not_passed", False)):
            gates.add_metric([outcome], self._jobs.num_gates[passed])
        yield gauge
        yield ended
        yield gates
