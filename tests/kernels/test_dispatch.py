"""The dispatch table: names, signatures, what a miss says."""

import inspect
from importlib import import_module

import pytest
import torch
from nybble.kernels import dispatch, reference
from nybble.kernels.dispatch import OPS, Ops, Target, WeightTraits, choose, resolve
from nybble.kernels.layout import PackedWeight, QuantSpec

FP16 = Target("cpu", torch.float16)


def candidates() -> list[tuple[str, object]]:
    found = []
    for op, names in OPS.items():
        for name in names:
            module, attribute = name.split(":")
            found.append((op, getattr(import_module(module, "nybble.kernels"), attribute)))
    return found


def traits(max_abs: float = 1.0, spec: QuantSpec | None = None) -> WeightTraits:
    return WeightTraits(8, 16, spec, torch.float32, max_abs)


def test_every_op_has_a_reference_and_a_place_among_the_resolved_ops() -> None:
    assert set(OPS) == {name for name in vars(reference) if name in OPS}
    assert set(OPS) == {"linear", "sparse_product", *Ops.__dataclass_fields__}


def test_candidates_have_the_signatures_of_their_references() -> None:
    for op, candidate in candidates():
        expected = getattr(reference, op)
        if op == "linear":
            for method in ("refuses", "repack"):
                ours, theirs = (
                    inspect.signature(getattr(kernel, method)) for kernel in (candidate, expected)
                )
                assert list(ours.parameters) == list(theirs.parameters), candidate
        else:
            assert inspect.signature(candidate) == inspect.signature(expected), (op, candidate)  # type: ignore[arg-type]


def test_the_first_that_does_not_refuse_is_chosen_and_the_others_say_why() -> None:
    choice = choose("linear", FP16, weight=traits(max_abs=1e6))
    assert choice.name == "torch"
    reasons = dict(choice.refused)
    assert "1e+06" in reasons["dense-fp16"]
    assert "quantized weights only" in reasons["dequant-fp16"]
    assert choose("linear", FP16, weight=traits()).name == "dense-fp16"
    assert choose("linear", FP16, weight=traits(spec=QuantSpec(4, 16, True))).name == "dequant-fp16"
    exact = choose("linear", Target(), weight=traits())
    assert exact.name == "torch"
    assert "float32" in dict(exact.refused)["dense-fp16"]
    assert choose("linear", Target("cuda", torch.float16), weight=traits()).name == "torch"


def test_a_miss_prints_op_device_dtype_shape_and_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.OPS, "linear", OPS["linear"][:-1])
    with pytest.raises(LookupError) as caught:
        resolve("linear", Target("cuda", torch.bfloat16), weight=traits())
    message = str(caught.value)
    for part in ("linear", "cuda", "bfloat16", "out_features=8", "in_features=16"):
        assert part in message
    lines = message.splitlines()[1:]
    assert len(lines) == len(OPS["linear"])
    assert "  dense-fp16: runs on a CPU, not on cuda" in lines
    assert all(len(line.split(": ", 1)[1]) > 5 for line in lines)


def test_traits_bound_the_magnitude() -> None:
    dense = PackedWeight(torch.tensor([[1.0, -3.0], [2.0, 0.5]]))
    assert WeightTraits.of(dense).max_abs == 3.0
    broken = PackedWeight(torch.tensor([[1.0, float("nan")]]))
    assert choose("linear", FP16, weight=WeightTraits.of(broken)).name == "torch"
    packed = PackedWeight(
        torch.randint(0, 16, (4, 32), dtype=torch.uint8),
        QuantSpec(4, 16, True),
        torch.rand(4, 2, dtype=torch.float16),
    )
    assert packed.dequantize().abs().max() <= WeightTraits.of(packed).max_abs


def test_activations_are_fp32_on_a_cpu() -> None:
    assert FP16.activation_dtype == torch.float32
    assert Target("cuda", torch.float16).activation_dtype == torch.float16
    assert not Target("cuda:1").is_cpu
