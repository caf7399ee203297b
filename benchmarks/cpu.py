"""Nybble beside llama.cpp and onnxruntime-genai on the CPU: ``python benchmarks/cpu.py``.

The same weights for all, 4 bit in groups of 32: a Llama shape of 1 B parameters (``--model 1b``), one of
15 M at one thread (``tiny``), the demo model (``demo``). Measured in rounds, engine after engine within
each, greedy:

* decode 1: tokens/s of one stream after its first token, prompt of 16 tokens; what the threads read is
  measured before and after each turn of it;
* decode 8: tokens/s of eight such streams in total, as one batch;
* prefill: prompt tokens/s to the first token of a long prompt (512 tokens; the demo 448);
* first token: milliseconds for a prompt of 128 tokens whose stream goes on after it;
* memory: proportional set size after decode 8, with KV capacity for 8 x 704 tokens (the demo 8 x 512), and
  again with the KV cache filled; ours also as ``nybble serve``, gateway and engine.

Ours is the whole engine, with scheduler, paged KV cache and sampler. Every engine is a process of its own
that idles while others are measured (noted beside each figure, with what the rest of the machine did). The
other engines are measured if interpreters that have them are named:

    python -m venv A && CMAKE_ARGS=-DGGML_NATIVE=ON A/bin/pip install llama-cpp-python gguf numpy
    python -m venv B && B/bin/pip install onnxruntime-genai onnxruntime onnx onnx_ir torch transformers
    python benchmarks/cpu.py --llama-cpp-python A/bin/python --ort-python B/bin/python

(For llama.cpp without AVX-512: CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON
-DGGML_BMI2=ON".) Writes benchmarks/results/cpu-MODEL-CPU.json, and a PNG with matplotlib.
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import PROMPTS, ROOT, get_json, own_server, write_results
from cpu_models import Shape, prepare, shapes, vocab_size
from cpu_report import METRICS, plot, report
from load import LoadError, Target, run
from workers import Disturbance, Worker, tree_proportional_bytes

STREAMS = 8
PROMPT = 16
FIRST_PROMPT = 128


@dataclass
class Contender:
    """One engine in one setting, and what was measured of it."""

    label: str
    worker: Worker
    model: Path
    options: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[dict[str, float]]] = field(default_factory=lambda: {m: [] for m in METRICS})
    memory: dict[str, int] = field(default_factory=dict)


def main() -> None:
    """Measure, print, write."""
    options = parse()
    chosen = list(shapes()) if options.model == "all" else [options.model]
    for name in chosen:
        shape = shapes()[name]
        results = measure_shape(shape, options)
        report(results)
        forced = "" if options.isa == ["auto"] else "-" + "-".join(options.isa)
        path = write_results(f"cpu-{name}{forced}{'-quick' if options.quick else ''}", results)
        print(f"written: {path}")
        plot(results, path.with_suffix(".png"))


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=[*shapes(), "all"], default="1b")
    parser.add_argument("--threads", type=int, help="of every engine; default: 1 for tiny, else all cores")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--decode-repeats", type=int, default=5,
                        help="of decode 1 in a round: it stands at memory's limit, which drifts")  # fmt: skip
    parser.add_argument("--speed-only", action="store_true", help="no full KV cache, no server")
    parser.add_argument("--quick", action="store_true", help="one round of --speed-only")
    kernels = ["auto", "amx", "vnni", "avx2", "torch"]
    parser.add_argument("--isa", nargs="+", choices=kernels, default=["auto"],
                        help="our kernels; several: each is a contender")  # fmt: skip
    parser.add_argument("--lm-head-bits", nargs="+", choices=["none", "8", "4"], default=["none", "4"],
                        help="our output head; several: each is a contender")  # fmt: skip
    parser.add_argument("--activations", choices=["int8", "fp32"], default="int8", help="ours")
    parser.add_argument("--llama-cpp-python", nargs="+", default=[], metavar="[LABEL=]PYTHON",
                        help="interpreters that have llama-cpp-python, gguf and numpy")  # fmt: skip
    parser.add_argument("--llama-unified-kv", action="store_true",
                        help="llama.cpp: one KV cache for all sequences, not one for each")  # fmt: skip
    parser.add_argument("--ort-python", nargs="+", default=[], metavar="[LABEL=]PYTHON",
                        help="interpreters that have onnxruntime-genai, onnx and torch")  # fmt: skip
    parser.add_argument("--models", type=Path, default=ROOT / ".cache" / "bench", help="folder of the models")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.speed_only = 1, True
    return options


def measure_shape(shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one model."""
    threads = options.threads or shape.threads
    with contextlib.ExitStack() as stack:
        made = prepare(shape, options.models, say)
        field_of = [stack_contender(stack, c) for c in contenders(shape, made, options)]
        bandwidth = stack.enter_context(
            Worker("bandwidth", sys.executable, "bandwidth.py", options.models / "logs" / "bandwidth.log")
        )
        for contender in field_of:
            say(f"loading {contender.label}")
            contender.facts = contender.worker.call(
                "load", model=str(contender.model), threads=threads, context=shape.context,
                streams=STREAMS, options=contender.options,
            )  # fmt: skip
        rounds = Rounds(shape, field_of, bandwidth, threads, vocab_size(made))
        rounds.run(options.rounds, options.decode_repeats)
        if not options.speed_only:
            rounds.fill()
    served = None if options.speed_only else served_memory(made / "nybble", shape, threads, options.isa[0])
    return {
        "model": shape.name,
        "title": shape.title,
        "threads": threads,
        "kv_tokens": [STREAMS, shape.context],
        "prefill_tokens": shape.prefill,
        "rounds": rounds.log,
        "missing": missing(options),
        "served_bytes": served,
        "engines": {c.label: {"facts": c.facts, "samples": c.samples, "memory": c.memory} for c in field_of},
    }


