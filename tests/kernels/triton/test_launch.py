"""Launches: data that is complete, and splits that leave no program without work."""

import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from nybble.kernels.triton import launch
from nybble.kernels.triton.launch import Launch, Machine, choose, supports

H200 = Machine("NVIDIA H200", "sm_90", 132)
NAMED = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942")
UNNAMED = ("sm_87", "sm_103", "sm_110", "sm_121", "sm_200")  # Orin, B300, Thor, GB10, what may come
ARCHITECTURES = NAMED + UNNAMED
COMPILE = """
from dataclasses import replace
from kernel_gate.compiled import compile_variant
from kernel_gate.machines import MACHINES
from nybble.kernels.triton import variants

for architecture, tokens in (("sm_87", 128), ("sm_103", 128), ("sm_121", 64)):
    found = variants._launched(variants._Kind(8, "bf16", zeros=True), tokens, (architecture,))
    if tokens == 64:
        found += variants._launched(variants._Kind(8, sparse=True), tokens, (architecture,))
        found += variants._sparse24(16, "bf16", tokens, (architecture,))
    for variant in found:
        compiled = compile_variant(variant, replace(MACHINES["sm_89"], target=architecture))
        print(architecture, variant.name, compiled["shared"], compiled["spills"])
"""


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
    for architecture in ("gfx1100", "sm_72", "sm_"):
        assert not supports(Machine("", architecture, 40))


@pytest.mark.parametrize("architecture", UNNAMED)
def test_a_gpu_that_no_rule_names_has_mma_sync_only(architecture: str) -> None:
    machine = Machine("unheard of", architecture, 10)
    found = {
        choose(machine, bits, (4096, 4096), m, sparsity).kernel
        for bits in (2, 3, 4, 8)
        for m in (1, 16, 64, 65, 5000)
        for sparsity in (None, "overlay", "2:4")
    }
    assert found == {"mma", "dense", "sparse24"}
    assert supports(machine, "2:4")


def test_its_largest_kernels_fit_99_kib_of_shared_memory(root: Path) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(root / "scripts")
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert {row[1].split("-")[0] for row in rows} == {"mma", "sparse24"}
    assert len(rows) == 5
    for row in rows:
        assert 64 << 10 < int(row[2]) <= 99 << 10, row
        assert row[3] == "0", row


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
    decode = Launch("mma", 8, 64, programs=4)
    assert 64 * decode.splits(H200, 64, 32) >= 3 * 132
    assert decode.splits(H200, 16384, 128) == 1
    assert Launch("tile", 128, 128).splits(H200, 132, 128) == 1


def test_rules_hold_what_is_read_of_them(root: Path) -> None:
    constants = set(launch.CONSTANTS)
    matrices = ("dense", "cusparselt")
    for path in (root / "kernels/tuned").glob("*.json"):
        for rule in json.loads(path.read_text())["rules"]:
            conditions = {"architectures", "tokens", "kernel", "bits", "weights", "shape", "sparsity"}
            assert set(rule) <= constants | conditions
            assert rule["kernel"] in launch.KERNELS
            assert (rule["kernel"] in matrices) or constants <= set(rule)
            assert rule["kernel"] in matrices or rule["tokens"] is None or rule["tokens"] <= rule["BM"]


def test_weights_with_sparsity_have_rules_of_their_own() -> None:
    kernels = [
        choose(H200, bits, (4096, 4096), m, sparsity="2:4").kernel
        for bits in (4, 16)
        for m in (1, 64, 65, 3000)
    ]
    assert kernels == ["sparse24", "sparse24", "dense", "cusparselt"] * 2
    assert choose(H200, 4, (4096, 4096), 1).kernel == "mma"
    assert not supports(Machine("", "gfx942", 304), "2:4")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_overlay_is_added_by_kernels_up_to_64_tokens(architecture: str) -> None:
    machine = Machine("", architecture, 100)
    for tokens in (1, 8, 9, 17, 33, 64):
        launched = choose(machine, 4, (4096, 4096), tokens, "overlay")
        assert launched.kernel == ("mma" if architecture.startswith("sm") else "tile")
        assert tokens <= launched.BM
    assert choose(machine, 4, (4096, 4096), 65, "overlay").kernel == "dense"


def test_a_gpus_own_rules_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"shape": [4096, 4096], "tokens": 8, "kernel": "mma", "BM": 8, "BN": 64, "warps": 4, "stages": 2}
    package = tmp_path / "tuned"
    package.mkdir()
    (package / "nvidia-h200.json").write_text(json.dumps({"rules": [mine]}))
    (package / "default.json").write_text(files("nybble.kernels").joinpath("tuned/default.json").read_text())
    monkeypatch.setattr(launch, "files", lambda name: tmp_path)
    for cached in (launch._file, launch.choose):
        cached.cache_clear()
    try:
        assert choose(H200, 4, (4096, 4096), 5) == Launch("mma", 8, 64, 4, 2)
        assert choose(H200, 4, (4096, 8192), 5).BN == 128
        assert choose(H200, 4, (4096, 4096), 9).BM == 16
        assert choose(Machine("NVIDIA H100", "sm_90", 132), 4, (4096, 4096), 5).BN == 128
    finally:
        for cached in (launch._file, launch.choose):
            cached.cache_clear()
