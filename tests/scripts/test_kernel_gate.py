"""What the compile gate reads off machine code, and what it predicts from it, against counts by hand."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nybble.kernels.triton.variants import Variant


@pytest.fixture(autouse=True)
def scripts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "scripts"))


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;          /* 0x00000a00ff017b82 */
        /*0010*/                   ISETP.GE.AND P0, PT, R2, R3, PT ;
        /*0020*/              @!P0 LDGSTS.E.BYPASS.LTC128B.128 [R4], desc[UR4][R6.64] ;
        /*0030*/                   LOP3.LUT R8, R9, 0xf000f, R10, 0xea, !PT ;
        /*0040*/                   HFMA2.MMA R8, R8, R11, R12 ;
        /*0050*/                   HMMA.16816.F32 R12, R8, R14, R12 ;
        /*0060*/                   HMMA.16816.F32 R12, R8, R14, R12 ;
        /*0070*/                   I2F.F16 R3, R2 ;
        /*0080*/              @!P0 BRA 0x30 ;
        /*0090*/               @P1 BRA `(.L_x_2) ;
        /*00a0*/                   IADD3 R2, R2, 0x1, RZ ;
        /*00b0*/               @P2 BRA 0x10 ;
        /*00c0*/                   EXIT ;
"""
VARIANT = Variant(
    "by hand", "mma_linear:mma_linear", ("sm_90",), {}, {"BM": 8, "BN": 64, "STAGES": 4}, 4, 4, {}, True,
    64.0, 3.0, 4.125,
)  # fmt: skip


def found(**given: Any) -> dict[str, Any]:
    loop = {"LOP3.LUT": 64, "HFMA2": 64, "HMMA.16816.F32": 8, "BRA": 1, "I2F.F16": 7}
    return {"registers": 48, "shared": 24576, "loop": loop, "weights_per_thread": 64.0} | given


def test_the_innermost_loop_with_the_matrix_instructions() -> None:
    from kernel_gate.sass import instructions, main_loop

    code = instructions(SASS)
    assert [address for address, _ in code] == list(range(0, 0xD0, 0x10))
    loop = main_loop(code)
    assert loop is not None
    # HFMA2.MMA is a name of the half-precision pipe, not a matrix instruction: two are.
    assert loop.size == 6
    assert loop.weights_per_warp(8) == 2 * 256
    assert loop.weights_per_warp(16) == 256
    assert (loop.pipe("integer"), loop.pipe("float"), loop.pipe("conversion")) == (1, 1, 1)
    assert main_loop(instructions(SASS.replace("HMMA", "FADD"))) is None


def test_issue_limits() -> None:
    from kernel_gate.machines import MACHINES
    from kernel_gate.model import issue_limits

    limits = issue_limits(VARIANT, MACHINES["sm_90"], found())
    weights_per_second = 132 * 1.755e9 * 64
    terabytes = 4.125 / 8 / 1e12
    assert limits["issue"] == pytest.approx(weights_per_second / (144 / 128) * terabytes)
    assert limits["integer"] == pytest.approx(weights_per_second / (64 / 64) * terabytes)
    assert limits["conversion"] == pytest.approx(weights_per_second / (7 / 16) * terabytes)


def test_predictions() -> None:
    from kernel_gate.machines import MACHINES
    from kernel_gate.model import FIXED, predict, resident_blocks

    machine = MACHINES["sm_90"]
    assert resident_blocks(VARIANT, machine, found()) == 233472 // (24576 + 1024)
    large = predict(VARIANT, machine, found(), (16384, 16384, 1), 1)
    assert large.blocks == 256
    memory = (16384 * 16384 * 4.125 / 8 + 2 * 2 * 16384) / 4.3e12
    assert large.seconds >= FIXED + memory
    assert large.share == pytest.approx(memory / large.seconds)
    # One block on each of 32 SMs cannot draw the bandwidth of 132; splitting K helps.
    narrow = predict(VARIANT, machine, found(), (2048, 8192, 1), 1)
    split = predict(VARIANT, machine, found(), (2048, 8192, 1), 16)
    assert narrow.bound == "SM loads"
    assert split.blocks == 16 * narrow.blocks
    assert split.seconds < narrow.seconds
    # A tile of more outputs reads the activations less often.
    tall = replace(VARIANT, constexprs={"BM": 16, "BN": 64, "STAGES": 4})
    wide = replace(VARIANT, constexprs={"BM": 16, "BN": 256, "STAGES": 4})
    by_width = [predict(v, machine, found(), (16384, 16384, 16), 4).seconds for v in (tall, wide)]
    assert by_width[1] < by_width[0]
    assert all(math.isfinite(seconds) for seconds in by_width)
    # With 9 tiles of 8 tokens L2 gives the weights 9 times, and activations once for each of 64 tiles.
    many = predict(VARIANT, machine, found(), (4096, 4096, 72), 1)
    l2 = 9 * 4096 * 4096 * 4.125 / 8 + 2 * 72 * (64 * 4096 + 4096)
    assert many.seconds >= FIXED + l2 / 5.7e12
    # 33 steps in 16 parts: the longest has 3, not 33 / 16.
    uneven = predict(VARIANT, machine, found(), (64 * 132, 33 * 128, 1), 16)
    even = predict(VARIANT, machine, found(), (64 * 132, 33 * 128, 1), 11)
    assert uneven.blocks // 132 * 3 > even.blocks // 132 * 3
    assert uneven.seconds >= even.seconds


