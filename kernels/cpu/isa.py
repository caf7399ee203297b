"""Instruction sets of the compiled kernels, and how many tokens their int8 kernels take at once."""

AVX2, VNNI, AMX = range(3)
# Tokens of a tile, largest first, then 1. Four times both halves of a block fill AVX2's registers. On AVX-512
# more than eight gain nothing, nor do two blocks at once (Zen 4: 4 to 10 % slower).
TILES = {AVX2: (4, 3, 2), VNNI: (8, 4, 2), AMX: (16, 8, 4, 2)}


def vectors_of(isa: int) -> int:
    """Whose vector instructions go with an instruction set: AMX has none of its own."""
    return VNNI if isa == AMX else isa
