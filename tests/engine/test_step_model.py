"""The eager step model: rows of a step in any order, and which of them are finite."""

import math
from pathlib import Path

import pytest
import torch
from nybble.engine.model.decoder import Decoder
from nybble.engine.step_model import EagerModel
from nybble.kernels.paged import PagedSequence
from tiny_models import load_decoder, our_logits, tiny_transformer

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture
def decoder(tmp_path: Path) -> Decoder:
    tiny_transformer("llama").save_pretrained(tmp_path)
    return load_decoder(tmp_path)


def forward(decoder: Decoder) -> EagerModel:
    """Two sequences of four tokens."""
    model = EagerModel(decoder, decoder.config.kv_specs("float32"), 2, 8)
    model.forward(TOKENS, [[PagedSequence(0, 4, 0, (0,)), PagedSequence(4, 4, 0, (1,))]])
    return model


@pytest.mark.parametrize(
    "rows", [[0], [7], [0, 1, 2, 3, 4, 5, 6, 7], [2, 3, 4], [3, 7], [6, 2, 2], range(4, 8)]
)
def test_rows_in_any_order(rows: list[int], decoder: Decoder) -> None:
    halves = [our_logits(decoder, torch.tensor(half)) for half in (TOKENS[:4], TOKENS[4:])]
    found = forward(decoder).logits(rows)
    torch.testing.assert_close(found.values, torch.cat(halves)[list(rows)], rtol=1e-4, atol=1e-4)
    assert found.largest == found.values.argmax(-1).tolist()
    assert found.finite == [True] * len(rows)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite(bad: float, decoder: Decoder) -> None:
    assert forward(decoder).finite() == [True] * 8
    decoder.embed_tokens = decoder.embed_tokens.clone()
    decoder.embed_tokens[9] = bad
    model = forward(decoder)
    # In the row before it, masked attention multiplies it by zero: of its sequence all may be lost.
    assert model.finite()[:4] == [True] * 4
    assert model.finite()[5:] == [False] * 3
    assert model.logits([6, 1, 5, 2]).finite == [False, True, False, True]
