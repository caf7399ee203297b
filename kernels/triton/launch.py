"""Which kernel a packed weight is multiplied by, and with which constants: data, by GPU, shape and tokens.

``kernels/tuned/NAME.json`` (NAME: the GPU's, lower case, dashes) holds what was measured on it;
default.json has rules for each architecture; NVIDIA's from sm_80 on that it does not name take those of
``UNNAMED``. A file is {"rules": [...]}; the first rule that fits is taken,
that of the user's folder (``use_tuned``) first, then the GPU's own, then the default. Rule: tokens (at most
so many; null: any), kernel, BM, BN, warps, stages, programs (wanted per multiprocessor, by splitting K); it
fits only the given architectures, bits, weights (N * K, at most so many) and shape ([N, K], padded) where it
has them. With sparsity "2:4", "overlay" or "none" it fits only such weights; one without fits all but 2:4.
BN is halved until it divides the outputs; a rule without architectures fits only what its own BN divides: a
narrower tile was not measured, and would be a kernel more for each rule.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

KERNELS = ("mma", "tile", "sparse24", "dense", "cusparselt")
CONSTANTS = ("BM", "BN", "warps", "stages", "programs")
UNNAMED = "sm_120"  # mma.sync throughout, and 99 KiB of shared memory a block: the least from sm_80 on
MIN_STEPS = 2  # of 128 inputs that a split has at least: less is all start and end


@dataclass(frozen=True, slots=True)
class Machine:
    """A GPU as launches see it. architecture: "sm_90", "gfx942"."""

    name: str
    architecture: str
    multiprocessors: int

    @staticmethod
    def of(device: torch.device | str) -> "Machine":
        """The GPU ``device``. Raises LookupError where torch sees none."""
        if not torch.cuda.is_available():
            raise LookupError("torch sees no GPU")
        found = torch.cuda.get_device_properties(device)
        if torch.version.hip is not None:
            architecture = found.gcnArchName.partition(":")[0]
        else:
            architecture = f"sm_{found.major}{found.minor}"
        return Machine(found.name, architecture, found.multi_processor_count)

    @property
    def is_cuda(self) -> bool:
        """Whether it is NVIDIA's."""
        return self.architecture.startswith("sm_")


