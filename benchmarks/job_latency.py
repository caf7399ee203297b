"""A quantization job beside a stream on the same server: ``python benchmarks/job_latency.py``.

A Llama of 108 M parameters (random weights) is served, in bf16 as it is and in 4 bit, by ``nybble serve``
with --models-dir and --admin-key. Streams, one after another, are measured alone, beside a plain process
that keeps one thread busy, and beside a job posted to /v1/quantizations (GPTQ, 4 bit, calibrated on the
package's text), in rounds, in an order that rotates. A job makes some blocks beside the streams and as many
alone, first the one or the other by turns; its speed is read from the times at which it wrote them. Goals:
the p95 inter-token latency beside the job is at most 1.25 times that beside the busy process, and the job
keeps half of its speed.

Then a job runs to its end while its process's memory is watched; ``job_client.bound`` says what it may take.
Writes benchmarks/results/jobs-SERVED-CPU.json.
"""

import argparse
import asyncio
import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import PROMPTS, ROOT, Server, get_json, own_server, percentile, show, write_results
from contention import spinning, verdict
from cpu_models import Shape, llama, prepare
from job_client import Job, bound, empty_process, wait
from load import Target, stream
from nybble.engine.tokenizer import Tokenizer

LATENCY_GOAL, SPEED_GOAL = 1.25, 0.5
CONDITIONS = ("alone", "busy", "job")
SHAPE = Shape(
    "jobs", "Llama shape of 108 M parameters, random weights",
    llama(768, 12, (12, 12, 64), 2816, 10000.0) | {"vocab_size": 2048},  # the tokenizer's
    2, 512, 0, 0, 0,
)  # fmt: skip
KEY = "admin"
TOKENS = 64  # of a stream; the next one follows at once
JOB_SECONDS = 240.0  # a few blocks take less, even beside a stream
JOB = {"model": "bf16", "method": "gptq", "bits": 4, "group_size": 128, "report": False}
SHORT = {"num_samples": 8}  # for speed; its memory is watched with all of the text


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--served", nargs="+", choices=("bf16", "4bit"), default=["bf16", "4bit"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of streams alone and beside the process")
    parser.add_argument(
        "--blocks", type=int, default=2, help="that a job makes beside the streams, and alone"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "bench", help="of the models")
    options = parser.parse_args()
    made = prepare(SHAPE, options.folder, say)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:  # no job of an earlier run is in it
        models_dir = Path(folder)
        for name, source in (("bf16", "bf16"), ("4bit", "nybble")):
            shutil.copytree(made / source, models_dir / name, copy_function=os.link)
        for name in options.served:
            with server_of(models_dir, name) as server:
                found = measure(server, models_dir, options)
                memory = measure_memory(server, models_dir)
            report(name, found, memory)
            results = {"title": SHAPE.title, "job": JOB | SHORT, **found, "memory": memory}
            print(f"written: {write_results(f'jobs-{name}', results)}")


def server_of(models_dir: Path, name: str) -> contextlib.AbstractContextManager[Server]:
    """One that serves a model of ``models_dir`` and takes jobs."""
    folder = models_dir / name
    return own_server(
        str(folder), "--served-model-name", name, "--models-dir", str(models_dir), "--admin-key", KEY
    )


