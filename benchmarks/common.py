"""What the serving benchmarks share: a server of their own, the machine's record, results, a table."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.engine.hardware import cpu_features, cpu_name, physical_cores, usable_cpus
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LIBRARIES = ("torch", "transformers", "tokenizers", "numba", "fastapi", "uvicorn", "msgspec", "numpy")
PROMPTS = (
    "Once upon a time, there was a little girl named Lily. She",
    "Tom and his dog went to the park. The dog saw a",
    "One day, a small bird could not fly. He asked",
    "The sun was hot and the children wanted to",
    "Mia found a shiny red ball under the",
    "There was a big storm. The old tree",
    "Ben liked to bake with his mom. They made",
    "A frog lived near the pond. Every morning he",
    "Sara had a blue hat that she loved. But one",
    "The cat was hungry, so it walked to the",
    "In the garden, Sam planted a tiny seed. After",
    "Grandma told a story about a brave",
    "The train went fast over the hill and",
    "Anna was sad because her best friend",
    "A bear and a rabbit wanted to share the",
    "It was night, and the moon looked like a",
)  # fixed: runs are compared


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    pid: int | None  # the gateway's process, if it is ours
    seconds_to_ready: float


@contextlib.contextmanager
def own_server(*arguments: str) -> Iterator[Server]:
    """``nybble serve`` on a free port of 127.0.0.1, until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).with_name("nybble")), "serve", *arguments, "--port", str(port)]
    began = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--drain-delay", "0", "--log-level", "warning"], stdout=subprocess.DEVNULL
    )
    try:
        while not is_ready(url):
            if process.poll() is not None:
                raise SystemExit(f"the server ended with code {process.returncode}: {shlex.join(command)}")
            time.sleep(0.02)
        yield Server(url, process.pid, time.perf_counter() - began)
    finally:
        process.terminate()
        process.wait(60)


def is_ready(url: str) -> bool:
    """Whether /ready answers 200."""
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def get_json(url: str, key: str | None = None) -> Any:
    """The JSON of a GET."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def children(pid: int) -> list[int]:
    """The processes that a process started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return sorted(int(child) for task in tasks for child in task.read_text().split())


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def percentile(values: Sequence[float], share: float) -> float:
    """The value at a share (0 to 1) of the sorted values, interpolated."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def environment() -> dict[str, Any]:
    """What a figure depends on: machine, CPU features, versions, commit, command, load of the machine."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": git.stdout.strip(),
        "command": shlex.join([Path(sys.executable).name, *map(_without_folders, sys.argv)]),
        "cpu": cpu_name(),
        "cpu_features": sorted(cpu_features()),
        "physical_cores": physical_cores(),
        "usable_cpus": usable_cpus(),
        "load_average": list(os.getloadavg()),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def write_results(name: str, results: Mapping[str, Any], of_this_cpu: bool = True) -> Path:
    """Write ``results`` with the environment to benchmarks/results/NAME-CPU.json; the path.

    of_this_cpu: False for what may come from several machines, which is NAME.json.
    """
    machine = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-") or "unknown"
    path = RESULTS / (f"{name}-{machine}.json" if of_this_cpu else f"{name}.json")
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), **results}, indent=1) + "\n", encoding="utf-8")
    return path


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    table = Table(title=title)
    for index, column in enumerate(header):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    Console(width=console.width if console.is_terminal else 110).print(table)


def _without_folders(argument: str) -> str:
    """A command's argument without what is this machine's own: absolute paths shrink to their last part."""
    option, equals, value = argument.rpartition("=")
    return f"{option}{equals}{Path(value).name}" if value.startswith("/") else argument
