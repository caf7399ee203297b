"""Two models block beside block, against whole passes of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from nybble.engine.compare import compare, held_bytes
from nybble.engine.errors import ConfigError
from nybble.engine.model.streamed import StreamedModel
from nybble.engine.scoring import Window, cut_windows
from tiny_models import tiny_transformer


def saved(folder: Path, change: float | None = None) -> Any:
    model = tiny_transformer("llama", vocab_size=300).requires_grad_(False)
    if change is not None:
        model.model.layers[1].mlp.up_proj.weight.mul_(change)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def windows() -> list[Window]:
    ids = torch.randint(300, (3, 30), generator=torch.Generator().manual_seed(0)).tolist()
    return [window for document in ids for window in cut_windows(document, 16)]


def run(folders: tuple[Path, Path], windows: list[Window]) -> Any:
    with StreamedModel(folders[0]) as original, StreamedModel(folders[1]) as other:
        return compare(original, other, windows, lambda *_: None)


@pytest.mark.parametrize("chunk_bytes", [1, 8 * 64 * 40, 1 << 30])
def test_any_chunk_gives_the_same(
    chunk_bytes: int, tmp_path: Path, windows: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = saved(tmp_path / "before"), saved(tmp_path / "after", 1.1)
    monkeypatch.setattr("nybble.engine.compare.CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr("nybble.engine.scoring.BATCH_TOKENS", 20)
    monkeypatch.setattr("nybble.engine.compare.LOGIT_ROWS", 3)
    found = run((tmp_path / "before", tmp_path / "after"), windows)
    nll, kl, errors, count = 0.0, 0.0, [0.0] * 3, 0
    for window in windows:
        ids = torch.tensor([window.token_ids])
        ours, theirs = (model(ids, output_hidden_states=True) for model in (before, after))
        p, q = (out.logits[0, window.first - 1 : -1].double().log_softmax(-1) for out in (ours, theirs))
        nll -= float(q.gather(1, ids[0, window.first :, None]).sum())
        kl += float((p.exp() * (p - q)).sum())
        # The last entry has transformers' final norm over it, so the last block is left out.
        for layer in range(2):
            x, y = (out.hidden_states[layer + 1][0, window.first - 1 : -1] for out in (ours, theirs))
            errors[layer] += float(((x - y).square().sum(-1) / x.square().sum(-1)).sum())
        count += window.num_scored
    assert found.score.num_tokens == count
    assert found.score.nll == pytest.approx(nll, rel=1e-5)
    assert found.score.kl == pytest.approx(kl, rel=1e-3)
    assert found.layer_errors[:2] == pytest.approx([error / count for error in errors[:2]], rel=1e-3)
    assert found.layer_errors[0] == 0 < found.layer_errors[1]


def test_predictions_that_are_not_finite(tmp_path: Path, windows: list[Window]) -> None:
    saved(tmp_path / "before")
    saved(tmp_path / "after", 1e38)
    with pytest.raises(ConfigError, match="the model's predictions are not finite"):
        run((tmp_path / "before", tmp_path / "after"), windows)
    with pytest.raises(ConfigError, match="the original's predictions are not finite"):
        run((tmp_path / "after", tmp_path / "before"), windows)


def test_the_bound_of_hidden_states() -> None:
    assert held_bytes(100, 64, 50) == 8 * 64 * 100
    assert held_bytes(10**9, 64, 50) == 256 << 20
    assert held_bytes(10**9, 64, 10**7) == 8 * 64 * 10**7
