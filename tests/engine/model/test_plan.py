"""The plan names every module of every supported architecture, with the shapes that transformers gives it."""

import pytest
from nybble.engine.formats.dense import DenseFormat
from nybble.engine.model.config import ModelConfig
from nybble.engine.model.plan import part_tensors, weight_plan

from ...helpers.tiny_models import tiny_transformer


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 24}),
        ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ],
)
def test_tensors_are_those_of_transformers(model_type: str, fields: dict[str, object]) -> None:
    model = tiny_transformer(model_type, **fields)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    slots = weight_plan(ModelConfig.from_dict(config))
    ours = {
        name: expected.shape
        for slot in slots
        for part in slot.parts
        for name, expected in part_tensors(slot, part, DenseFormat()).items()
    }
    theirs = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del theirs["lm_head.weight"]
    assert ours == theirs
    assert len({slot.name for slot in slots}) == len(slots)
