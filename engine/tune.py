"""``nybble tune``: launch configurations for the GPU at hand, and kernels compiled ahead of serving."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

from ..kernels.triton.launch import Machine, use_tuned
from ..kernels.triton.linear import keep_compiled, warm
from ..kernels.triton.tuning import (
    KINDS,
    Contest,
    DoesNotRun,
    Measure,
    Winner,
    contests,
    hold,
    rehearsed,
    write,
)
from .config import EngineConfig
from .errors import ConfigError, EngineError
from .formats.registry import format_of, open_tensors
from .hardware import cache_folder, usable_cpus
from .model.layers import Linear
from .model.loader import LoadedModel, load_model, resolve_target
from .model_files import ModelFiles

Progress = Callable[[str, int, int], None]
Log = Callable[[str], None]
REHEARSED = Machine("rehearsal", "sm_90", 132)


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """kinds: of ``KINDS``; out: a folder, else ``tuned_folder``; rehearse: no GPU, times are made up."""

    kinds: Sequence[str] = ("w4",)
    dtype: Literal["float16", "bfloat16"] = "bfloat16"
    out: str | None = None
    rehearse: bool = False

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise ConfigError(f"--kind {kind}: use some of {', '.join(KINDS)}")
        if not self.kinds:
            raise ConfigError("--kind: name at least one")
        if self.dtype not in ("float16", "bfloat16"):
            raise ConfigError(f"--dtype {self.dtype}: use float16 or bfloat16")


def tuned_folder() -> Path:
    """Where ``nybble tune`` writes and every server of this user reads."""
    return cache_folder() / "tuned"


def read_tuned() -> None:
    """Take this user's launch configurations from now on. Errors: ConfigError for a broken file."""
    try:
        use_tuned(tuned_folder())
    except ValueError as error:
        raise ConfigError(f"{error}; remove it, or make it anew with nybble tune") from error


def tune(options: TuneOptions, progress: Progress, log: Log) -> dict[str, Any]:
    """Measure, choose, write. Errors: ConfigError where no GPU is or it has no kernels."""
    machine = REHEARSED if options.rehearse else _this_gpu()
    started = time.monotonic()
    try:
        wanted = list(contests(machine, options.kinds))
    except LookupError as error:
        raise ConfigError(f"tune: {error}") from error
    if options.rehearse:
        winners = _hold_all(wanted, rehearsed(machine), lambda contest: None, progress, log)
    else:
        keep_compiled(cache_folder())
        bench = import_module("..kernels.triton.tuning_bench", __package__).Bench
        measure = bench.of_this_gpu(getattr(torch, options.dtype))
        threads = max(1, int(usable_cpus()))
        winners = _hold_all(wanted, measure, lambda contest: measure.compile(contest, threads), progress, log)
    folder = tuned_folder() if options.out is None else Path(options.out).expanduser()
    environment = {
        "rehearsal": options.rehearse, "dtype": options.dtype, "torch": torch.__version__,
        "cuda": torch.version.cuda, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    path = write(folder, machine, winners, environment)
    return {
        "gpu": machine.name,
        "path": str(path),
        "rules": [{**w.rule, "gain": w.gain, "failed": len(w.failed)} for w in winners],
        "read": folder == tuned_folder(),
        "seconds": time.monotonic() - started,
    }


def _hold_all(
    wanted: list[Contest],
    measure: Measure,
    prepare: Callable[[Contest], None],
    progress: Progress,
    log: Log,
) -> list[Winner]:
    total = sum(len(contest.candidates) * len(contest.problems) for contest in wanted)
    done, winners = 0, []

    def tell() -> None:
        nonlocal done
        done += 1
        progress("tune", done, total)

    for contest in wanted:
        prepare(contest)
        try:
            winner = hold(contest, measure, tell)
        except DoesNotRun as error:
            raise EngineError(
                f"tune: {contest.kind}: the default {contest.default} does not run: {error}"
            ) from error
        winners.append(winner)
        log(_line(winner))
    return winners


def _line(winner: Winner) -> str:
    contest, launch = winner.contest, winner.launch
    size = "any size" if contest.weights is None else f"up to {contest.weights} weights"
    tokens = "more tokens" if contest.bound is None else f"up to {contest.bound} tokens"
    tile = f" {launch.BM}x{launch.BN}, {launch.warps} warps, {launch.stages} stages" if launch.BM else ""
    kept = "the default" if launch == contest.default else f"{winner.gain:.2f} times the default's speed"
    reasons = {reason for _, reason in winner.failed}
    failed = f"; {len(winner.failed)} did not run ({sorted(reasons)[0]})" if reasons else ""
    return f"{contest.kind}, {tokens}, {size}: {launch.kernel}{tile} ({kept}){failed}"


def _this_gpu() -> Machine:
    try:
        return Machine.of("cuda")
    except LookupError as error:
        built = "a CPU build" if torch.version.cuda is None and torch.version.hip is None else "a GPU build"
        raise ConfigError(
            f"tune: no GPU: torch {torch.__version__} ({built}) sees none; run it on the machine that "
            "serves, or add --rehearse to go through it with made-up times"
        ) from error


def compile_model(config: EngineConfig, progress: Progress, log: Log) -> dict[str, Any]:
    """Load ``config.model`` on the GPU and compile every kernel that serving it may launch."""
    machine = _this_gpu()
    read_tuned()
    folder = keep_compiled(cache_folder())
    files = ModelFiles(Path(config.model))
    with open_tensors(files, checkpoint_format := format_of(files)) as tensors:
        target = resolve_target(config, checkpoint_format, tensors.tensors)
    loaded = load_model(files, config, lambda phase, done, total, line: progress(phase, done, total), target)
    started = time.monotonic()
    count = warm(packed_linears(loaded), target, config.max_num_batched_tokens, max(1, int(usable_cpus())))
    log(f"{machine.name}: {loaded.report.main_kernel}")
    return {"kernels": count, "seconds": time.monotonic() - started, "folder": str(folder)}


def packed_linears(loaded: LoadedModel) -> list[Any]:
    """All linears of a model, as their kernels packed them."""
    return [part for weight in loaded.weights.values() if isinstance(weight, Linear) for part in weight.parts]
