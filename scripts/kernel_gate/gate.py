"""Every variant on every target it names: compiled in parallel, read, held to the rules, remembered.

What was found is kept under a hash of all that decides it (the sources of kernels/triton and of this folder,
the variant, the target, the versions of Triton and Python): an unchanged tree compiles nothing again.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from nybble.kernels.triton.variants import Variant

from .compiled import compile_variant, module_of
from .machines import MACHINES
from .rules import broken_rules

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "kernel-gate"


@dataclass(frozen=True)
class Verdict:
    """One variant on one target; ``found``: see ``compile_variant``, empty where it did not compile."""

    variant: Variant
    target: str
    found: dict[str, Any]
    broken: list[str]
    seconds: float


def run(variants: Sequence[Variant], processes: int, cache: Path | None = CACHE) -> list[Verdict]:
    """Verdicts in the order of variants and their targets. ``cache`` None: compile all anew."""
    sources = _digest_of_sources(variants)
    jobs = [(variant, target, sources, cache) for variant in variants for target in variant.targets]
    # The slow ones first: prefill tiles hold most registers.
    order = sorted(range(len(jobs)), key=lambda n: jobs[n][0].decode)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_compile_mode) as pool:
        results = list(pool.map(_judge, [jobs[n] for n in order]))
    by_place = dict(zip(order, results, strict=True))
    return [by_place[n] for n in range(len(jobs))]


def _compile_mode() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    assert not triton.knobs.runtime.interpret


def _judge(job: tuple[Variant, str, str, Path | None]) -> Verdict:
    variant, target, sources, cache = job
    machine = MACHINES[target]
    key = hashlib.sha256(json.dumps([sources, asdict(variant), target], sort_keys=True).encode()).hexdigest()
    path = None if cache is None else cache / f"{key}.json"
    began = time.perf_counter()
    if path is not None and path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
    else:
        try:
            found = compile_variant(variant, machine)
        except Exception as error:  # noqa: BLE001 (whatever the compiler says is the verdict)
            reason = f"does not compile: {type(error).__name__}: {str(error).strip()[-500:]}"
            return Verdict(variant, target, {}, [reason], time.perf_counter() - began)
        if path is not None:
            _write(path, found)
    return Verdict(variant, target, found, broken_rules(variant, machine, found), time.perf_counter() - began)


def _write(path: Path, found: dict[str, Any]) -> None:
    """Whole or not at all: two processes may write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(found), encoding="utf-8")
    partial.replace(path)


def _digest_of_sources(variants: Sequence[Variant]) -> str:
    digest = hashlib.sha256(repr((triton.__version__, sys.version_info[:3])).encode())
    for path in _sources(variants):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _sources(variants: Sequence[Variant]) -> Iterator[Path]:
    yield from sorted((ROOT / "kernels" / "triton").rglob("*.py"))
    yield from sorted(Path(__file__).parent.glob("*.py"))
    for file in sorted({str(module_of(variant).__file__) for variant in variants}):
        yield Path(file)
