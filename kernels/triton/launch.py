"""Which kernel a packed weight is multiplied by, and with which constants: data, by GPU, shape and tokens.

``kernels/tuned/NAME.json`` (NAME: the GPU's, lower case, dashes) holds what was measured on it;
default.json has rules for each architecture. A file is {"rules": [...]}; the first rule that fits is taken,
a GPU's own file first. Rule: tokens (at most so many; null: any), kernel, BM, BN, warps, stages, programs
(wanted per multiprocessor, by splitting K); it fits only the given architectures, bits and shape ([N, K],
padded) where it has them. With sparsity "2:4" or "overlay" it fits only such weights; one without fits
those with an overlay, too.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

import torch

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
    """Constants of one launch. kernel: "mma", "tile", "sparse24", or "dense": dequantize, then torch's."""

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
        if rule.get("sparsity") not in (sparsity, None if sparsity == "overlay" else sparsity):
            continue
        if rule.get("bits", bits) == bits and tuple(rule.get("shape", shape)) == shape:
            constants = {k: rule[k] for k in ("BM", "BN", "warps", "stages", "programs") if k in rule}
            return Launch(rule["kernel"], **constants).fitted(shape[0])
    raise LookupError(f"no launch for {tokens} tokens on {machine.architecture}")


def limits(machine: Machine, max_tokens: int) -> list[int]:
    """Numbers of tokens up to ``max_tokens`` of which each launch has one."""
    bounds = {rule["tokens"] or max_tokens for rule in _rules(machine.name, machine.architecture)}
    return sorted({min(bound, max_tokens) for bound in bounds})


def supports(machine: Machine, sparsity: str | None = None) -> bool:
    """Whether there are launches for a GPU."""
    return any(r.get("sparsity") == sparsity for r in _rules(machine.name, machine.architecture))


@cache
def _file(name: str) -> tuple[Mapping[str, Any], ...]:
    """A file's rules; none if there is no file."""
    path = files(__package__.rpartition(".")[0]) / "tuned" / f"{name}.json"
    return tuple(json.loads(path.read_text())["rules"]) if path.is_file() else ()


def _rules(name: str, architecture: str) -> Iterator[Mapping[str, Any]]:
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    for rule in (*_file(slug), *_file("default")):
        if architecture in rule.get("architectures", (architecture,)):
            yield rule
