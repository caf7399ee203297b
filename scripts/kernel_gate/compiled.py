"""One kernel compiled for one GPU, and what its machine code says of itself. Needs no GPU and no driver."""

import re
import subprocess
import tempfile
from collections import Counter
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from nybble.kernels.triton.variants import Variant
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from .machines import Machine
from .model import tile_tokens
from .sass import instructions, is_matrix, main_loop, misplaced_operands, opcode

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def module_of(variant: Variant) -> ModuleType:
    """Where its kernel is: below nybble.kernels.triton, or a module by itself."""
    name = variant.kernel.partition(":")[0]
    ours = f"nybble.kernels.triton.{name}"
    return import_module(ours if find_spec(ours) else name)


def compile_variant(variant: Variant, machine: Machine) -> dict[str, Any]:
    """Resources and instruction counts, ready for JSON. Raises what the compiler raises."""
    function = getattr(module_of(variant), variant.kernel.partition(":")[2])
    source = GluonASTSource if isinstance(function, GluonJITFunction) else ASTSource
    types = {**variant.signature, **dict.fromkeys(variant.constexprs, "constexpr")}
    signature = {argument: types[argument] for argument in function.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (argument, kind) in enumerate(signature.items())
        if kind.startswith("*") or argument in variant.aligned
    }
    number = machine.target.removeprefix("sm_")
    target = GPUTarget("cuda", int(number), 32) if machine.is_cuda else GPUTarget("hip", machine.target, 64)
    made = triton.compile(
        source(fn=function, signature=signature, constexprs=variant.constexprs, attrs=aligned),
        target=target,
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages, **variant.options},
    )
    found = _read_cuda(made, variant) if machine.is_cuda else _read_amd(made)
    misplaced = misplaced_operands(made.asm["ttgir"])
    return {"shared": made.metadata.shared, "misplaced": misplaced, **found}


def _read_cuda(made: Any, variant: Variant) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [_TOOLS / "cuobjdump", "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    assert registers is not None
    code = instructions(text)
    all_opcodes = Counter(opcode(instruction) for _, instruction in code)
    spills = sum(n for name, n in all_opcodes.items() if name.split(".")[0] in ("LDL", "STL"))
    loop = main_loop(code)
    found: dict[str, Any] = {
        "registers": int(registers[1]),
        "spills": spills + int(registers[4]),
        "opcodes": dict(all_opcodes),
        "mma": sorted(filter(is_matrix, all_opcodes)),
        "loop": None,
    }
    if loop is not None:
        told = loop.weights_per_warp(max(8, tile_tokens(variant))) / 32
        found["loop"] = dict(loop.opcodes)
        found["weights_per_thread"] = told or variant.weights
    return found


def _read_amd(made: Any) -> dict[str, Any]:
    text = made.asm["amdgcn"]

    def field(name: str) -> int:
        value = re.search(rf"\.{name}:\s+(\d+)", text)
        assert value is not None
        return int(value[1])

    opcodes = Counter(re.findall(r"^\s+([a-z]+_[a-z0-9_]+)", text, re.M))
    return {
        "registers": field("vgpr_count"),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
        "opcodes": dict(opcodes),
        "mma": sorted(name for name in opcodes if "mfma" in name),
        "loop": None,
    }
