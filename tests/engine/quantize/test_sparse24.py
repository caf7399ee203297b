"""2:4 pruning: its identities, its order of quality (../shared/methods.md 5.1), and whole checkpoints."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layers_to_round import correlated, proxy_loss
from nybble.engine.errors import ConfigError
from nybble.engine.formats.registry import format_of, open_tensors
from nybble.engine.model_files import ModelFiles
from nybble.engine.quantize.hessian import factorize
from nybble.engine.quantize.job import quantize
from nybble.engine.quantize.methods import get_method
from nybble.engine.quantize.options import QuantizeOptions
from nybble.engine.quantize.pipeline import ToRound
from nybble.engine.quantize.sparse24 import Sparse24
from nybble.engine.quantize.sweep import How, sweep
from nybble.kernels.layout import PackedWeight, QuantSpec
from torch import Tensor

SPEC = QuantSpec(4, 32, True)


def prune(weight: Tensor, hessian: Tensor, spec: QuantSpec = SPEC, **settings: Any) -> PackedWeight:
    rounder = Sparse24(**settings)
    return rounder.round(ToRound("m", weight, spec), rounder.prepare(hessian, spec))


def quads(values: Tensor) -> Tensor:
    """How many of each four are not zero."""
    return (values.reshape(-1, 4) != 0).sum(1)


@pytest.mark.parametrize("how", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("transposable", [False, True])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_every_quad_keeps_two(how: str, transposable: bool, joint: bool, dense: bool) -> None:
    weight, hessian = correlated(16, 160)
    packed = prune(weight, hessian, prune=how, transposable=transposable, joint=joint, dense=dense)
    values = packed.dequantize(torch.float64)
    assert int(quads(values).max()) == 2
    assert (packed.spec is None) == dense
    if dense:
        assert bool((quads(values) == 2).all())
    else:
        assert packed.is_24()
        assert packed.zeros is None
        assert int((packed.values == 8).sum()) >= values.numel() // 2
    if transposable:
        assert int(quads(values.T).max()) == 2


def test_plain_masks_keep_weights_as_they_are() -> None:
    weight, hessian = correlated(8, 64)
    hessian[5, 5] += 1e6  # an input so large that Wanda never drops it
    for how in ("magnitude", "wanda"):
        pruned = prune(weight, hessian, prune=how, dense=True).values
        kept = pruned != 0
        assert torch.equal(pruned[kept], weight[kept])
        score = weight.abs() * (1 if how == "magnitude" else hessian.diagonal().sqrt())
        expected = torch.zeros_like(kept).view(-1, 4)
        expected.scatter_(1, score.reshape(-1, 4).argsort(1)[:, 2:], True)
        assert torch.equal(kept, expected.view(kept.shape))
        if how == "wanda":
            assert bool(kept[:, 5].all())


def test_sparsegpt_against_a_plain_one() -> None:
    """Column by column in float64: the inverse is taken anew for what is left, no Cholesky, no lazy block."""
    weight, hessian = correlated(6, 132)
    damped = hessian.numpy() + 0.01 * np.trace(hessian.numpy()) / 132 * np.eye(132)
    work = weight.numpy().copy()
    pruned = np.zeros(work.shape, dtype=bool)
    for col in range(132):
        inverse = np.linalg.inv(damped[col:, col:])
        if col % 4 == 0:
            rest = np.array([np.linalg.inv(damped[c:, c:])[0, 0] for c in range(col, col + 4)])
            saliency = work[:, col : col + 4] ** 2 / rest
            least = np.argsort(saliency, axis=1)[:, :2]
            np.put_along_axis(pruned[:, col : col + 4], least, True, axis=1)
        error = np.where(pruned[:, col], work[:, col], 0) / inverse[0, 0]
        work[:, col:] -= np.outer(error, inverse[0])
        work[pruned[:, col], col] = 0
    found = prune(weight, hessian, dense=True).values.numpy()
    np.testing.assert_array_equal(found == 0, pruned)
    np.testing.assert_allclose(found, work, atol=1e-8)


def test_the_order_of_methods() -> None:
    """As measured in the digest: each way to spend more thought gains."""
    weight, hessian = correlated(64, 256, seed=3)

    def loss(**settings: Any) -> float:
        return proxy_loss(weight, prune(weight, hessian, **settings), hessian)

    magnitude = loss(prune="magnitude", dense=True)
    wanda = loss(prune="wanda", dense=True)
    sparsegpt = loss(prune="sparsegpt", dense=True)
    joint = loss(prune="sparsegpt")
    in_turn = loss(prune="sparsegpt", joint=False)
    wanda_rounded = loss(prune="wanda")
    assert sparsegpt < 0.6 * min(magnitude, wanda)
    assert sparsegpt < joint < 1.2 * sparsegpt
    assert joint == pytest.approx(in_turn, rel=0.1)  # neither is always better
    assert joint < wanda_rounded < 0.1 * wanda  # rounding under a mask repairs the pruning too
    assert loss(prune="sparsegpt", transposable=True) > joint  # fewer masks to choose from


def test_rounding_under_a_mask_starts_where_you_like() -> None:
    """From the original or from what pruning left: once the mask stands, both sweeps are the same."""
    weight, hessian = correlated(16, 160)
    factor = factorize(hessian, SPEC, 0.01, "none")
    pruned = sweep(weight, factor, None, How(prune=True)).codes
    how = How(pruned=pruned == 0, ranges=pruned)
    a, b = (sweep(start, factor, SPEC, how).packed(SPEC) for start in (weight, pruned))
    assert torch.equal(a.values, b.values)
    assert torch.equal(a.values, prune(weight, hessian, joint=False).values)


def test_pruned_codes_make_no_range() -> None:
    """A group's scale is that of what stays: here the pruned half is the larger by magnitude."""
    weight = torch.tensor([[4.0, 4.0, 1.0, 1.0] * 8] * 4, dtype=torch.float64)
    hessian = torch.diag(torch.tensor([1e-4, 1e-4, 1.0, 1.0] * 8, dtype=torch.float64))
    packed = prune(weight, hessian, prune="wanda")
    assert torch.equal(packed.values[0, :4], torch.tensor([8, 8, 15, 15], dtype=torch.uint8))
    assert float(packed.scales.max()) == pytest.approx(2 / 15, rel=1e-3)  # type: ignore[union-attr]


