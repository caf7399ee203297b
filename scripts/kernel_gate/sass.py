"""What the machine code of a kernel's main loop asks of an SM's pipes.

Lanes per clock and SM, from the throughput table of the CUDA programming guide: integer and logic 64, fp32
and half2 128, conversions between integers and floats 16 (the reason why ``(q >> s & 15).to(fp16)`` cannot
keep up with a data-centre GPU's memory); four warp instructions issue per clock.
"""

import re
from collections import Counter
from dataclasses import dataclass

_INTEGER = (
    "LOP3", "LOP", "SHF", "SHL", "SHR", "IADD3", "IADD", "LEA", "ISETP", "PRMT", "IMNMX", "SGXT", "BFE",
    "SEL",
    "VIADD", "VIADDMNMX", "PLOP3", "IABS", "R2P", "P2R", "VIMNMX", "BMSK", "POPC", "FLO",
)  # fmt: skip
_FLOAT = (
    "FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2", "IMAD", "FSETP", "FSEL", "FMNMX", "HMNMX2", "HSETP2",
    "MOV32I",
)  # fmt: skip
CONVERSIONS = ("I2F", "I2FP", "F2F", "F2FP", "F2I", "I2I")
LANES = {"integer": 64, "float": 128, "conversion": 16}
# Weights that one warp instruction multiplies, for every 8 tokens (mma.sync) or for all of them (wgmma: a
# warpgroup's 64 x 16 weights, a quarter for each warp).
_MMA_WEIGHTS = {"HMMA.16816": 256, "HMMA.SP.16832": 512, "HGMMA.64": 256}


@dataclass(frozen=True)
class Loop:
    """The innermost loop with most matrix instructions; ``opcodes``: full names and how often."""

    opcodes: Counter[str]

    @property
    def size(self) -> int:
        """Instructions."""
        return self.opcodes.total()

    def count(self, *names: str) -> int:
        """Instructions whose name up to the first dot is one of ``names``."""
        return sum(n for opcode, n in self.opcodes.items() if opcode.split(".")[0] in names)

    def pipe(self, name: str) -> int:
        """Instructions of a pipe in ``LANES``. Uniform ones are not any SM lane's."""
        members = {"integer": _INTEGER, "float": _FLOAT, "conversion": CONVERSIONS}[name]
        return self.count(*members)

    def weights_per_warp(self, tokens: int) -> float:
        """Weights that a warp multiplies in one pass, told by its matrix instructions; 0 if they do not tell.

        ``tokens``: the tile's tokens, a multiple of 8.
        """
        total = 0.0
        for opcode, n in self.opcodes.items():
            for prefix, weights in _MMA_WEIGHTS.items():
                if opcode.startswith(prefix):
                    total += n * weights / (1 if prefix.startswith("HGMMA") else tokens / 8)
        return total


def instructions(text: str) -> list[tuple[int, str]]:
    """(address, instruction without predicate) of ``cuobjdump -sass``."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z].*?)\s*;", text)
    return [(int(address, 16), instruction) for address, instruction in found]


def opcode(instruction: str) -> str:
    """Its full name."""
    return instruction.split()[0]


def is_matrix(name: str) -> bool:
    """Whether an opcode is a matrix instruction; HFMA2.MMA is not, whatever its name."""
    return name.split(".")[0].endswith("MMA")


def main_loop(code: list[tuple[int, str]]) -> Loop | None:
    """The shortest of the loops with most matrix instructions; None where no loop has any."""
    best: tuple[int, int, list[str]] | None = None
    for address, instruction in code:
        branch = re.match(r"BRA\S*\s.*?0x([0-9a-f]+)", instruction)
        if branch is None or int(branch[1], 16) >= address:
            continue
        body = [opcode(i) for a, i in code if int(branch[1], 16) <= a <= address]
        matrix = sum(map(is_matrix, body))
        if matrix and (best is None or (matrix, -len(body)) > best[:2]):
            best = (matrix, -len(body), body)
    return None if best is None else Loop(Counter(best[2]))


def misplaced_operands(ttgir: str) -> list[str]:
    """Layouts of operands of inline assembly with an MMA that are not a warp's fragments.

    Such assembly means lanes and registers: the last axis must be what a lane packs, the one before it the
    32 lanes of a warp. The interpreter takes that for granted; here the compiler's own module tells.
    """
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.\S+<.*>)$", ttgir, re.M))
    wrong = []
    for line in re.findall(r"^.*tt\.elementwise_inline_asm .*mma\..*$", ttgir, re.M):
        packed = re.search(r"packed_element = (\d+)", line)
        assert packed is not None
        for name in sorted(set(re.findall(r"tensor<[^<>]*, (#\w+)>", line))):
            text = layouts.get(name, name)
            sizes = re.search(r"sizePerThread = \[(.*?)\], threadsPerWarp = \[(.*?)\].*order = \[(\d+)", text)
            parts = [] if sizes is None else [[int(n) for n in sizes[i].split(", ")] for i in (1, 2)]
            if not parts or (
                parts[0] != [1] * (len(parts[0]) - 1) + [int(packed[1])]
                or parts[1] != [1] * (len(parts[1]) - 2) + [32, 1]
                or int(sizes[3]) != len(parts[0]) - 1  # type: ignore[index]
            ):
                wrong.append(text)
    return wrong