def measure(server: Server, models_dir: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All rounds on one served model."""
    bench = Bench(server, models_dir, options)
    bench.warm_up()
    rounds = [bench.round(index) for index in range(options.rounds)]
    medians = {c: statistics.median(one[c]["p95"] for one in rounds) for c in CONDITIONS}
    alone, beside = (
        statistics.median(one["job"][f"seconds_{how}"] for one in rounds) for how in ("alone", "beside")
    )
    return {
        "p95_seconds": medians,
        "ratio": medians["job"] / medians["busy"],
        "block_seconds": {"alone": alone, "beside": beside},
        "speed_kept": alone / beside,
        "rounds": rounds,
    }


class Bench:
    """Measurements on one server."""

    def __init__(self, server: Server, models_dir: Path, options: argparse.Namespace) -> None:
        self._server, self._models_dir = server, models_dir
        self._seconds, self._blocks = options.seconds, options.blocks
        model = get_json(f"{server.url}/v1/models", KEY)["data"][0]["id"]
        self._target = Target(server.url, model, KEY)
        self._streams = 0
        # Greedy tokens of random weights are often parts of characters, and those make no event.
        word = Tokenizer.from_folder(models_dir / "bf16").encode(" dog")[-1]
        self._bias = {str(word): 100}

    def warm_up(self) -> None:
        """Streams that count for nothing."""
        self._stream_until(_after(self._seconds))

    def round(self, index: int) -> dict[str, Any]:
        """Every condition once."""
        say(f"{self._target.model}: round {index + 1}")
        start = index % len(CONDITIONS)
        found: dict[str, Any] = {}
        for condition in CONDITIONS[start:] + CONDITIONS[:start]:
            if condition == "job":
                found[condition] = self._beside_job(index)
            else:
                with spinning(None) if condition == "busy" else contextlib.nullcontext():
                    found[condition] = self._stream_until(_after(self._seconds))
        say(
            "  " + ", ".join(f"{c}: {1e3 * found[c]['p95']:.1f} ms" for c in CONDITIONS) + f"; {found['job']}"
        )
        return found

    def _beside_job(self, index: int) -> dict[str, Any]:
        """Streams beside some blocks of a job, which makes as many alone before or after."""
        job = Job.post(self._server, KEY, self._models_dir, JOB | SHORT | {"output": f"out-{index}"})
        try:
            made = self._blocks_more(job, 1)  # a warm-up for the job
            if index % 2:
                alone = self._alone(job)
            made = len(job.finished())
            found = self._stream_until(lambda: len(job.finished()) >= made + 1 + self._blocks)
            times = job.finished()
            found["seconds_beside"] = (times[made + self._blocks] - times[made]) / self._blocks
            if not index % 2:
                alone = self._alone(job)
        finally:
            job.cancel()
        return found | {"seconds_alone": alone}

    def _alone(self, job: Job) -> float:
        """Seconds per block, after one that the last condition may have reached into."""
        made = self._blocks_more(job, 1 + self._blocks)
        times = job.finished()
        return (times[made - 1] - times[made - 1 - self._blocks]) / self._blocks

    def _blocks_more(self, job: Job, count: int) -> int:
        """Wait for so many more; how many there are then."""
        made = len(job.finished()) + count
        wait(lambda: len(job.finished()) >= made, JOB_SECONDS, f"{made} finished blocks")
        return made

    def _stream_until(self, over: Callable[[], bool]) -> dict[str, Any]:
        """Whole streams, one after another, until it is over: quantiles of the gaps between tokens."""
        gaps: list[float] = []
        tokens = 0
        while not over():
            self._streams += 1
            prompt = PROMPTS[self._streams % len(PROMPTS)]
            done = asyncio.run(stream(self._target, prompt, TOKENS, logit_bias=self._bias))
            tokens += TOKENS
            gaps += done.gaps
        return {
            "p50": statistics.median(gaps),
            "p95": percentile(gaps, 0.95),
            "gaps": len(gaps),
            "tokens": tokens,
        }


def _after(seconds: float) -> Callable[[], bool]:
    """Whether so many seconds have passed since now."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def measure_memory(server: Server, models_dir: Path) -> dict[str, Any]:
    """A whole job's process: its peak, and what it may hold."""
    say("memory of a whole job")
    assert SHAPE.config is not None
    job = Job.post(server, KEY, models_dir, JOB | {"output": "whole"})
    most = job.watch_memory(SHAPE.config["num_hidden_layers"])
    num_tokens = job.now()["result"]["meta"]["calibration"]["tokens"]
    shutil.rmtree(models_dir / "whole")
    return {
        "peak_bytes": most,
        "empty_process_bytes": empty_process(),
        "bound_bytes": bound(SHAPE.config, num_tokens),
        "calibration_tokens": num_tokens,
    }


def report(name: str, found: dict[str, Any], memory: dict[str, Any]) -> None:
    """The table, and whether the goals are met."""
    p95 = [f"{1e3 * found['p95_seconds'][condition]:.1f} ms" for condition in CONDITIONS]
    ratio = f"{found['ratio']:.2f} ({verdict(found['ratio'] <= LATENCY_GOAL)})"
    seconds = [f"{found['block_seconds'][how]:.2f} s" for how in ("alone", "beside")]
    kept = f"{100 * found['speed_kept']:.0f} % ({verdict(found['speed_kept'] >= SPEED_GOAL)})"
    header = ("alone", "busy", "job", "job / busy", "a block alone", "beside", "speed kept")
    title = f"{name}: p95 inter-token latency, and the job's seconds per block (medians)"
    show(title, header, [(*p95, ratio, *seconds, kept)])
    limit = memory["bound_bytes"]
    peak = memory["peak_bytes"]["blocks"] - memory["empty_process_bytes"]
    parts = ", ".join(f"{name.replace('_', ' ')} {size / 1e6:.0f}" for name, size in limit.items())
    print(
        f"the job's process at its peak: {peak / 1e6:.0f} MB above an empty one of "
        f"{memory['empty_process_bytes'] / 1e6:.0f}; bound, MB: {parts} "
        f"({verdict(peak <= limit['together'])})"
    )


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