def test_contradictions_are_refused() -> None:
    for given, message in (
        ({"symmetric": False}, "--asym: pruned weights need"),
        ({"dynamic": {"a": {"symmetric": False}}}, "--asym: pruned weights need"),
        ({"bits": 16, "dynamic": {"a": {"bits": 4}}}, "--dynamic: with --bits 16 nothing is rounded"),
        ({"actorder": "group"}, "--actorder group: sparse24 has no order"),
    ):
        asked = QuantizeOptions("a", "b", method="sparse24", **given)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=message):
            get_method(asked)


@pytest.mark.parametrize("bits", [4, 16])
def test_a_checkpoint_says_what_it_is(bits: int, make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama")
    options = QuantizeOptions(
        str(folder),
        str(tmp_path / "out"),
        method="sparse24",
        bits=bits,
        group_size=32,
        num_samples=8,
        seq_len=32,
    )
    summary = quantize(options, lambda *_: None, lambda _: None)
    assert len(summary["modules"]) == 21
    files = ModelFiles(tmp_path / "out")
    stored = format_of(files)
    assert stored.sparsity == "2:4"
    with open_tensors(files, stored) as tensors:
        for module in (entry["name"] for entry in summary["modules"]):
            weight = stored.read({n: tensors.get(n) for n in tensors if n.startswith(f"{module}.")}, module)
            assert int(quads(weight.dequantize()).max()) == 2
            assert weight.is_24() == (bits == 4)
    if bits == 4:
        config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
        assert (config["quant_method"], config["sym"]) == ("gptq", True)
        assert config["meta"]["sparsity"] == "2:4"
