"""What ``nybble quantize`` was asked for, validated once. Without torch: the gateway validates a job's."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import ConfigError

GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)  # those that GPTQModel reads
BITS = (2, 3, 4, 8)
CheckpointFormat = Literal["gptq", "gptq_v2", "awq", "compressed-tensors"]
AWQ_BITS = 4  # of the checkpoint format
DENSE_BITS = 16  # sparse24 only: nothing is rounded, half of the weights are zero

# Options that mean something to some methods only, and to which (as --method or --base). A value other than
# the default elsewhere is a mistake, and said so.
USERS: dict[str, tuple[str, ...]] = {
    "base": ("requant", "gwq"),
    "static_groups": ("gptq",),
    "damping": ("gptq", "sparse24"),
    "true_sequential": ("gptq", "awq", "sparse24"),
    "awq_steps": ("awq",),
    "prune": ("sparse24",),
    "joint": ("sparse24",),
    "transposable": ("sparse24",),
    "shrinkage": ("yaqa",),
    "outlier_percent": ("requant", "gwq"),
    "significant_percent": ("requant",),
    "detach_steps": ("requant",),
    "pqi_intervals": ("requant",),
    "budget_bits": ("requant",),
    "gradient_samples": ("requant", "gwq"),
}


def resumable(out: Path) -> Path:
    """Where a run with ``resume`` that makes ``out`` keeps its blocks."""
    return out.parent / f".{out.name}.work"


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """model: folder or hub id. out: the new folder. Everything else has the CLI option's name.

    base: the method that requant and gwq build on. transform: None: the method's own (awq for awq).
    checkpoint_format None: "gptq" (v1) for symmetric, "gptq_v2" where any weights are asymmetric;
    "compressed-tensors" (sparse-24-bitmask) where weights are only pruned.
    lm_head_bits None: the output head stays as it is; else it is rounded to nearest.
    calibration None: the text in this package. damping: share of the mean of H's diagonal.
    mse: exponent of the range search, 0: off. group_size -1: one group over each row.
    outlier_percent None: 0.25 for requant, 1 for gwq. significant_percent None: 0.25, with budget_bits 0.
    budget_bits: bits per weight, all counted, within which requant chooses bits, groups and outliers.
    gradient_samples: calibration sequences that are differentiated for them; pqi_intervals: of the path from
    the original to the quantized weights. dynamic: pattern of module names -> bits, group_size, symmetric
    that differ; the first that matches at a name's start decides, and one that begins with "-:" leaves the
    module dense. report: measure the quality on eval_text (None: the text in this package), its first
    eval_tokens (None: all of it up to 100 M parameters, else 64 k). predict: the loss change by gradients too
    (None: up to 100 M parameters). max_nll_increase: a gate, nats per token of that text; whether it was
    passed is kept in the checkpoint. resume: keep finished blocks when interrupted, and go on from those of
    the same options; those of others are an error, or, with "anew" or overwrite, removed.
    """

    model: str
    out: str
    method: str = "gptq"
    base: str = "gptq"
    transform: Literal["none", "awq", "smoothquant"] | None = None
    revision: str | None = None
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    actorder: Literal["none", "group", "gar"] = "none"
    static_groups: bool = False
    true_sequential: bool = True
    checkpoint_format: CheckpointFormat | None = None
    lm_head_bits: int | None = None
    dynamic: Mapping[str, Mapping[str, Any]] | None = None
    calibration: str | None = None
    num_samples: int = 128
    seq_len: int = 2048
    damping: float = 0.01
    mse: float = 0.0
    awq_steps: int = 20
    smooth_alpha: float = 0.5
    prune: Literal["magnitude", "wanda", "sparsegpt"] = "sparsegpt"
    joint: bool = True
    transposable: bool = False
    shrinkage: float = 0.1
    outlier_percent: float | None = None
    significant_percent: float | None = None
    detach_steps: int = 2
    pqi_intervals: int = 32
    gradient_samples: int = 100
    budget_bits: float | None = None
    seed: int = 0
    report: bool = True
    eval_text: str | None = None
    eval_tokens: int | None = None
    predict: bool | None = None
    max_nll_increase: float | None = None
    overwrite: bool = False
    resume: bool | Literal["anew"] = False
    num_threads: int | None = None

    def __post_init__(self) -> None:
        self._check_spec()
        self._check_choices()
        self._check_numbers()
        self._check_users()

    def _check_spec(self) -> None:
        _check_dynamic(self.dynamic or {})
        if self.bits == DENSE_BITS and self.method == "sparse24":
            if self.storage != "compressed-tensors":
                raise ConfigError(
                    f"--checkpoint-format {self.storage}: holds no 2:4 floats (--bits 16); use "
                    "compressed-tensors"
                )
            return
        if self.bits not in BITS:
            raise ConfigError(f"--bits {self.bits}: use {_or(BITS)} (16, nothing rounded, is for sparse24)")
        if self.group_size not in GROUP_SIZES:
            raise ConfigError(
                f"--group-size {self.group_size}: use one of {', '.join(map(str, GROUP_SIZES))}"
            )
        if self.lm_head_bits not in (None, *BITS):
            raise ConfigError(f"--lm-head-bits {self.lm_head_bits}: use {_or(BITS)}, or leave it out")
        if self.storage == "awq" and self.bits != AWQ_BITS:
            raise ConfigError(f"--bits {self.bits}: --checkpoint-format awq holds 4 bits only; use gptq")
        if self.storage == "awq" and self.actorder == "group" and not self.static_groups:
            gptq = "gptq" if self.symmetric else "gptq_v2"
            raise ConfigError(
                "--actorder group: --checkpoint-format awq stores no order of inputs; use "
                f"--checkpoint-format {gptq}, or another --actorder (none; gar with --method gptq)"
            )

    def _check_choices(self) -> None:
        for option, value, choices in (
            ("--actorder", self.actorder, ("none", "group", "gar")),
            ("--transform", self.transform, (None, "none", "awq", "smoothquant")),
            ("--checkpoint-format", self.checkpoint_format, (None, *get_args(CheckpointFormat))),
            ("--prune", self.prune, ("magnitude", "wanda", "sparsegpt")),
        ):
            if value not in choices:
                raise ConfigError(f"{option} {value}: use {_or([c for c in choices if c is not None])}")

    def _check_numbers(self) -> None:
        for option, value, least in (
            ("--num-samples", self.num_samples, 1),
            ("--seq-len", self.seq_len, 2),
            ("--awq-steps", self.awq_steps, 1),
            ("--detach-steps", self.detach_steps, 1),
            ("--pqi-intervals", self.pqi_intervals, 1),
            ("--gradient-samples", self.gradient_samples, 1),
            ("--eval-tokens", self.eval_tokens, 1),
            ("--num-threads", self.num_threads, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{option} {value}: must be at least {least}")
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"--seed {self.seed}: must be from 0 to {(1 << 63) - 1}")
        if not 0 < self.damping <= 1:  # NaN fails too
            raise ConfigError(f"--damping {self.damping}: must be above 0 and at most 1")
        if not 0 < self.shrinkage <= 1:
            raise ConfigError(f"--shrinkage {self.shrinkage}: must be above 0 and at most 1")
        if self.budget_bits is not None and not 2 <= self.budget_bits <= 16:
            raise ConfigError(f"--budget-bits {self.budget_bits}: must be from 2 to 16")
        if self.budget_bits is not None and self.storage not in ("gptq", "gptq_v2"):
            raise ConfigError(
                f"--budget-bits: --checkpoint-format {self.storage} cannot hold every choice; use gptq or "
                "gptq_v2"
            )
        if self.budget_bits is not None and self.outlier_percent is not None:
            raise ConfigError("--budget-bits: chooses the outliers itself; leave --outlier-percent out")
        for option, percent in (
            ("--outlier-percent", self.outlier_percent),
            ("--significant-percent", self.significant_percent),
        ):
            if percent is not None and not 0 <= percent <= 10:
                raise ConfigError(f"{option} {percent}: must be from 0 to 10")
        if not 0 <= self.smooth_alpha <= 1:
            raise ConfigError(f"--smooth-alpha {self.smooth_alpha}: must be from 0 to 1")
        if self.smooth_alpha != 0.5 and self.transform != "smoothquant":
            raise ConfigError(
                f"--smooth-alpha {self.smooth_alpha}: has no effect without --transform smoothquant"
            )
        if self.max_nll_increase is not None and not 0 <= self.max_nll_increase < math.inf:
            raise ConfigError(f"--max-nll-increase {self.max_nll_increase}: must be a number, 0 or more")
        if not (self.mse == 0 or 1 <= self.mse <= 10):
            raise ConfigError(f"--mse {self.mse}: use 0 (off) or an exponent from 1 to 10 (2.4 is usual)")

    def _check_users(self) -> None:
        for option, value in (
            ("--eval-text", self.eval_text),
            ("--eval-tokens", self.eval_tokens),
            ("--predict", self.predict),
            ("--max-nll-increase", self.max_nll_increase),
        ):
            if value is not None and value is not False and not self.report:
                raise ConfigError(f"{option}: has no effect without --report; leave it out")
        composed = self.method in USERS["base"]
        methods = (self.method, self.base if composed else None, self.transform)
        for field in fields(self):
            users = USERS.get(field.name)
            if users and getattr(self, field.name) != field.default and not set(users) & set(methods):
                option = "--" + field.name.replace("_", "-")
                raise ConfigError(
                    f"{option} {getattr(self, field.name)}: has no effect with --method {self.method}, only "
                    f"with {_or(users)}; leave it out"
                )

    @property
    def storage(self) -> CheckpointFormat:
        """The checkpoint format to write."""
        if self.checkpoint_format is not None:
            return self.checkpoint_format
        if self.bits == DENSE_BITS:
            return "compressed-tensors"
        overrides = (self.dynamic or {}).values()
        symmetric = self.symmetric and all(override.get("symmetric", True) for override in overrides)
        return "gptq" if symmetric else "gptq_v2"

    def refuse_actorder(self, why: str) -> None:
        """ConfigError where an order of inputs was asked for that the method has no use for."""
        if self.actorder != "none":
            raise ConfigError(
                f"--actorder {self.actorder}: {self.method} has no order, {why}; use none, or gptq"
            )


def _or(values: "tuple[Any, ...] | list[Any]") -> str:
    return " or ".join(filter(None, (", ".join(map(str, values[:-1])), str(values[-1]))))


def _check_dynamic(dynamic: Mapping[str, Any]) -> None:
    if not isinstance(dynamic, Mapping):
        raise ConfigError(f"--dynamic {str(dynamic)[:100]}: expected an object of patterns")
    for pattern, override in dynamic.items():
        where = f"--dynamic {str(pattern)[:100]!r}"
        try:
            re.compile(pattern.removeprefix("-:").removeprefix("+:"))
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"{where}: is no regular expression ({error})") from error
        if not isinstance(override, Mapping):
            raise ConfigError(f"{where}: expected an object of bits, group_size and symmetric")
        for key, value in override.items():
            if type(value) is int and value in {"bits": BITS, "group_size": GROUP_SIZES}.get(key, ()):
                continue
            if key == "symmetric" and isinstance(value, bool):
                continue
            raise ConfigError(
                f"{where}: {key} {value}: use bits ({_or(BITS)}), group_size "
                f"({_or(GROUP_SIZES)}) and symmetric (true or false)"
            )
