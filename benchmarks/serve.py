"""OpenAI streaming load on the demo model: ``make bench``, or ``python benchmarks/serve.py --url URL``.

For each number of concurrent streams: time to first token, inter-token latency, tokens per second. Starts
its own server unless --url is given. Writes benchmarks/results/serve-CPU.json, and a PNG with matplotlib.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import itertools
from pathlib import Path
from typing import Any

from common import PROMPTS, Server, get_json, own_server, percentile, show, spread, write_results
from load import Stream, Target, run


def main() -> None:
    """Measure, print, write."""
    options = parse()
    with contextlib.ExitStack() as stack:
        if options.url:
            server = Server(options.url.rstrip("/"), None, 0.0)
        else:
            server = stack.enter_context(
                own_server(*([options.model] if options.model else []), *options.serve)
            )
        name = get_json(f"{server.url}/v1/models", options.api_key)["data"][0]["id"]
        target = Target(server.url, name, options.api_key)
        asyncio.run(run(target, prompts(max(options.concurrency)), 8, max(options.concurrency)))  # warm-up
        levels = {c: measure(target, c, options) for c in options.concurrency}
    rows = [row(concurrency, level) for concurrency, level in levels.items()]
    header = ("streams", "TTFT p50", "p90", "p99", "ITL p50", "p90", "p99", "tokens/s", "least - most")
    show(f"{name}: {options.tokens} tokens per stream, ms", header, rows)
    path = write_results(
        "serve",
        {"model": name, "tokens_per_stream": options.tokens, "rounds": options.rounds, "levels": levels},
    )
    print(f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    if importlib.util.find_spec("matplotlib"):
        plot(levels, path.with_suffix(".png"))


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a running server; default: start one with the demo model")
    parser.add_argument("--model", help="for a server of its own: a folder or hub id; default: the demo")
    parser.add_argument("--api-key")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=128, help="per stream")
    parser.add_argument("--requests", type=int, default=4, help="per stream of concurrency, in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="options for its own server")
    return parser.parse_args()


def prompts(count: int) -> list[str]:
    """The fixed prompts, over and over."""
    return list(itertools.islice(itertools.cycle(PROMPTS), count))


def measure(target: Target, concurrency: int, options: argparse.Namespace) -> dict[str, Any]:
    """All rounds at one number of streams. Seconds; tokens per second."""
    streams: list[Stream] = []
    rates = []
    for _ in range(options.rounds):
        batch = prompts(options.requests * concurrency)
        done = asyncio.run(run(target, batch, options.tokens, concurrency))
        seconds = max(s.arrivals[-1] for s in done) - min(s.sent for s in done)
        rates.append(sum(s.num_tokens for s in done) / seconds)
        streams += done
    first = [s.first for s in streams]
    gaps = [gap for s in streams for gap in s.gaps]
    return {
        "requests": len(streams),
        "tokens": sum(s.num_tokens for s in streams),
        "ttft": {f"p{int(100 * p)}": percentile(first, p) for p in (0.5, 0.9, 0.99)},
        "itl": {f"p{int(100 * p)}": percentile(gaps, p) for p in (0.5, 0.9, 0.99)},
        "tokens_per_second": spread(rates),
    }


def row(concurrency: int, level: dict[str, Any]) -> list[str]:
    """One line of the table, in milliseconds."""
    times = [f"{1000 * level[kind][p]:.2f}" for kind in ("ttft", "itl") for p in ("p50", "p90", "p99")]
    rate = level["tokens_per_second"]
    return [str(concurrency), *times, f"{rate['median']:.0f}", f"{rate['min']:.0f} - {rate['max']:.0f}"]


def plot(levels: dict[int, dict[str, Any]], path: Path) -> None:
    """Throughput and latency over concurrency."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    streams = list(levels)
    left.plot(streams, [level["tokens_per_second"]["median"] for level in levels.values()], marker="o")
    left.set(xlabel="concurrent streams", ylabel="tokens/s", title="throughput", xscale="log", ylim=(0, None))
    for kind, label in (("ttft", "first token"), ("itl", "between tokens")):
        for p, style in (("p50", "-"), ("p99", ":")):
            values = [1000 * level[kind][p] for level in levels.values()]
            right.plot(streams, values, style, marker="o", label=f"{label}, {p}")
    right.set(xlabel="concurrent streams", ylabel="ms", title="latency", xscale="log", yscale="log")
    right.legend(fontsize="small")
    for axes in (left, right):
        axes.set_xticks(streams, [str(c) for c in streams])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
