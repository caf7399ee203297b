"""Predictions from counts: how fast a decode kernel could read weights. A model, not a measurement.

issue limit (TB/s of weights) = SMs * clock * weights per loop / clocks per loop * bytes per weight, with the
clocks of the busiest pipe (``sass.LANES``, four warp instructions a clock): as if memory had no limit.

time of a launch = FIXED + max(DRAM bytes / copy bandwidth, L2 bytes / L2 bandwidth, busiest SM's / its rate)
DRAM bytes = packed weights, scales, activations and outputs once
L2 bytes = packed weights for every tile of tokens, activations for every tile of outputs, the outputs,
         split sums written and read once
rate of an SM = min(bytes in flight / LATENCY, 64 bytes a clock from L2), and of weights alone its share of
         the issue limit (the loop that is counted has the copies of activations)
bytes in flight = resident blocks * (stages - 1) * bytes of a step's weights and activations; the busiest
         SM has ceil(blocks / SMs) blocks, each with ceil(steps / splits) of the steps
FIXED = launch within a CUDA graph, first loads, last stores.

Launch (tile, warps, stages) and splits are those that ``launch`` takes for the shape and the tokens.
It knows no loss in DRAM (row misses, refresh), nor the tail of a wave: read it as a bound from above.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nybble.kernels.triton.launch import Launch, choose
from nybble.kernels.triton.launch import Machine as LaunchMachine
from nybble.kernels.triton.variants import Variant

from .machines import Machine
from .sass import LANES, Loop

LATENCY = 0.8e-6  # seconds from a load's issue to its data, under load
FIXED = 2.5e-6  # seconds
_L2_BYTES_PER_CLOCK = 64
STEP = 128  # inputs of a pass of the loop


@dataclass(frozen=True)
class Prediction:
    """Of one linear: seconds, its share of copy bandwidth, blocks, and what binds it."""

    seconds: float
    share: float
    blocks: int
    bound: str


def tile_tokens(variant: Variant) -> int:
    """Tokens of the tile."""
    return int(variant.constexprs["BM"])


def issue_limits(variant: Variant, machine: Machine, found: Mapping[str, Any]) -> dict[str, float]:
    """TB/s of weights at which each pipe is full; empty where the loop was not read."""
    if not found["loop"]:
        return {}
    loop = Loop(Counter(found["loop"]))
    per_lane = {name: loop.pipe(name) / lanes for name, lanes in LANES.items()}
    clocks = {"issue": loop.size / 128, **per_lane}  # per thread's share of weights
    weights = found["weights_per_thread"]
    scale = machine.sms * machine.ghz * 1e9 * variant.bits / 8 / 1e12
    return {name: scale * weights / value for name, value in clocks.items() if value}


def resident_blocks(variant: Variant, machine: Machine, found: Mapping[str, Any]) -> int:
    """Blocks of the variant that an SM holds at once."""
    threads = 32 * variant.num_warps
    registers = -(-found["registers"] // 8) * 8 * threads
    limits = (
        machine.registers_per_sm // registers,
        machine.shared_per_sm // (found["shared"] + 1024),
        machine.threads_per_sm // threads,
        machine.blocks_per_sm,
    )
    return max(1, min(limits))


def predict(
    variant: Variant, machine: Machine, found: Mapping[str, Any], shape: tuple[int, int, int], split_k: int
) -> Prediction:
    """``shape``: outputs, inputs, tokens."""
    outputs, inputs, tokens = shape
    weights = outputs * inputs * variant.bits / 8
    dram = weights + 2 * tokens * (inputs + outputs)
    columns = -(-outputs // variant.constexprs["BN"])
    heights = -(-tokens // tile_tokens(variant))
    blocks = columns * heights * split_k
    split_sums = 8 * split_k * outputs * tokens if split_k > 1 else 0
    l2 = heights * weights + 2 * tokens * (columns * inputs + outputs) + split_sums
    memory = dram / (machine.copy_tb_s * 1e12)
    cache = l2 / (machine.l2_tb_s * 1e12)
    held = min(resident_blocks(variant, machine, found), -(-blocks // machine.sms))
    stages = int(variant.constexprs.get("STAGES", variant.num_stages))
    step_bytes = variant.constexprs["BN"] * STEP * variant.bits / 8
    in_flight = held * max(1, stages - 1) * (step_bytes + 2 * tile_tokens(variant) * STEP)
    longest = math.ceil(math.ceil(inputs / STEP) / split_k) * STEP / inputs  # a block's share of the steps
    share = math.ceil(blocks / machine.sms) * longest / (columns * heights)  # of the busiest SM
    port = _L2_BYTES_PER_CLOCK * machine.ghz * 1e9
    bounds = {"memory": memory, "L2": cache}
    bounds |= {"SM loads": share * l2 * LATENCY / in_flight, "SM port": share * l2 / port}
    limits = issue_limits(variant, machine, found)
    if limits:
        bounds["SM issue"] = share * heights * weights * machine.sms / (min(limits.values()) * 1e12)
    body = max(bounds.values())
    bound = "launch" if body < FIXED else max(bounds, key=lambda name: bounds[name])
    return Prediction(FIXED + body, memory / (FIXED + body), blocks, bound)


def launch_of(
    machine: Machine, bits: int, shape: tuple[int, int, int], sparsity: str | None = None
) -> tuple[Launch, int]:
    """What is launched for outputs, inputs and tokens, and into how many parts K is split."""
    outputs, inputs, tokens = shape
    gpu = LaunchMachine("", machine.target, machine.sms)
    launch = choose(gpu, bits, (outputs, inputs), tokens, sparsity)
    tiles = -(-outputs // launch.BN) * -(-tokens // launch.BM)
    return launch, launch.splits(gpu, tiles, -(-inputs // STEP))


def is_launched(variant: Variant, launch: Launch) -> bool:
    """Whether it was compiled with the launch's kernel and constants."""
    kernel = variant.kernel.rpartition(":")[2].removesuffix("_linear")
    constants = (variant.constexprs.get("BM"), variant.constexprs.get("BN"))
    constants += (variant.num_warps, variant.num_stages)
    return (kernel, *constants) == (launch.kernel, launch.BM, launch.BN, launch.warps, launch.stages)