def test_predictions_are_of_what_is_launched() -> None:
    """Of a narrower tile's kernel nothing is predicted, however good it looks."""
    from kernel_gate.gate import Verdict
    from kernel_gate.goals import predicted
    from kernel_gate.machines import MACHINES
    from kernel_gate.model import is_launched, launch_of, predict
    from nybble.kernels.triton.variants import TARGETS, variants

    verdicts = [Verdict(v, t, found(), [], 0.0) for v in variants() if v.decode for t in v.targets]
    for target in TARGETS:
        for tokens in (1, 8, 9, 16, 17, 32, 33, 64):
            shape = (16384, 16384, tokens)
            launch, splits = launch_of(MACHINES[target], 4, shape)
            one = [v for v in verdicts if v.target == target and is_launched(v.variant, launch)]
            assert one
            assert tokens <= launch.BM
            assert {v.variant.constexprs["BM"] for v in one} == {launch.BM}
            expected = predict(one[0].variant, MACHINES[target], found(), shape, splits)
            assert predicted(verdicts, target, shape) == expected
    only_narrow = [v for v in verdicts if v.variant.constexprs["BM"] == 8]
    assert predicted(only_narrow, "sm_90", (16384, 16384, 64)) is None
    assert predicted(only_narrow, "sm_90", (16384, 16384, 8)) is not None


def test_figures_are_never_better_than_computed() -> None:
    from kernel_gate.goals import down, up

    assert (down(3.299, 2), down(3.3, 2), down(79.99)) == ("3.29", "3.30", "79")
    assert (up(2.701, 2), up(2.7, 2), up(18.41, 1)) == ("2.71", "2.70", "18.5")


def test_what_is_below_its_goal_is_listed() -> None:
    from kernel_gate.gate import Verdict
    from kernel_gate.goals import below_goals
    from nybble.kernels.triton.variants import variants

    def listed(**given: Any) -> str:
        made = [v for v in variants() if v.decode and "sm_90" in v.targets]
        return "\n".join(below_goals([Verdict(v, "sm_90", found(**given), [], 0.0) for v in made]))

    slow = listed(loop={"LOP3.LUT": 5000})
    assert "| 16384^2 16384x16384 | 1 | " in slow
    assert "3.30x (goal) | SM issue" in slow
    assert "3.30x (goal) | SM issue" not in listed()


def test_rules_on_counts() -> None:
    from kernel_gate.machines import MACHINES
    from kernel_gate.rules import broken_rules

    variant = replace(VARIANT, mma={"sm_90": "HMMA.16816"}, constexprs={"BM": 8, "BN": 64, "BITS": 4})
    sound = {"LDGSTS.E.BYPASS.LTC128B.128": 4, "HMMA.16816.F32": 8, "LOP3.LUT": 60}
    base = {"spills": 0, "misplaced": [], "mma": ["HMMA.16816.F32"]}

    def broken(bits: int = 4, **loop: int) -> str:
        case = replace(variant, constexprs=variant.constexprs | {"BITS": bits})
        counts = Counter(sound) + Counter({name.replace("_", "."): n for name, n in loop.items()})
        return "; ".join(broken_rules(case, MACHINES["sm_90"], found(**base, loop=dict(counts))))

    assert broken() == ""
    assert "become floats" in broken(I2F_F16=1)
    assert "1 shuffles" in broken(SHFL_BFLY=1)
    assert "spills in the loop" in broken(LDL=2)
    assert "narrow copies" in broken(LDGSTS_E_LTC128B=1)
    assert "narrow copies" in broken(LDGSTS_E_LTC128B_64=1)
    assert broken(bits=3, LDGSTS_E_LTC128B_64=1) == ""
    assert "the budget is 3.0" in broken(IMAD=300)
    # Scales of parts of a step may be narrow, a byte for 8 weights at most (of 64, 8), with zeros 12.
    variant = replace(variant, constexprs=variant.constexprs | {"GROUP": 32})
    assert broken(LDGSTS_E=2) == ""
    assert "narrow copies" in broken(LDGSTS_E=3)
    assert broken(LDGSTS_E_64=1) == ""
    assert "narrow copies" in broken(LDGSTS_E_64=1, LDGSTS_E=1)
    variant = replace(variant, constexprs=variant.constexprs | {"ZEROS": True})
    assert broken(LDGSTS_E_64=1, LDGSTS_E=1) == ""
    assert "narrow copies" in broken(LDGSTS_E_64=2)
    for group in (0, 128):
        variant = replace(variant, constexprs=variant.constexprs | {"GROUP": group})
        assert "narrow copies" in broken(LDGSTS_E=2)


TTGIR = """
#good = #ttg.blocked<{sizePerThread = [1, 1, 4], threadsPerWarp = [1, 32, 1], warpsPerCTA = [4, 1, 1], order = [2, 1, 0]}>
#bad = #ttg.blocked<{sizePerThread = [1, 4, 1], threadsPerWarp = [1, 8, 4], warpsPerCTA = [4, 1, 1], order = [2, 1, 0]}>
  %1 = tt.elementwise_inline_asm "mma.sp::x" {packed_element = 4 : i32} %0 : tensor<4x32x4xi32, #good> -> tensor<4x32x4xf32, #good>
  %2 = tt.elementwise_inline_asm "lop3.b32" {packed_element = 1 : i32} %0 : tensor<4x32x4xi32, #bad> -> tensor<4x32x4xf32, #bad>
"""  # noqa: E501


def test_operands_of_inline_mma() -> None:
    from kernel_gate.sass import misplaced_operands

    assert misplaced_operands(TTGIR) == []
    assert len(misplaced_operands(TTGIR.replace("#good>", "#bad>"))) == 1
    assert len(misplaced_operands(TTGIR.replace("packed_element = 4", "packed_element = 2"))) == 1
