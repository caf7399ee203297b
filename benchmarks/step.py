"""A step as a tape against op by op, and what HTTP adds: ``python benchmarks/step.py``.

Microseconds per decode step of the whole engine (scheduler, model, sampler) on the demo model, greedy, with
one stream and with eight: over torch's ops one by one ("eager"), as a tape in the exact mode (both compute
the same in float32), as a tape as served (int8 activations); then tokens/s as ``nybble serve`` streams them
over HTTP, as microseconds per step. The tokens of the exact tape are asserted to be those of the eager
decoder. Rounds are interleaved; medians. Writes benchmarks/results/step-CPU.json.
"""

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

from common import PROMPTS, get_json, own_server, show, spread, write_results
from load import Target, run
from nybble.engine.build import build_engine
from nybble.engine.config import EngineConfig
from nybble.engine.engine import Engine
from nybble.engine.model_files import resolve_model
from nybble.engine.records import EngineRequest, SamplingParams
from nybble.engine.tokenizer import Tokenizer

ENGINES: dict[str, dict[str, Any]] = {
    "eager": {"dtype": "float32", "cpu_kernels": "torch"},
    "exact tape": {"dtype": "float32"},
    "tape": {},
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder or hub id; default: the demo")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128, help="per stream")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: the engine's")
    options = parser.parse_args()
    folder = resolve_model(options.model, None)
    engines = {name: build(folder, options.threads, **own) for name, own in ENGINES.items()}
    arguments = [str(folder), "--no-prefix-caching"]
    arguments += ["--num-threads", str(options.threads)] if options.threads else []
    with own_server(*arguments) as server:
        target = Target(server.url, get_json(f"{server.url}/v1/models")["data"][0]["id"])
        bench = Bench(engines, target, Tokenizer.from_folder(folder), options.tokens)
        found = {str(count): bench.rounds(count, options.rounds) for count in options.streams}
    names = [*ENGINES, "HTTP"]
    rows = [(count, *(f"{level[name]['median']:.0f}" for name in names)) for count, level in found.items()]
    show("microseconds per step, medians", ("streams", *names), rows)
    print(f"written: {write_results('step', {'tokens_per_stream': options.tokens, 'streams': found})}")


def build(folder: Path, threads: int | None, **options: Any) -> Engine:
    """An engine in this process."""
    config = EngineConfig(str(folder), "cpu", num_threads=threads, enable_prefix_caching=False, **options)
    return build_engine(config, lambda *_: None)[0]


class Bench:
    """The same streams in every way."""

    def __init__(self, engines: dict[str, Engine], target: Target, tokenizer: Tokenizer, tokens: int) -> None:
        self._engines = engines
        self._target = target
        self._prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
        self._tokens = tokens
        self._params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)

    def rounds(self, streams: int, count: int) -> dict[str, Any]:
        """``count`` rounds after one of warm-up; asserts that eager and exact tape agree."""
        samples: dict[str, list[float]] = {name: [] for name in (*self._engines, "HTTP")}
        for index in range(count + 1):
            tokens: dict[str, list[list[int]]] = {}
            for name, engine in self._engines.items():
                seconds, tokens[name] = self._decode(engine, streams)
                samples[name].append(1e6 * seconds)
            samples["HTTP"].append(1e6 * asyncio.run(self._over_http(streams)))
            if tokens["exact tape"] != tokens["eager"]:
                raise SystemExit(f"{streams} streams: the tape's tokens are not those of the eager decoder")
            if index == 0:
                samples = {name: [] for name in samples}
        found: dict[str, Any] = {name: {"us": us, **spread(us)} for name, us in samples.items()}
        return found | {"identical_tokens": streams * self._tokens}

    def _decode(self, engine: Engine, streams: int) -> tuple[float, list[list[int]]]:
        """Seconds per step after the first (which takes the prompts), and the tokens."""
        for index in range(streams):
            engine.add(EngineRequest(index, self._prompts[index % len(self._prompts)], self._params))
        tokens: list[list[int]] = [[] for _ in range(streams)]
        steps, began = 0, 0.0
        while engine.has_work:
            for output in engine.step():
                tokens[output.request_id] += output.token_ids
            if steps == 0:
                began = time.perf_counter()
            steps += 1
        return (time.perf_counter() - began) / (steps - 1), tokens

    async def _over_http(self, streams: int) -> float:
        """Seconds per token of each stream, from sending the first request to the last token."""
        prompts = [PROMPTS[index % len(PROMPTS)] for index in range(streams)]
        began = time.perf_counter()
        await run(self._target, prompts, self._tokens, streams)
        return (time.perf_counter() - began) / self._tokens


if __name__ == "__main__":
    main()
