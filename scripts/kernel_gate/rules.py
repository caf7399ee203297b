"""What a compiled kernel must be like: each rule names one way of losing the hardware's speed."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from nybble.kernels.triton.variants import Variant

from .machines import Machine
from .sass import Loop

_COPIES = ("LDG", "LDGSTS")
_BULK = ("UBLKCP", "UTMALDG")


def broken_rules(variant: Variant, machine: Machine, found: Mapping[str, Any]) -> list[str]:
    """Why the variant does not pass on the machine; empty if it does."""
    broken = []
    if found["spills"]:
        broken.append(f"{found['spills']} registers spill")
    if found["shared"] > machine.shared_limit:
        broken.append(f"{found['shared']} bytes of shared memory, a block has {machine.shared_limit}")
    if found["registers"] > (512 if not machine.is_cuda else 255):
        broken.append(f"{found['registers']} registers")
    wanted = variant.mma.get(machine.target)
    if wanted is None:  # moves or unpacks, multiplies nothing
        return broken
    if not any(name.startswith(wanted) for name in found["mma"]):
        broken.append(f"no {wanted}: {found['mma'] or 'no matrix instruction at all'}")
    broken += [f"an operand of an inline MMA is not its fragment: {text}" for text in found["misplaced"]]
    if machine.is_cuda:
        broken += _loop_rules(variant, found)
    return broken


def _loop_rules(variant: Variant, found: Mapping[str, Any]) -> list[str]:
    if found["loop"] is None:
        return ["no loop with matrix instructions"]
    loop = Loop(Counter(found["loop"]))
    broken = []
    for names, what in ((("I2F", "I2FP"), "integers become floats"), (("LDL", "STL"), "spills")):
        if loop.count(*names):
            broken.append(f"{loop.count(*names)} {what} in the loop")
    # Three-bit words come in threes: a lane's share of a plane is 8 bytes. So is its share of 2:4 positions.
    wanted = "64" if variant.constexprs.get("BITS") == 3 or "meta" in variant.signature else "128"
    copies = [name for name in loop.opcodes if name.split(".")[0] in _COPIES]
    if not any({wanted, "128"} & set(name.split(".")) for name in copies) and not loop.count(*_BULK):
        broken.append(f"no copy of {int(wanted) // 8} bytes in the loop: {copies}")
    if variant.decode:
        if loop.count("SHFL"):
            broken.append(f"{loop.count('SHFL')} shuffles: the packed order is not the fragments'")
        narrow = [n for n in copies if n.startswith("LDGSTS") and not {wanted, "128"} & set(n.split("."))]
        if narrow and not _scales_of_parts(variant, narrow, loop, found["weights_per_thread"]):
            broken.append(f"narrow copies in the loop: {narrow}")
    per_weight = loop.size / found["weights_per_thread"]
    if per_weight > variant.budget:
        broken.append(f"{per_weight:.2f} instructions per weight, the budget is {variant.budget}")
    return broken


def _scales_of_parts(variant: Variant, narrow: list[str], loop: Loop, weights: float) -> bool:
    """Whether narrow copies can be scales, which are exempt where a group is less than a step's 128 inputs.

    Scales lie by rows, so a lane's are 4 or 8 bytes. Copied once for each 16 inputs of a row they are 2 bytes
    for 16 weights, a quarter of what 4-bit words copy: so many bytes at most, half as many more for zeros.
    """
    if not 0 < variant.constexprs.get("GROUP", 0) < 128:
        return False
    copied = sum((8 if "64" in name.split(".") else 4) * loop.opcodes[name] for name in narrow)
    return copied <= weights / 8 * (1.5 if variant.constexprs.get("ZEROS") else 1)
