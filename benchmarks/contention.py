"""Two threads while a foreign process takes one core: ``python benchmarks/contention.py``.

The whole engine on the 1 B shape and on the demo model (both 4 bit), one stream and eight, with one thread
and with two, on a machine that is otherwise quiet and beside one process that spins, pinned to one core (each
core in turn). Rounds are interleaved, disturbed measurements repeated; every figure is the median over rounds
of tokens/s after the first token. The ratio that counts: two threads beside the foreign process, over one
thread on the quiet machine; the goal is 0.8 (threads that spin for one whose core is taken would come to a
tenth).

Then both engines idle; a waiting pool that spins would show as CPU time. The goal is below 1 % of one CPU.
Writes benchmarks/results/contention-MODEL-CPU.json.
"""

import argparse
import contextlib
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import ROOT, show, write_results
from cpu_models import Shape, prepare, shapes, vocab_size
from nybble.engine.hardware import affinity
from workers import Disturbance, Worker

GOAL, IDLE_GOAL = 0.8, 0.01
PROMPT, STREAMS = 16, 8
NEW_TOKENS = {"1b": 24, "demo": 256}  # of each stream at a time
IDLE_SECONDS = 10.0
ATTEMPTS, DISTURBED = 2, 0.2  # CPUs that the rest of the machine may take during a measurement
THREADS = (1, 2)
SETTINGS = [(threads, busy) for busy in (False, True) for threads in THREADS]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(NEW_TOKENS), default=list(NEW_TOKENS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one measurement, at least")
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "bench", help="of the models")
    options = parser.parse_args()
    if len(affinity()) < max(THREADS):
        raise SystemExit("this takes at least two cores")
    for name in options.models:
        result = measure_model(shapes()[name], options)
        report(name, result)
        print(f"written: {write_results(f'contention-{name}', {'goal': GOAL, **result})}")


def measure_model(shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one model, then its idle CPU."""
    made = prepare(shape, options.folder, say)
    with contextlib.ExitStack() as stack:
        workers: dict[int, Worker] = {}
        for threads in THREADS:
            log = options.folder / "logs" / f"contention-{shape.name}-{threads}.log"
            workers[threads] = stack.enter_context(
                Worker(f"{threads} threads", sys.executable, "ours.py", log)
            )
            workers[threads].call(
                "load", model=str(made / "nybble"), threads=threads, context=shape.context, streams=STREAMS,
                options={"cpu_activations": "int8"},
            )  # fmt: skip
        bench = Bench(shape, workers, vocab_size(made), options.seconds)
        rounds = [bench.round(index) for index in range(-1, options.rounds)][1:]
        idle = idle_shares(workers)
    streams = {str(count): summary([r[str(count)] for r in rounds]) for count in (1, STREAMS)}
    return {"title": shape.title, "streams": streams, "idle_cpu": idle}


class Bench:
    """Measurements of one model; prompts are new each time."""

    def __init__(self, shape: Shape, workers: dict[int, Worker], vocab: int, seconds: float) -> None:
        self._shape = shape
        self._workers = workers
        self._vocab = vocab
        self._seconds = seconds
        self._random = random.Random(0)

    def round(self, index: int) -> dict[str, Any]:
        """Every setting once for one stream and for eight, in an order that rotates; -1: warm-up."""
        cores = affinity()
        core, start = cores[index % len(cores)], index % len(SETTINGS)
        say(f"{self._shape.name}: round {index + 1}")
        found: dict[str, Any] = {}
        for streams in (1, STREAMS):
            values: dict[str, Any] = {"core": core}
            for threads, busy in SETTINGS[start:] + SETTINGS[:start]:
                values[name_of(threads, busy)] = self._undisturbed(threads, streams, core if busy else None)
            found[str(streams)] = values
        return found

    def _undisturbed(self, threads: int, streams: int, core: int | None) -> dict[str, float]:
        """Of up to ATTEMPTS measurements, the first that nobody else disturbs, or the one least disturbed.

        Below zero the spinning process did not get its core: as bad as others who take one.
        """
        found: list[dict[str, float]] = []
        for _ in range(ATTEMPTS):
            with spinning(core) if core is not None else contextlib.nullcontext():
                found.append(self._measure(threads, streams))
            found[-1]["disturbance"] = found[-1]["foreign"] - (core is not None)
            if abs(found[-1]["disturbance"]) < DISTURBED:
                break
        return min(found, key=lambda one: abs(one["disturbance"]))

    def _measure(self, threads: int, streams: int) -> dict[str, float]:
        """Tokens/s, and how many CPUs others took meanwhile (the spinning process counts)."""
        worker = self._workers[threads]
        tokens = seconds = 0.0
        disturbance = Disturbance(worker, list(self._workers.values()))
        while seconds < self._seconds:
            prompts = [
                [self._random.randrange(4, self._vocab) for _ in range(PROMPT)] for _ in range(streams)
            ]
            reply = worker.call("generate", prompts=prompts, new_tokens=NEW_TOKENS[self._shape.name])
            tokens += reply["decode_tokens"]
            seconds += reply["decode_seconds"]
        return {"tokens_per_second": tokens / seconds, **disturbance.stop()}


@contextlib.contextmanager
def spinning(core: int | None) -> Iterator[None]:
    """A process that does nothing but take one core (None: any)."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        if core is not None:
            os.sched_setaffinity(process.pid, {core})
        time.sleep(0.3)  # it has started, and the scheduler knows
        yield
    finally:
        process.kill()
        process.wait()


def name_of(threads: int, busy: bool) -> str:
    """The setting's key in the results."""
    return f"{threads}_threads_{'contended' if busy else 'quiet'}"


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of every setting, and the ratio of medians that counts."""
    medians = {
        name: statistics.median(r[name]["tokens_per_second"] for r in rounds)
        for name in (name_of(*setting) for setting in SETTINGS)
    }
    ratio = medians[name_of(2, True)] / medians[name_of(1, False)]
    return {"medians": medians, "ratio": ratio, "rounds": rounds}


def idle_shares(workers: dict[int, Worker]) -> dict[str, float]:
    """Of one CPU, while they wait for work."""
    time.sleep(2.0)
    before = [worker.cpu_seconds() for worker in workers.values()]
    time.sleep(IDLE_SECONDS)
    return {
        worker.label: (worker.cpu_seconds() - start) / IDLE_SECONDS
        for worker, start in zip(workers.values(), before, strict=True)
    }


def report(model: str, result: dict[str, Any]) -> None:
    """The table, and whether the goals are met."""
    rows = []
    for streams, found in result["streams"].items():
        rates = [f"{found['medians'][name_of(*setting)]:.1f}" for setting in SETTINGS]
        rows.append((streams, *rates, f"{found['ratio']:.3f} ({verdict(found['ratio'] >= GOAL)})"))
    header = ("streams", "1 thread", "2 threads", "1, contended", "2, contended", "2 contended / 1")
    show(f"{model}: tokens/s, medians", header, rows)
    idle = result["idle_cpu"]
    shares = ", ".join(f"{label}: {100 * share:.2f} %" for label, share in idle.items())
    print(f"idle CPU: {shares} ({verdict(max(idle.values()) < IDLE_GOAL)})")


def verdict(met: bool) -> str:
    """In a word."""
    return "met" if met else "missed"


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
