"""A model read block by block against the same model loaded whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from nybble.engine.errors import CheckpointError
from nybble.engine.model.streamed import StreamedModel
from nybble.engine.quantize.job import quantize
from nybble.engine.quantize.options import QuantizeOptions
from safetensors.torch import load_file, save_file
from tiny_models import load_decoder, our_logits, tiny_transformer
from tiny_tokenizer import write_tokenizer


def logprobs(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with StreamedModel(folder) as model:
        hidden = model.embedding()(ids)
        for index in range(model.num_layers):
            hidden = model.layer(index)(hidden, [len(ids)])
        return model.head()(hidden)


@pytest.mark.parametrize(
    "options",
    [
        None,
        {"bits": 3, "actorder": "group"},
        {"checkpoint_format": "awq", "symmetric": False, "method": "rtn"},
        {"method": "gwq", "base": "rtn", "gradient_samples": 2},
        {"method": "sparse24", "bits": 16},
        {"method": "rtn", "lm_head_bits": 8},
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_equals_the_loaded_model(model_type: str, options: Any, tmp_path: Path) -> None:
    folder, ids = tmp_path / "original", torch.arange(5, 60)
    tied = model_type == "qwen3" and not (options or {}).get("lm_head_bits")
    tiny_transformer(model_type, vocab_size=320, tie_word_embeddings=tied).save_pretrained(folder)
    write_tokenizer(folder)
    if options is not None:
        given = {"group_size": 32, "num_samples": 4, "seq_len": 32, "report": False, **options}
        out = tmp_path / "out"
        quantize(QuantizeOptions(str(folder), str(out), **given), lambda *_: None, lambda _: None)
        folder = out
    expected = our_logits(load_decoder(folder), ids).log_softmax(-1)
    torch.testing.assert_close(logprobs(folder, ids), expected, rtol=1e-3, atol=1e-3)


def test_what_is_stored_is_counted(tmp_path: Path) -> None:
    model = tiny_transformer("qwen2", vocab_size=320)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    with StreamedModel(tmp_path) as found:
        assert found.num_params == sum(p.numel() for p in model.parameters())
        assert found.num_bytes == 2 * found.num_params
        assert (found.quant_method, found.vocab_size) == ("none", 320)
        weights = found.weights(1)
        assert len(weights) == 7
        name = "model.layers.1.mlp.down_proj"
        assert torch.equal(weights[name], model.get_submodule(name).weight.float())


def test_tensors_that_are_missing_are_told_at_once(tmp_path: Path) -> None:
    tiny_transformer("llama", vocab_size=320).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing tensor model\.layers\.2\.mlp\.up_proj\.weight"):
        StreamedModel(tmp_path)


def test_files_are_mapped_only_while_they_are_read(tmp_path: Path) -> None:
    """Pages that were read count as the process's memory."""
    tiny_transformer("llama").save_pretrained(tmp_path)
    with StreamedModel(tmp_path) as model:
        for read in (model.layer, model.weights):
            assert read(1) is not None
            assert str(tmp_path / "model.safetensors") not in Path("/proc/self/maps").read_text()
