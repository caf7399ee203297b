"""Tiny models with random weights by transformers, and the same ones through our loader and decoder."""

import json
from pathlib import Path
from typing import Any

import torch
from nybble.engine.config import EngineConfig
from nybble.engine.engine import Engine
from nybble.engine.formats.gptq import GPTQFormat
from nybble.engine.model.decoder import Decoder, causal_attend
from nybble.engine.model.loader import load_model
from nybble.engine.model_files import ModelFiles
from nybble.engine.quantize.grid import round_nearest
from nybble.engine.runner import Runner
from nybble.engine.step_model import EagerModel
from nybble.kernels.dispatch import Ops
from nybble.kernels.layout import QuantSpec
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

BASE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def tiny_transformer(model_type: str, **fields: Any) -> Any:
    """A model of transformers in eval mode; norms and biases are random too. Equal shapes, equal weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**BASE, **fields})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise * (0.3 if name.endswith("bias") else 0.2))
    return model


def save_low_bit(model: Any, folder: Path, bits: int = 4, symmetric: bool = True) -> Path:
    """A model of transformers as a GPTQ checkpoint: its layers' linears rounded to nearest, groups of 32."""
    spec = QuantSpec(bits, 32, symmetric)
    storage = GPTQFormat(spec, "gptq" if symmetric else "gptq_v2")
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        module = name.removesuffix(".weight")
        rounded = (
            storage.write(module, round_nearest(value, spec)) if module.endswith("_proj") else {name: value}
        )
        tensors |= {key: tensor.contiguous() for key, tensor in rounded.items()}
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": storage.config_block()}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def load_decoder(folder: Path, dtype: str = "float32", device: str = "cpu") -> Decoder:
    """Our decoder over a saved model, with torch's own linears."""
    options = EngineConfig(str(folder), device, dtype, cpu_kernels="torch")  # type: ignore[arg-type]
    loaded = load_model(ModelFiles(folder), options, lambda *_: None)
    ops = Ops.resolve(loaded.target)
    return Decoder(loaded.config, loaded.weights, ops, loaded.target.activation_dtype)


def transformers_logits(model: Any, token_ids: Tensor) -> Tensor:
    """[T, vocab] of one sequence."""
    with torch.no_grad():
        logits: Tensor = model(token_ids[None]).logits[0]
    return logits


def our_logits(decoder: Decoder, token_ids: Tensor) -> Tensor:
    """[T, vocab] of one sequence, in one pass without a cache."""
    attend = causal_attend(decoder.config, decoder.ops, [len(token_ids)])
    with torch.no_grad():
        return decoder.logits(decoder(token_ids, torch.arange(len(token_ids)), attend))


def engine_over(decoder: Decoder, num_blocks: int = 400, max_model_len: int = 256, **options: Any) -> Engine:
    """An engine with a fresh KV cache; no token ends a sequence."""
    config = EngineConfig(model="", **{"block_size": 8, **options})
    specs = decoder.config.kv_specs(str(decoder.dtype).removeprefix("torch."))
    runner = Runner(EagerModel(decoder, specs, num_blocks, config.block_size), [], config.seed)
    return Engine(config, runner, specs, num_blocks, max_model_len, [])
