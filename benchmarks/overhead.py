"""What the way to the client costs per token: ``python benchmarks/overhead.py``.

The same greedy workload three ways, in turn, round after round: the engine called in this process; the engine
in its own process, behind the socket; the whole server, behind HTTP. The differences of the median times are
what the socket and HTTP cost. Writes benchmarks/results/overhead-CPU.json.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from common import PROMPTS, get_json, own_server, show, spread, write_results
from load import Target, run
from nybble.engine.build import build_engine
from nybble.engine.client import EngineClient
from nybble.engine.config import EngineConfig
from nybble.engine.engine import Engine
from nybble.engine.model_files import resolve_model
from nybble.engine.records import SamplingParams
from nybble.engine.tokenizer import Tokenizer

WAYS = ("engine", "socket", "http")
Way = Callable[[int], Awaitable[None]]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder or hub id; default: the demo")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=128, help="per stream")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with own_server(*([options.model] if options.model else []), "--no-prefix-caching") as server:
        name = get_json(f"{server.url}/v1/models")["data"][0]["id"]
        levels = asyncio.run(compare(Target(server.url, name), options))
    rows = [row(concurrency, level, options.tokens) for concurrency, level in levels.items()]
    header = ("streams", "engine", "+ socket", "+ HTTP", "socket per token", "HTTP per token")
    show("tokens/s each way, and microseconds per token (medians)", header, rows)
    path = write_results("overhead", {"tokens_per_stream": options.tokens, "levels": levels})
    print(f"written: {path}")


async def compare(target: Target, options: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """Seconds of each way at each number of streams."""
    folder = resolve_model(options.model, None)
    config = EngineConfig(str(folder), enable_prefix_caching=False)
    engine, _ = build_engine(config, lambda *_: None)
    client = EngineClient(config)
    await client.start()
    await client.wait_ready()
    try:
        ways = make_ways(engine, client, target, folder, options.tokens)
        return {c: await rounds(ways, c, options.rounds) for c in options.concurrency}
    finally:
        await client.stop()


def make_ways(
    engine: Engine, client: EngineClient, target: Target, folder: Path, num_tokens: int
) -> dict[str, Way]:
    """One function for each way; it runs so many streams to their ends."""
    tokenizer = Tokenizer.from_folder(folder)
    token_ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)

    async def in_process(count: int) -> None:
        engine.generate([token_ids[i % len(token_ids)] for i in range(count)], params)

    async def behind_the_socket(count: int) -> None:
        async def one(index: int) -> None:
            async for _ in client.submit(token_ids[index % len(token_ids)], params):
                pass

        await asyncio.gather(*(one(index) for index in range(count)))

    async def behind_http(count: int) -> None:
        await run(target, [PROMPTS[i % len(PROMPTS)] for i in range(count)], num_tokens, count)

    return dict(zip(WAYS, (in_process, behind_the_socket, behind_http), strict=True))


async def rounds(ways: dict[str, Way], concurrency: int, count: int) -> dict[str, Any]:
    """Interleaved rounds after one of warm-up; seconds per round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(count + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            await way(concurrency)
            if index:
                seconds[name].append(time.perf_counter() - began)
    return {name: {"seconds": values, **spread(values)} for name, values in seconds.items()}


def row(concurrency: int, level: dict[str, Any], num_tokens: int) -> list[str]:
    """One line of the table."""
    tokens = concurrency * num_tokens
    median = {name: statistics.median(level[name]["seconds"]) for name in WAYS}
    level["socket_us_per_token"] = 1e6 * (median["socket"] - median["engine"]) / tokens
    level["http_us_per_token"] = 1e6 * (median["http"] - median["socket"]) / tokens
    rates = [f"{tokens / median[name]:.0f}" for name in WAYS]
    return [
        str(concurrency),
        *rates,
        f"{level['socket_us_per_token']:.0f}",
        f"{level['http_us_per_token']:.0f}",
    ]


if __name__ == "__main__":
    main()
