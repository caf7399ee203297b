"""From a configuration to an engine that can serve: device, threads, weights, KV cache, first forward."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..kernels.cpu.contention import waits_are_counted
from ..kernels.dispatch import Ops, Target
from ..kernels.triton.linear import keep_compiled, warm
from .check import check_weights_fit, estimate_weights, free_memory
from .config import EngineConfig
from .engine import Engine
from .errors import ConfigError
from .formats.registry import format_of
from .hardware import cache_folder, cpu_features, cpu_name, default_threads, process_memory, usable_cpus
from .memory import plan_kv_cache, resolve_max_model_len
from .model.config import ModelConfig
from .model.decoder import Decoder
from .model.loader import LoadedModel, load_model, resolve_target
from .model.plan import open_model, weight_plan
from .model.served_head import head_rounder
from .model_files import ModelFiles
from .plan import NewSequence, ScheduledSequence, StepPlan
from .records import ModelInfo, SamplingParams
from .runner import Runner
from .step_model import EagerModel, StepModel, kv_cache_dtype, tape_refusal
from .tune import packed_linears, read_tuned

Progress = Callable[[str, int, int, str], None]
_WARM_UP_ID = -1  # no sequence of the engine has it


def build_engine(config: EngineConfig, progress: Progress) -> tuple[Engine, ModelInfo]:
    """Load ``config.model`` and make it ready. ``progress(phase, done, total, line)`` is told how far it is.

    Errors: ConfigError for options and models that cannot work, before memory runs out where possible.
    """
    clock = _Clock()
    num_threads = config.num_threads or default_threads()
    _set_threads(num_threads)
    files = ModelFiles(Path(config.model))
    max_model_len = resolve_max_model_len(config, files.max_model_len())
    eos_token_ids = files.eos_token_ids()
    target = _with_kernels(_plan_load(files, config))
    clock.lap("check")
    loaded = load_model(files, config, progress, target, head_rounder(config))
    clock.lap("weights")
    _compile_ahead(loaded, config, target, progress, clock)
    tape = _tape_module(loaded, config, progress, clock)
    specs = loaded.config.kv_specs(kv_cache_dtype(target, compiled=tape is not None))
    kv = plan_kv_cache(specs, config, max_model_len, _free_memory(config, target))
    progress("kv cache", 1, 1, kv.line())
    clock.lap("kv_cache")
    if tape is None:
        decoder = Decoder(loaded.config, loaded.weights, Ops.resolve(target), target.activation_dtype)
        model: StepModel = EagerModel(decoder, specs, kv.num_blocks, config.block_size)
    else:
        tape.tell_of_compilation(progress)
        known = replace(config, max_model_len=max_model_len)
        model = tape.build_tape_model(loaded, specs, kv.num_blocks, known, num_threads)
        # torch's threads spin between its few small calls: beside the tape's, they halve 8 streams' speed.
        torch.set_num_threads(1)
    clock.lap("kv_cache" if tape is None else "kernels")  # which are compiled or found, tried, recorded
    runner = Runner(model, eos_token_ids, config.seed)
    length = min(config.block_size, max_model_len - 1, config.max_num_batched_tokens)
    _warm_up(runner, len(specs), max(1, length - 1), loaded)
    progress("warm-up", 1, 1, "")
    clock.lap("warm_up")
    vocab = loaded.config.vocab_size
    engine = Engine(config, runner, specs, kv.num_blocks, max_model_len, eos_token_ids, vocab)
    spec = loaded.format.default_spec
    info = ModelInfo(
        architecture=loaded.config.architecture,
        dtype=str(target.dtype).removeprefix("torch."),
        device=target.device,
        quant_method=loaded.format.quant_method,
        bits=target.dtype.itemsize * 8 if spec is None else spec.num_bits,
        group_size=0 if spec is None else spec.group_size,
        kernel=loaded.report.main_kernel,
        vocab_size=vocab,
        max_model_len=max_model_len,
        eos_token_ids=eos_token_ids,
        weight_bytes=loaded.report.weight_bytes,
        kv_bytes=kv.bytes,
        num_kv_blocks=kv.num_blocks,
        block_size=config.block_size,
        num_threads=num_threads,
        load_seconds=clock.total,
        startup_seconds=clock.laps,
        cpu_features=_cpu_line(),
    )
    return engine, info


def _with_kernels(target: Target) -> Target:
    """For a GPU: the cache of compiled kernels, and this user's launch configurations, before any kernel."""
    if not target.is_cpu:
        keep_compiled(cache_folder())
        read_tuned()
    return target


