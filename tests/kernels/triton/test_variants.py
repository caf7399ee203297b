"""What the gate compiles is what is launched."""

import re
from pathlib import Path

from nybble.kernels.triton.launch import Machine, choose
from nybble.kernels.triton.variants import TARGETS, variants


def test_every_launch_of_every_target_is_compiled() -> None:
    tiles = [v for v in variants() if "BM" in v.constexprs]
    compiled = {(t, v.kernel, v.constexprs["BM"], v.constexprs["BN"]) for v in tiles for t in v.targets}
    for target in TARGETS:
        for tokens in (1, 8, 16, 32, 64, 65, 1000):
            launch = choose(Machine("", target, 100), 4, (4096, 4096), tokens)
            kernel = f"{launch.kernel}_linear:{launch.kernel}_linear"
            assert (target, kernel, launch.BM, launch.BN) in compiled


def test_names_are_unique() -> None:
    names = [(v.name, v.targets) for v in variants()]
    assert len(set(names)) == len(names)


def test_all_bits_and_types_are_compiled_for_all_targets() -> None:
    products = [v for v in variants() if v.mma]
    for target in TARGETS:
        found = {(v.constexprs["BITS"], v.signature["x"]) for v in products if target in v.targets}
        assert found >= {(bits, dtype) for bits in (2, 3, 4, 8) for dtype in ("*fp16", "*bf16")}


def test_every_kernel_is_compiled(root: Path) -> None:
    """Each function that a launch names, whatever module it is in."""
    compiled = {v.kernel for v in variants()}
    source = (root / "kernels/triton/low_bit.py").read_text()
    launched = set(re.findall(r"\brun\(\s*(\w+),", source))
    assert launched == {kernel.rpartition(":")[2] for kernel in compiled}