@dataclass(frozen=True, slots=True)
class Launch:
    """Constants of one launch. kernel: one of ``KERNELS``.

    "dense": a matrix is made, then torch's product; "cusparselt": the same, compressed, for 2:4.
    """

    kernel: str
    BM: int = 0
    BN: int = 0
    warps: int = 4
    stages: int = 3
    programs: int = 1

    def fitted(self, rows: int) -> "Launch":
        """With tiles that divide ``rows``, a multiple of 64, and no more warps than fragments' rows."""
        bn = self.BN
        while bn > 64 and rows % bn:
            bn //= 2
        return Launch(self.kernel, self.BM, bn, min(self.warps, max(4, bn // 16)), self.stages, self.programs)

    def scales_weights(self, group: int) -> bool:
        """Whether weights are scaled, which rounds them, since scaling each group's sums would cost more.

        ``group``: inputs that share a scale, 0 for all of a row.
        """
        return 0 < group < 2 * self.BM or (self.kernel == "tile" and group in (32, 64))

    def splits(self, machine: Machine, tiles: int, steps: int) -> int:
        """Into how many parts K is split, none of them empty.

        Time is taken as the busiest multiprocessor's steps, with one more for each program's start and end;
        with fewer programs than wanted it waits for memory.
        """
        if self.BM > 64 and tiles >= machine.multiprocessors:
            return 1
        return _splits(self.programs, machine.multiprocessors, tiles, steps)


@lru_cache(maxsize=4096)
def _splits(programs: int, multiprocessors: int, tiles: int, steps: int) -> int:
    best, chosen = float("inf"), 1
    for parts in range(1, max(1, steps // MIN_STEPS) + 1):
        each = -(-steps // parts)
        busiest = -(-tiles * parts // multiprocessors)
        cost = max(busiest, programs) * (each + 1)
        if cost < best and (parts - 1) * each < steps:
            best, chosen = cost, parts
    return chosen


@lru_cache(maxsize=4096)
def choose(
    machine: Machine, bits: int, shape: tuple[int, int], tokens: int, sparsity: str | None = None
) -> Launch:
    """The launch for ``tokens`` rows of activations and a weight of [N padded, K padded].

    Raises LookupError where no rule fits: ``supports`` tells before.
    """
    for rule in _rules(machine.name, machine.architecture):
        limit = rule["tokens"]
        if limit is not None and tokens > limit:
            continue
        if not _fits_sparsity(rule.get("sparsity"), sparsity):
            continue
        if shape[0] * shape[1] > (rule.get("weights") or float("inf")):
            continue
        if rule.get("bits", bits) == bits and tuple(rule.get("shape", shape)) == shape:
            constants = {k: rule[k] for k in CONSTANTS if k in rule}
            launch = Launch(rule["kernel"], **constants).fitted(shape[0])
            if "architectures" in rule or rule.get("BN", 0) == launch.BN:
                return launch
    raise LookupError(f"no launch for {tokens} tokens on {machine.architecture}")


def _fits_sparsity(stated: str | None, sparsity: str | None) -> bool:
    if stated is None:
        return sparsity != "2:4"
    return stated == (sparsity or "none")


def limits(machine: Machine, max_tokens: int) -> list[int]:
    """Numbers of tokens up to ``max_tokens`` of which each launch has one."""
    bounds = {rule["tokens"] or max_tokens for rule in _rules(machine.name, machine.architecture)}
    return sorted({min(bound, max_tokens) for bound in bounds})


def supports(machine: Machine, sparsity: str | None = None) -> bool:
    """Whether there are launches for a GPU."""
    return any(r.get("sparsity") == sparsity for r in _rules(machine.name, machine.architecture))


def use_tuned(folder: Path) -> None:
    """Take the rules of ``folder``/NAME.json before all others from now on.

    Raises ValueError, which names the file, where one is not a file of rules.
    """
    _USERS.folder = folder
    _file.cache_clear()
    choose.cache_clear()
    for path in sorted(folder.glob("*.json")):
        _read(path)


def slug(name: str) -> str:
    """A GPU's name as its file has it."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class _Users:
    """Of this process."""

    folder: Path | None = None


_USERS = _Users()


@cache
def _file(name: str) -> tuple[Mapping[str, Any], ...]:
    """The user's rules, then ours; none if there is no file."""
    ours = files(__package__.rpartition(".")[0]) / "tuned" / f"{name}.json"
    rules = tuple(json.loads(ours.read_text())["rules"]) if ours.is_file() else ()
    users = None if _USERS.folder is None else _USERS.folder / f"{name}.json"
    return (*(_read(users) if users is not None and users.is_file() else ()), *rules)


def _read(path: Path) -> list[Mapping[str, Any]]:
    """A user's file, checked."""
    try:
        rules = json.loads(path.read_text(encoding="utf-8"))["rules"]
        for rule in rules:
            whole = [rule[name] for name in CONSTANTS if rule["kernel"] not in ("dense", "cusparselt")]
            if rule["kernel"] not in KERNELS or not all(type(n) is int and n > 0 for n in whole):
                raise ValueError(f"a rule that is none: {json.dumps(rule)}")
            rule["tokens"] = rule["tokens"] and int(rule["tokens"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a file of launch rules ({type(error).__name__}: {error})") from error
    return list(rules)


def _rules(name: str, architecture: str) -> Iterator[Mapping[str, Any]]:
    default = _file("default")
    named = {name for rule in default for name in rule.get("architectures", ())}
    number = architecture.removeprefix("sm_")
    fitting = {architecture}
    if architecture not in named and number.isdecimal() and int(number) >= 80:
        fitting.add(UNNAMED)
    for rule in (*_file(slug(name)), *default):
        if fitting & set(rule.get("architectures", fitting)):
            yield rule