def _compile_ahead(
    loaded: LoadedModel, config: EngineConfig, target: Target, progress: Progress, clock: "_Clock"
) -> None:
    """Compile every GPU kernel that a linear may launch, so that no request waits."""
    count = warm(packed_linears(loaded), target, config.max_num_batched_tokens, max(1, int(usable_cpus())))
    if count:
        progress("kernels", count, count, f"{count} kernels compiled or found in Triton's cache")
        clock.lap("kernels")


def _tape_module(loaded: LoadedModel, config: EngineConfig, progress: Progress, clock: "_Clock") -> Any:
    """``tape_model`` (it imports numba) where compiled kernels took all linears, else None; says why."""
    kernels = [layer.kernel for layer in loaded.report.layers]
    reason = tape_refusal(kernels, config.block_size, loaded.config.head_dim)
    if reason is None:
        if torch.get_num_threads() > 1 and not waits_are_counted():
            progress("kv cache", 0, 1, "no schedstat: threads stay on beside foreign busy processes")
        module = import_module(".tape_model", __package__)
        clock.lap("kernels")
        return module
    progress("kv cache", 0, 1, f"steps run op by op, not as a tape: {reason}")
    return None


class _Clock:
    """Seconds per phase, in order; a phase may come back."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        now = time.monotonic()
        self.laps[phase] = self.laps.get(phase, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        return self._last - self._started


def _set_threads(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    if torch.get_num_interop_threads() != 1:
        # Refused once this process has used that pool (a test, a notebook): it then merely has idle threads.
        with contextlib.suppress(RuntimeError):
            torch.set_num_interop_threads(1)


def _plan_load(files: ModelFiles, config: EngineConfig) -> Target:
    """Device and dtype; refuses, before anything is read, what will not fit the memory."""
    checkpoint_format = format_of(files)
    slots = weight_plan(ModelConfig.from_dict(files.config))
    with open_model(files, checkpoint_format, slots) as tensors:
        target = resolve_target(config, checkpoint_format, tensors.tensors)
        estimate = estimate_weights(slots, checkpoint_format, tensors.tensors, target)
    check_weights_fit(estimate.weight_bytes, _free_memory(config, target))
    return target


def _free_memory(config: EngineConfig, target: Target) -> int:
    free = free_memory(target)
    if config.memory_bytes is None:
        return free
    used = process_memory() if target.is_cpu else torch.cuda.memory_reserved(target.device)
    return max(0, min(free, config.memory_bytes - used))


def _warm_up(runner: Runner, num_groups: int, length: int, loaded: LoadedModel) -> None:
    """A prompt and one more token through the whole path: libraries set up, and the output is finite."""
    vocab = loaded.config.vocab_size
    params = SamplingParams(max_tokens=2, temperature=0.0, seed=0)
    prompt = tuple(index % vocab for index in range(length))
    tables = ((0,),) * num_groups
    first = ScheduledSequence(_WARM_UP_ID, prompt, 0, True, 0, tables)
    plans = [
        StepPlan(0, (first,), (NewSequence(_WARM_UP_ID, prompt, params),)),
        StepPlan(0, (ScheduledSequence(_WARM_UP_ID, (0,), length, True, 1, tables),)),
    ]
    for plan in plans:
        if any(output.error is not None for output in runner.execute(plan).result()):
            dtype = str(loaded.target.dtype).removeprefix("torch.")
            raise ConfigError(
                f"--dtype {dtype}: the model's output is not finite (NaN or infinity); use --dtype float32, "
                "and if that fails too, the checkpoint is broken"
            )
    runner.execute(StepPlan(0, (), finished=(_WARM_UP_ID,))).result()


def _cpu_line() -> str:
    """The CPU's name and the features that kernels look for."""
    wanted = (
        "avx2",
        "fma",
        "f16c",
        "avx512f",
        "avx512_vnni",
        "avx_vnni",
        "avx512_bf16",
        "amx_int8",
        "asimddp",
    )
    features = cpu_features()
    return " ".join([cpu_name(), *(name for name in wanted if name in features)]).strip()
