"""2:4 masks: of every 4 consecutive inputs of a row, 2 stay. True marks a weight that stays."""

from itertools import combinations, product

import torch
from torch import Tensor

TILE_ROWS = 1 << 16  # tiles of 4 x 4 that are scored at once


def mask_24(score: Tensor) -> Tensor:
    """The 2 largest of every 4 along the inputs. score: [rows, K], K a multiple of 4. bool [rows, K]."""
    quads = score.reshape(-1, 4)
    mask = torch.zeros_like(quads, dtype=torch.bool)
    mask.scatter_(1, quads.topk(2, dim=1).indices, True)
    return mask.view(score.shape)


def transposable_mask(score: Tensor) -> Tensor:
    """2 of 4 along both axes: each 4 x 4 tile keeps two in every row and two in every column, of the 90 ways
    the one with the largest sum (Hu et al., arXiv 2404.01847). score: [rows, K], both multiples of 4, >= 0.
    """
    rows, cols = score.shape
    templates = templates_24().to(score.device)
    tiles = score.view(rows // 4, 4, cols // 4, 4).transpose(1, 2).reshape(-1, 16)
    best = torch.cat(
        [(part @ templates.to(score.dtype).T).argmax(1) for part in torch.split(tiles, TILE_ROWS)]
    )
    mask = templates[best].view(rows // 4, cols // 4, 4, 4).transpose(1, 2)
    return mask.reshape(rows, cols)


def templates_24() -> Tensor:
    """[90, 16] bool: all 4 x 4 matrices with two ones in every row and column."""
    lines = [tuple(i in kept for i in range(4)) for kept in combinations(range(4), 2)]
    tiles = [
        tile
        for tile in product(lines, repeat=4)
        if all(sum(column) == 2 for column in zip(*tile, strict=True))
    ]
    return torch.tensor(tiles).view(-1, 16)