def stack_contender(stack: contextlib.ExitStack, contender: Contender) -> Contender:
    """Its process ends with ``stack``."""
    stack.enter_context(contender.worker)
    return contender


def missing(options: argparse.Namespace) -> list[str]:
    """Engines that were not measured."""
    given = {"llama.cpp": options.llama_cpp_python, "onnxruntime-genai": options.ort_python}
    return [name for name, pythons in given.items() if not pythons]


def contenders(shape: Shape, made: Path, options: argparse.Namespace) -> Iterator[Contender]:
    """Ours in every setting that was asked for, then the others; makes their models."""
    logs = options.models / "logs"
    for isa in options.isa:
        for bits in options.lm_head_bits:
            label = "nybble" + ("" if isa == "auto" else f" {isa}")
            label += "" if bits == "none" else f" head{bits}"
            settings: dict[str, Any] = {"cpu_kernels": isa, "cpu_activations": options.activations}
            if bits != "none":
                settings["lm_head_bits"] = int(bits)
            worker = Worker(label, sys.executable, "ours.py", logs / f"{label}.log".replace(" ", "-"))
            yield Contender(label, worker, made / "nybble", settings)
    others = (
        ("llama.cpp", "llama_cpp_worker.py", options.llama_cpp_python, "q4_0.gguf",
         {"unified": options.llama_unified_kv}),
        ("onnxruntime-genai", "ort_worker.py", options.ort_python, "onnx", {}),
    )  # fmt: skip
    for name, script, pythons, file, settings in others:
        for given in pythons:
            suffix, _, python = given.rpartition("=")
            label = f"{name} {suffix}".strip()
            worker = Worker(label, python, script, logs / f"{label}.log".replace(" ", "-"))
            model = made / file
            if not model.exists():
                say(f"{label} makes {model}")
                threads = shape.threads
                worker.call("prepare", folder=str(made / "bf16"), out=str(model), threads=threads)
            yield Contender(label, worker, model, settings)


