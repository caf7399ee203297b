"""Launches: data that is complete, and splits that leave no program without work."""

import json
from pathlib import Path

import pytest
from nybble.kernels.triton.launch import Launch, Machine, choose, supports

H200 = Machine("NVIDIA H200", "sm_90", 132)
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_number_of_tokens_has_a_launch(architecture: str) -> None:
    machine = Machine("unheard of", architecture, 10)
    assert supports(machine)
    for tokens in (1, 2, 8, 9, 16, 17, 33, 64, 65, 200, 100_000):
        launch = choose(machine, 4, (64 * 3, 256), tokens)
        assert min(tokens, 64) <= launch.BM
        assert 64 * 3 % launch.BN == 0


def test_a_gpu_without_rules_is_refused() -> None:
    old = Machine("Tesla T4", "sm_75", 40)
    assert not supports(old)
    with pytest.raises(LookupError, match="1 tokens on sm_75"):
        choose(old, 4, (64, 128), 1)


def test_a_model_needs_at_most_16_kernels() -> None:
    """Layers of one kind of weight, whatever their shapes: launches are what is compiled."""
    for architecture in ARCHITECTURES:
        machine = Machine("", architecture, 100)
        shapes = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (192, 896))
        assert len({choose(machine, 4, shape, m) for shape in shapes for m in range(1, 300)}) <= 16


@pytest.mark.parametrize("tiles", [1, 7, 64, 132, 448])
@pytest.mark.parametrize("steps", [1, 2, 7, 32, 112, 256])
def test_no_split_is_empty(tiles: int, steps: int) -> None:
    for programs in (1, 4):
        parts = Launch("mma", 8, 64, programs=programs).splits(H200, tiles, steps)
        each = -(-steps // parts)
        assert parts == 1 or (parts - 1) * each < steps


def test_splits_fill_the_gpu_and_no_more() -> None:
    launch = Launch("mma", 8, 64, programs=4)
    assert 64 * launch.splits(H200, 64, 32) >= 3 * 132
    assert launch.splits(H200, 16384, 128) == 1
    assert Launch("tile", 128, 128).splits(H200, 132, 128) == 1


def test_the_rules_are_read_in_order(root: Path) -> None:
    rules = json.loads((root / "kernels/tuned/default.json").read_text())["rules"]
    names = {"architectures", "tokens", "kernel", "BM", "BN", "warps", "stages", "programs"}
    for rule in rules:
        assert set(rule) <= names | {"bits", "shape"}
        assert rule["kernel"] in ("mma", "tile", "dense")
        assert rule["tokens"] is None or rule["tokens"] <= rule["BM"]
