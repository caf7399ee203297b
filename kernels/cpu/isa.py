"""Instruction sets of the compiled kernels, and how many tokens their int8 kernels take at once."""

AVX2, VNNI, AMX = range(3)
# Tokens of a tile, largest first, then 1. Four times both halves of a block fill AVX2's registers. On AVX-512
# more than eight gain nothing, nor do two blocks at once (Zen 4: 4 to 10 % slower).
TILES = {AVX2: (4, 3, 2), VNNI: (8, 4, 2), AMX: (16, 8, 4, 2)}
# Of them those that int8 kernels take for one token fewer too, with a row that nobody reads. int4 on Emerald
# Rapids: 3 tokens as 2 and 1 took 1.25 times as long as 4, 7 as 4, 2 and 1 1.27 times as long as 8.
ROUNDED = {AVX2: (), VNNI: (8, 4), AMX: (8, 4)}


def vectors_of(isa: int) -> int:
    """Whose vector instructions go with an instruction set: AMX has none of its own."""
    return VNNI if isa == AMX else isa
