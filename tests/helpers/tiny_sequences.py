"""Token sequences for tiny models of at least 290 tokens: random, of unequal lengths."""

import torch

SEQUENCES = tuple(
    tuple(torch.randint(5, 290, (length,), generator=torch.Generator().manual_seed(length)).tolist())
    for length in (20, 7, 33, 2, 12)
)
