"""Compiling ahead: as launches are specialized on a real GPU, counted over a model's linears."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = """
import json, sys, time
import fake_gpu, torch
architecture = sys.argv[1]
fake_gpu.use(architecture)
from nybble.kernels.layout import PackedWeight, QuantSpec
from nybble.kernels.dispatch import Target
from nybble.kernels.triton import launch, low_bit, packing
from nybble.kernels.triton.linear import warm

machine = launch.Machine("fake", architecture, 132)

def linear(rows, cols, bias):
    spec = QuantSpec(4, 128, True)
    codes = torch.zeros(rows, cols, dtype=torch.uint8)
    scales = torch.ones(rows, cols // 128).half()
    weight = PackedWeight(codes, spec, scales, bias=torch.zeros(rows) if bias else None)
    return low_bit.LowBitLinear(packing.pack(weight, "cpu", torch.bfloat16), machine)

# qkv with a bias, o, gate_up, down, of two layers; shapes in the proportions of a model's.
shapes = [(384, 256, True), (256, 256, False), (1024, 256, False), (256, 512, False)]
linears = [linear(*shape) for shape in shapes for _ in range(2)]
started = time.time()
cuda = Target("cuda", torch.bfloat16)
count = warm([object(), *linears], cuda, 8192, 2)
seconds = time.time() - started
again = time.time()
warm(linears, cuda, 8192, 2)
print(json.dumps({"count": count, "seconds": seconds, "again": time.time() - again}))
"""


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_a_model_compiles_few_kernels_and_once(architecture: str, root: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(root / "tests/helpers")
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", SCRIPT, architecture]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # One for each tile of tokens, and on NVIDIA's one more of three of them for qkv's 384 outputs, which no
    # tile of 256 divides: a bias, another shape or another number of tokens compile nothing more.
    assert found["count"] == (2 if architecture == "gfx942" else 5 + 3), found
    assert found["again"] < found["seconds"] / 3, found
