"""From the start of the process to the first token; memory; CPU when idle: ``python benchmarks/startup.py``.

Writes benchmarks/results/startup-CPU.json. The first start may read the disk; the others are warm.
"""

import argparse
import asyncio
import time
from typing import Any

from common import children, cpu_seconds, get_json, own_server, resident_bytes, show, spread, write_results
from load import Target, stream

IDLE_SECONDS = 10.0


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder or hub id; default: the demo")
    parser.add_argument("--starts", type=int, default=5)
    options = parser.parse_args()
    arguments = [options.model] if options.model else []
    starts = [one_start(arguments, idle=index == options.starts - 1) for index in range(options.starts)]
    last = starts[-1]
    warm = spread([start["first_token"] for start in starts[1:] or starts])
    show(
        f"{options.starts} starts",
        ("what", "value"),
        [
            ("first start: first token", f"{starts[0]['first_token']:.2f} s"),
            ("warm: first token", f"{warm['median']:.2f} s ({warm['min']:.2f} - {warm['max']:.2f})"),
            ("gateway, resident", f"{last['gateway_bytes'] / 1e6:.0f} MB"),
            ("engine, resident", f"{last['engine_bytes'] / 1e6:.0f} MB"),
            ("idle CPU, gateway", f"{100 * last['idle_gateway']:.2f} %"),
            ("idle CPU, engine", f"{100 * last['idle_engine']:.2f} %"),
        ],
    )  # fmt: skip
    print(f"written: {write_results('startup', {'starts': starts, 'warm_first_token': warm})}")


def one_start(arguments: list[str], *, idle: bool) -> dict[str, Any]:
    """Start, one token, memory after it; shares of one CPU when idle."""
    began = time.perf_counter()
    with own_server(*arguments) as server:
        name = get_json(f"{server.url}/v1/models")["data"][0]["id"]
        done = asyncio.run(stream(Target(server.url, name), "Once upon a time", 16))
        result = {"ready": server.seconds_to_ready, "first_token": done.arrivals[0] - began}
        if server.pid is None or not idle:
            return result
        engines = children(server.pid)
        result["gateway_bytes"] = resident_bytes(server.pid)
        result["engine_bytes"] = sum(map(resident_bytes, engines))
        time.sleep(1.0)  # let it settle
        before = cpu_seconds(server.pid), sum(map(cpu_seconds, engines))
        time.sleep(IDLE_SECONDS)
        result["idle_gateway"] = (cpu_seconds(server.pid) - before[0]) / IDLE_SECONDS
        result["idle_engine"] = (sum(map(cpu_seconds, engines)) - before[1]) / IDLE_SECONDS
        return result


if __name__ == "__main__":
    main()
