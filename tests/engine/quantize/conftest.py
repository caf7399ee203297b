"""Tiny random models with a tokenizer, saved as folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_transformer
from tiny_tokenizer import write_tokenizer

MakeModel = Callable[..., tuple[Path, Any]]


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """(folder, transformers' model) of an architecture with fields changed."""

    def make(model_type: str = "llama", **fields: Any) -> tuple[Path, Any]:
        folder = tmp_path / "original"
        model = tiny_transformer(model_type, vocab_size=300, **fields).requires_grad_(False)
        model.save_pretrained(folder)
        write_tokenizer(folder)
        return folder, model

    return make


@pytest.fixture(scope="session")
def tiny1m(root: Path) -> Path:
    """The trained model of the shared data."""
    folder = root / "../shared/data/models/tiny1m"
    if not folder.is_dir():
        pytest.skip("../shared/data is absent: no trained model to quantize")
    return folder


@pytest.fixture(scope="session")
def stories(root: Path) -> list[str]:
    """The shared stories."""
    path = root / "../shared/data/text/tinystories.txt"
    if not path.exists():
        pytest.skip("../shared/data is absent: no stories to score")
    return path.read_text().split("<|endoftext|>")