class Rounds:
    """Measurements in turn."""

    def __init__(
        self, shape: Shape, field_of: list[Contender], bandwidth: Worker, threads: int, vocab: int
    ) -> None:
        self._shape = shape
        self._field = field_of
        self._bandwidth = bandwidth
        self._threads = threads
        self._vocab = vocab
        self._random = random.Random(0)
        self._turns = itertools.count()
        self.log: list[dict[str, Any]] = []

    def _prompts(self, count: int, length: int) -> list[list[int]]:
        return [[self._random.randrange(4, self._vocab) for _ in range(length)] for _ in range(count)]

    def run(self, count: int, repeats: int) -> None:
        """A round of warm-up, then ``count`` of them; the engines' order rotates. repeats: of decode 1."""
        for index in range(count + 1):
            if index:
                say(f"round {index} of {count}")
            before = list(os.getloadavg())
            for metric in METRICS:
                for _ in range(repeats if metric == "decode1" else 1):
                    self._turn(metric, keep=index > 0)
            if index:
                self.log.append({"load_before": before, "load_after": list(os.getloadavg())})
        for contender in self._field:
            self._decode_eight(contender)
            contender.memory["after_decode8"] = contender.worker.proportional_bytes()

    def _turn(self, metric: str, *, keep: bool) -> None:
        """One metric of every engine, with the same prompts."""
        shape = self._shape
        prompts, new_tokens = {
            "decode1": (self._prompts(1, PROMPT), shape.decode),
            "decode8": (self._prompts(STREAMS, PROMPT), shape.decode_batch),
            "prefill": (self._prompts(1, shape.prefill), 1),
            "first": (self._prompts(1, FIRST_PROMPT), 4),
        }[metric]
        start = next(self._turns) % len(self._field)
        workers = [contender.worker for contender in self._field] + [self._bandwidth]
        for contender in self._field[start:] + self._field[:start]:
            before = self._read_rate(contender) if metric == "decode1" else 0.0
            disturbance = Disturbance(contender.worker, workers)
            reply = contender.worker.call("generate", prompts=prompts, new_tokens=new_tokens)
            sample = {"value": value(metric, reply, len(prompts[0])), **disturbance.stop()}
            if metric == "decode1":
                sample["read"] = (before + self._read_rate(contender)) / 2
            if keep:
                contender.samples[metric].append(sample)

    def _read_rate(self, contender: Contender) -> float:
        """Bytes per second that the threads read now, of as many bytes as the contender reads per token.

        It drifts by a half within seconds; and a last cache may hold a part of what is read again and again.
        """
        size = contender.facts["bytes_per_token"]
        reply = self._bandwidth.call("measure", threads=self._threads, num_bytes=size, seconds=0.5)
        return float(reply["bytes_per_second"])

    def _decode_eight(self, contender: Contender) -> None:
        prompts = self._prompts(STREAMS, PROMPT)
        contender.worker.call("generate", prompts=prompts, new_tokens=self._shape.decode_batch)

    def fill(self) -> None:
        """Memory when every KV slot has been written."""
        for contender in self._field:
            say(f"filling the KV cache of {contender.label}")
            prompts = self._prompts(STREAMS, self._shape.context - 8)
            contender.worker.call("generate", prompts=prompts, new_tokens=8)
            contender.memory["kv_full"] = contender.worker.proportional_bytes()


def value(metric: str, reply: dict[str, Any], prompt_tokens: int) -> float:
    """Tokens per second; of "first", milliseconds."""
    if metric == "first":
        return 1000 * float(reply["first_seconds"])
    if metric == "prefill":
        return prompt_tokens / float(reply["first_seconds"])
    return float(reply["decode_tokens"] / reply["decode_seconds"])


def served_memory(model: Path, shape: Shape, threads: int, isa: str) -> int:
    """PSS of ``nybble serve``'s processes, gateway and engine, after eight streams."""
    say("memory of nybble serve")
    arguments = ["--max-num-seqs", str(STREAMS), "--max-model-len", str(shape.context), "--cpu-kernels", isa]
    with own_server(str(model), *arguments, "--num-threads", str(threads)) as server:
        name = get_json(f"{server.url}/v1/models")["data"][0]["id"]
        try:
            asyncio.run(run(Target(server.url, name), PROMPTS[:STREAMS], shape.decode_batch, STREAMS))
        except* LoadError as failed:
            # Random weights may write no whole character; the memory was used all the same.
            say(f"streams without text: {len(failed.exceptions)}")
        assert server.pid is not None
        return tree_proportional_bytes(server.pid)


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
