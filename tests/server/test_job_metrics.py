"""Jobs in /metrics, over a database and without their processes."""

from nybble.server.job_metrics import JobCollector
from played_jobs import RESULT, Played
from prometheus_client import CollectorRegistry


async def test_gates(played: Played) -> None:
    """A job that succeeded may have made what is not fit to be served."""
    registry = CollectorRegistry()
    registry.register(JobCollector(played.jobs))

    def shown() -> list[float | None]:
        name = "nybble_quantization_gates_total"
        return [registry.get_sample_value(name, {"outcome": o}) for o in ("passed", "not_passed")]

    assert shown() == [0, 0]
    for number, passed in enumerate((None, True, False, False), 1):
        job = await played.submit(f"x{number}")
        gate = {"max_nll_increase": 1, "nll_increase": 2, "passed": passed}
        result = RESULT if passed is None else RESULT | {"gate": gate}
        (await played.started(number)).ends.put_nowait(result)
        await played.end(job)
    assert shown() == [1, 2]


async def test_counts(played: Played) -> None:
    registry = CollectorRegistry()
    registry.register(JobCollector(played.jobs))

    def shown() -> dict[str, float | None]:
        living = {
            s: registry.get_sample_value("nybble_quantization_jobs", {"status": s})
            for s in ("queued", "running")
        }
        return living | {
            s: registry.get_sample_value("nybble_quantization_jobs_ended_total", {"status": s})
            for s in ("succeeded", "failed", "cancelled")
        }

    nothing = {"queued": 0, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 0}
    assert shown() == nothing
    first, second, third = [await played.submit(name) for name in "xyz"]
    task = await played.started(1)
    assert shown() == nothing | {"running": 1, "queued": 2}
    await played.jobs.cancel(third.id)
    task.ends.put_nowait(RESULT | {"report": {}})
    await played.end(first)
    task = await played.started(2)
    assert shown() == nothing | {"running": 1, "succeeded": 1, "cancelled": 1}
    task.ends.put_nowait({"event": "error", "code": "failed", "message": "no"})
    await played.end(second)
    assert shown() == nothing | {"succeeded": 1, "failed": 1, "cancelled": 1}
