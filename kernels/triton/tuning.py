"""Which launch is fastest on the GPU at hand: what is tried, and how it is chosen. ``nybble tune``.

A contest is one rule to be written: one kind of weight, tokens up to a bound, and weights up to a size. Its
candidates are measured on a few shapes of that class; the one with the least geometric mean of times (a small
shape counts as much as a large one) is taken. The default keeps its place unless it is beaten by more than
``MARGIN``, which is a measurement's noise. Two sizes and seven numbers of tokens make at most 15 kernels for
a kind of weight: one for each rule, and what arranges inputs. Layers whose outputs a rule's tile does not
divide take the default, up to five kernels more for odd multiples of 128 and of 64 each.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from .launch import CONSTANTS, Launch, Machine, choose, slug, supports

Shape = tuple[int, int]  # outputs, inputs
MARGIN = 0.02
HOPELESS = 1.5  # times the default's time on a shape: measured no further
KINDS: dict[str, tuple[int, str | None]] = {
    **{f"w{bits}": (bits, None) for bits in (2, 3, 4, 8)},
    "w4-outliers": (4, "overlay"),
    "w4-24": (4, "2:4"),
    "16-24": (16, "2:4"),
}
# A rule's bound on tokens: the numbers that are measured.
TOKENS: dict[int | None, tuple[int, ...]] = {
    8: (1, 8), 16: (16,), 32: (32,), 64: (64,), 256: (128, 256), 2048: (512, 2048), None: (4096,),
}  # fmt: skip
# A rule's bound on weights: linears of Llama-3 1B, 8B and 70B. Up to 2^25 a launch's start and end decide.
SIZES: dict[int | None, tuple[Shape, ...]] = {
    1 << 25: ((3072, 2048), (2048, 8192), (4096, 4096)),
    None: ((4096, 14336), (8192, 8192), (28672, 4096)),
}
# Tiles' outputs, warps, stages and programs a multiprocessor that are tried, in all combinations that fit.
_GRIDS: dict[str, tuple[tuple[int, ...], ...]] = {
    "mma": ((64, 128, 256), (4, 8), (2, 3, 4, 6), (1, 2, 4)),
    "sparse24": ((64, 128, 256), (4, 8), (3, 4, 6), (1, 2, 4)),
    "tile": ((64, 128, 256), (4, 8), (2, 3, 4), (1, 2)),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One linear: ``shape`` [outputs, inputs], and how many tokens."""

    kind: str
    shape: Shape
    tokens: int


@dataclass(frozen=True, slots=True)
class Contest:
    """One rule to be found. bound, weights: of tokens and of N * K; the default is the first candidate."""

    kind: str
    bound: int | None
    weights: int | None
    problems: tuple[Problem, ...]
    default: Launch
    candidates: tuple[Launch, ...]


@dataclass(frozen=True, slots=True)
class Winner:
    """Of a contest. gain: the default's time over the launch's, geometric mean; failed: what did not run."""

    contest: Contest
    launch: Launch
    gain: float
    failed: tuple[tuple[Launch, str], ...]

    @property
    def rule(self) -> dict[str, Any]:
        """As ``launch`` reads it."""
        bits, sparsity = KINDS[self.contest.kind]
        conditions = {"bits": bits, "sparsity": sparsity or "none", "tokens": self.contest.bound}
        if self.contest.weights is not None:
            conditions["weights"] = self.contest.weights
        constants = asdict(self.launch)
        if self.launch.kernel in ("dense", "cusparselt"):
            return {**conditions, "kernel": self.launch.kernel}
        return {**conditions, "kernel": self.launch.kernel, **{name: constants[name] for name in CONSTANTS}}


class DoesNotRun(Exception):
    """A candidate that cannot be compiled or started, or whose result is wrong: why."""


Measure = Callable[[Problem, Launch], float]  # seconds; raises DoesNotRun


def contests(machine: Machine, kinds: Iterable[str]) -> Iterator[Contest]:
    """Small sizes before large ones: the first rule that fits is taken. LookupError: no launches at all."""
    for kind in kinds:
        bits, sparsity = KINDS[kind]
        if not supports(machine, sparsity):
            raise LookupError(f"{kind}: no launches for {machine.name} ({machine.architecture})")
        for (weights, shapes), (bound, counts) in product(SIZES.items(), TOKENS.items()):
            problems = tuple(Problem(kind, shape, tokens) for shape in shapes for tokens in counts)
            default = choose(machine, bits, shapes[0], counts[-1], sparsity)
            tried = dict.fromkeys((default, *candidates(machine, sparsity, bound)))
            yield Contest(kind, bound, weights, problems, default, tuple(tried))


