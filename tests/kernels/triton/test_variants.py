"""What the gate compiles is what is launched."""

import re
from pathlib import Path

from nybble.kernels.triton.launch import Machine, choose
from nybble.kernels.triton.variants import NARROW_ROWS, TARGETS, variants


def test_every_launch_of_every_target_is_compiled() -> None:
    tiles = [v for v in variants() if "BM" in v.constexprs]
    compiled = {(t, v.kernel, v.constexprs["BM"], v.constexprs["BN"]) for v in tiles for t in v.targets}
    for target in TARGETS:
        for tokens in (1, 8, 16, 32, 64, 65, 1000):
            launch = choose(Machine("", target, 100), 4, (4096, 4096), tokens)
            kernel = f"{launch.kernel}_linear:{launch.kernel}_linear"
            assert (target, kernel, launch.BM, launch.BN) in compiled


def test_kinds_on_sm_90_are_compiled_as_they_are_launched() -> None:
    """2 and 8 bits and parts of 32 inputs up to prefill; outputs that no tile of 128 divides."""
    found = [v for v in variants() if "sm_90" in v.targets and "BM" in v.constexprs]
    cases = [(bits, 128, 4096, m) for bits in (2, 4, 8) for m in (8, 16, 64, 128)]
    cases += [(4, 32, 4096, m) for m in (8, 64, 128)] + [(4, 128, NARROW_ROWS, 64)]
    for bits, group, rows, tokens in cases:
        launch = choose(Machine("", "sm_90", 100), bits, (rows, 4096), tokens)
        same = [v for v in found if v.kernel.endswith(f":{launch.kernel}_linear")]
        same = [v for v in same if (v.num_warps, v.num_stages) == (launch.warps, launch.stages)]
        wanted = {"BITS": bits, "GROUP": group, "BM": launch.BM, "BN": launch.BN}
        assert any(wanted.items() <= v.constexprs.items() for v in same), (bits, group, rows, tokens)
    sparse = {(v.constexprs["GROUP"], v.constexprs["BM"]) for v in found if "sparse24" in v.kernel}
    assert sparse >= {(128, 8), (128, 16), (128, 32), (128, 64), (32, 8)}


def test_budgets_are_by_kernel() -> None:
    plain = {v.kernel: v.budget for v in variants() if v.name in ("mma-m64-w4-fp16", "tile-m64-w4-fp16")}
    assert plain["tile_linear:tile_linear"] < plain["mma_linear:mma_linear"]


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
