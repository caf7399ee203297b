"""What the model predicts of the launches that are made, held against what issue C wants on an H200."""

import math
from collections.abc import Iterator, Sequence

from .gate import Verdict
from .machines import MACHINES, Machine
from .model import FIXED, Prediction, is_launched, launch_of, predict
from .published import SPEEDUPS, TOKENS
from .shapes import SHAPES

TARGET = "sm_90"
GROUP = 128
LEVERS = {
    "L2": "activations are read from L2 by every tile of outputs: clusters of blocks that get them by TMA "
    "multicast",
    "SM port": "as L2, for one SM: TMA multicast",
    "SM loads": "too few bytes on their way: more stages or programs for each SM",
    "SM issue": "instructions of one SM: fewer for each weight, or wgmma",
    "memory": "the fixed time of a launch: programmatic dependent launches that overlap",
    "launch": "the fixed time of a launch: programmatic dependent launches that overlap",
}


def down(value: float, digits: int = 0) -> str:
    """In decimals, cut off: no figure is better than what was computed."""
    return f"{math.floor(value * 10**digits + 1e-9) / 10**digits:.{digits}f}"


def up(value: float, digits: int = 0) -> str:
    """As ``down`` for what is better when it is less."""
    return f"{math.ceil(value * 10**digits - 1e-9) / 10**digits:.{digits}f}"


def predicted(
    verdicts: Sequence[Verdict], target: str, shape: tuple[int, int, int], sparsity: str | None = None
) -> Prediction | None:
    """Of 4 bits, fp16, groups of 128, as it is launched; None where that kernel does not compile or is not
    among those compiled. shape: outputs, inputs, tokens."""
    launch, splits = launch_of(MACHINES[target], 4, shape, sparsity)
    for v in verdicts:
        constants = v.variant.constexprs
        plain = constants.get("BITS") == 4 and constants.get("GROUP") == GROUP
        plain = plain and not constants.get("ZEROS") and not constants.get("SPARSE")
        plain = plain and v.variant.signature.get("x") == "*fp16"
        if v.target == target and plain and v.found and is_launched(v.variant, launch):
            return predict(v.variant, MACHINES[target], v.found, shape, splits)
    return None


def dense_seconds(machine: Machine, outputs: int, inputs: int) -> float:
    """Of cuBLAS in 16 bits, if it reached copy bandwidth."""
    return FIXED + 2 * outputs * inputs / (machine.copy_tb_s * 1e12)


def below_goals(verdicts: Sequence[Verdict]) -> list[str]:
    """The table of what is predicted below its goal, with cause and lever."""
    rows = [*_shares(verdicts), *_speedups(verdicts), *_sparse24(verdicts)]
    lines = ["", f"### Predicted below issue C's goals ({MACHINES[TARGET].name}; the model above)", ""]
    lines += [
        "Goals: 80 % of copy bandwidth from 60 MB on, 60 % from 30 MB; 3.3 times cuBLAS at 16384^2 for 1 to "
        "16 tokens; ahead of tinygemm and gemlite for 1 to 64 tokens (theirs are of an H100: speed-ups are "
        "compared); int4 with 2:4 sparsity 1.2 times int4 from 30 MB on, up to 16 tokens. Decode is "
        f"predicted at M = {', '.join(map(str, TOKENS))}; overlay and prefill are not predicted.",
        "",
        "| linear | M | predicted | goal | what binds | next lever |",
        "|---|--:|--:|--:|---|---|",
    ]
    return [*lines, *rows] if rows else [*lines[:-2], "None."]


def _row(name: str, tokens: int, value: str, goal: str, bound: str) -> str:
    return f"| {name} | {tokens} | {value} | {goal} | {bound} | {LEVERS[bound]} |"


def _large() -> Iterator[tuple[str, int, int, float]]:
    """Linears of 30 MB and more: name, outputs, inputs, MB."""
    for name, (outputs, inputs) in SHAPES.items():
        megabytes = outputs * inputs * (4 + 16 / GROUP) / 8e6
        if megabytes >= 30:
            yield f"{name} {outputs}x{inputs}", outputs, inputs, megabytes


def _shares(verdicts: Sequence[Verdict]) -> Iterator[str]:
    for name, outputs, inputs, megabytes in _large():
        goal = 0.8 if megabytes >= 60 else 0.6
        for tokens in TOKENS:
            found = predicted(verdicts, TARGET, (outputs, inputs, tokens))
            if found is not None and found.share < goal:
                share = down(100 * found.share)
                yield _row(name, tokens, f"{share} %", f"{goal:.0%} of copy", found.bound)


def _speedups(verdicts: Sequence[Verdict]) -> Iterator[str]:
    for (gpu, matrix), designs in SPEEDUPS.items():
        if gpu != "H100":
            continue
        size = int(matrix.split("^")[0])
        for place, tokens in enumerate(TOKENS):
            found = predicted(verdicts, TARGET, (size, size, tokens))
            if found is None:
                continue
            ours = dense_seconds(MACHINES[TARGET], size, size) / found.seconds
            goals = {name: designs[name][place] for name in ("tinygemm", "gemlite")}
            if size == 16384 and tokens <= 16:
                goals["goal"] = 3.3
            for who, goal in goals.items():
                if ours < goal or (who != "goal" and ours == goal):
                    yield _row(matrix, tokens, f"{down(ours, 2)}x", f"{goal:.2f}x ({who})", found.bound)


def _sparse24(verdicts: Sequence[Verdict]) -> Iterator[str]:
    for name, outputs, inputs, _ in _large():
        for tokens in (m for m in TOKENS if m <= 16):
            shape = (outputs, inputs, tokens)
            pair = (predicted(verdicts, TARGET, shape), predicted(verdicts, TARGET, shape, "2:4"))
            if pair[0] is not None and pair[1] is not None and pair[0].seconds < 1.2 * pair[1].seconds:
                ratio = down(pair[0].seconds / pair[1].seconds, 2)
                yield _row(f"{name}, 2:4", tokens, f"{ratio}x", "1.20x int4", pair[1].bound)