def candidates(machine: Machine, sparsity: str | None, bound: int | None) -> Iterator[Launch]:
    """What is tried for so many tokens."""
    many = bound is None or bound > 64
    if many:
        yield Launch("dense")
        if sparsity == "2:4" and machine.is_cuda:
            yield Launch("cusparselt")
        if sparsity is not None:
            return  # overlays and mma.sp are made for few tokens
    sizes = (64, 128) if bound is None or many else (bound,)
    for kernel, bm in _tiles(machine, sparsity, sizes):
        for bn, warps, stages, programs in product(*_GRIDS[kernel]):
            if bm > 64 and programs > 1:
                continue  # many tiles: K is not split
            launch = Launch(kernel, bm, bn, warps, stages, programs)
            if launch.fitted(bn) == launch and bm * bn <= 128 * 128:
                yield launch


def _tiles(machine: Machine, sparsity: str | None, sizes: tuple[int, ...]) -> Iterator[tuple[str, int]]:
    """Kernels and their tiles' tokens. The compiler's matrix units take 16; wgmma pays from 64 on."""
    for bm in sizes:
        if sparsity == "2:4":
            yield "sparse24", bm
            continue
        if machine.is_cuda:
            yield "mma", bm
        if bm >= 64 or not machine.is_cuda:
            yield "tile", max(bm, 16)


def hold(contest: Contest, measure: Measure, tell: Callable[[], None]) -> Winner:
    """Measure the candidates, shape by shape, the default first. ``tell`` is called for each of both.

    Raises DoesNotRun where the default does not run: then nothing is known.
    """
    times: dict[Launch, list[float]] = {launch: [] for launch in contest.candidates}
    failed = []
    for problem in contest.problems:
        for launch in contest.candidates:
            tell()
            if launch not in times or len(contest.candidates) == 1:
                continue
            try:
                times[launch].append(measure(problem, launch))
                if times[launch][-1] > HOPELESS * times[contest.default][-1]:
                    del times[launch]
            except DoesNotRun as error:
                if launch == contest.default:
                    raise
                failed.append((launch, str(error)))
                del times[launch]
    if len(contest.candidates) == 1:
        return Winner(contest, contest.default, 1.0, ())
    means = {launch: statistics.geometric_mean(seconds) for launch, seconds in times.items()}
    default = means[contest.default]
    best = min(means, key=lambda launch: means[launch])
    if means[best] > default * (1 - MARGIN):
        best = contest.default
    return Winner(contest, best, default / means[best], tuple(failed))


def write(folder: Path, machine: Machine, winners: Iterable[Winner], environment: dict[str, Any]) -> Path:
    """Write ``folder``/NAME.json. Kinds that were not tuned keep the rules they have there."""
    path = folder / f"{slug(machine.name)}.json"
    rules = [winner.rule for winner in winners]
    tuned = {(rule["bits"], rule["sparsity"]) for rule in rules}
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))["rules"]
        rules += [rule for rule in old if (rule.get("bits"), rule.get("sparsity")) not in tuned]
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"    {json.dumps(rule)}" for rule in rules)
    stated = json.dumps({"gpu": machine.name, **environment})
    partial = path.with_suffix(".partial")
    partial.write_text(f'{{\n  "environment": {stated},\n  "rules": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
    partial.replace(path)
    return path


def rehearsed(machine: Machine) -> Measure:
    """A clock for where no GPU is: bytes over a bandwidth, with waves of programs and a cost of stages."""

    def measure(problem: Problem, launch: Launch) -> float:
        outputs, inputs = problem.shape
        if launch.kernel in ("dense", "cusparselt"):
            return 1e-5 + outputs * inputs * (5e-12 + 2.5e-15 * problem.tokens)
        tiles = -(-outputs // launch.BN) * -(-problem.tokens // launch.BM)
        splits = launch.splits(machine, tiles, inputs // 128)
        waves = -(-tiles * splits // (machine.multiprocessors * launch.programs))
        steps = -(-inputs // 128 // splits) + launch.stages
        return 2e-6 + waves * steps * (launch.BN * 64 + launch.BM * 256) * 2e-13 * (1 + 1 / launch.stages)

    return measure
