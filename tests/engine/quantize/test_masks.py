"""2:4 masks against exhaustive search."""

from itertools import combinations

import pytest
import torch
from nybble.engine.quantize import masks
from nybble.engine.quantize.masks import mask_24, templates_24, transposable_mask


def test_there_are_90_transposable_tiles() -> None:
    tiles = templates_24().view(-1, 4, 4)
    assert len(tiles) == 90
    assert len({tuple(tile.flatten().tolist()) for tile in tiles}) == 90
    assert bool((tiles.sum(1) == 2).all())
    assert bool((tiles.sum(2) == 2).all())


def test_the_best_two_of_four_stay() -> None:
    score = torch.rand(7, 24, generator=torch.Generator().manual_seed(0))
    kept = mask_24(score)
    for quad, chosen in zip(score.reshape(-1, 4), kept.reshape(-1, 4), strict=True):
        assert int(chosen.sum()) == 2
        best = max(float(quad[list(pair)].sum()) for pair in combinations(range(4), 2))
        assert float(quad[chosen].sum()) == pytest.approx(best)


def test_equal_scores_still_leave_two_of_four() -> None:
    assert bool((mask_24(torch.zeros(3, 8)).view(-1, 4).sum(1) == 2).all())
    kept = transposable_mask(torch.zeros(8, 8))
    assert bool((kept.view(-1, 4).sum(1) == 2).all())


def test_transposable_masks_are_the_best_of_the_90(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "TILE_ROWS", 3)  # tiles come in portions
    score = torch.rand(12, 16, generator=torch.Generator().manual_seed(1))
    kept = transposable_mask(score)
    assert bool((kept.view(-1, 4).sum(1) == 2).all())
    assert bool((kept.T.reshape(-1, 4).sum(1) == 2).all())
    for row in range(0, 12, 4):
        for col in range(0, 16, 4):
            tile, chosen = score[row : row + 4, col : col + 4], kept[row : row + 4, col : col + 4]
            best = max(float(tile[t.view(4, 4)].sum()) for t in templates_24())
            assert float(tile[chosen].sum()) == pytest.approx(best)
