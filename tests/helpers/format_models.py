"""Tiny checkpoints in any format of ours, and the same weights as floats for transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoints import CONFIG, LINEARS, dense_tensors
from nybble.engine.build import build_engine
from nybble.engine.config import EngineConfig
from nybble.engine.formats.overlay import FILE, is_extra
from nybble.engine.quantize.writer import CheckpointWriter
from nybble.engine.records import SamplingParams
from nybble.kernels.layout import PackedWeight, QuantSpec
from torch import Tensor

PROMPTS = ([5, 9, 33, 4], [60], list(range(3, 40)))
NEW_TOKENS = 24
Make = Callable[[str, tuple[int, int], int], PackedWeight]  # a module's name, its shape and a seed


def random_weight(shape: tuple[int, int], spec: QuantSpec, seed: int) -> PackedWeight:
    """Codes of every value, scales in fp16, an order of inputs where ``spec`` has one."""
    generator = torch.Generator().manual_seed(seed)
    out, count = shape
    groups = spec.num_groups(count)
    codes = torch.randint(0, 2**spec.num_bits, shape, generator=generator, dtype=torch.uint8)
    scales = (torch.rand(out, groups, generator=generator) + 0.2).half() * (0.8 / 2**spec.num_bits)
    zeros = torch.randint(1, 2**spec.num_bits, (out, groups), generator=generator, dtype=torch.uint8)
    weight = PackedWeight(codes, spec, scales, None if spec.symmetric else zeros)
    if spec.actorder == "none":
        return weight
    order = weight.group_of_inputs()[torch.randperm(count, generator=generator)].int()
    return PackedWeight(codes, spec, scales, weight.zeros, order)


def prune(codes: Tensor, zero: int, seed: int = 0) -> Tensor:
    """Two of every four consecutive inputs become ``zero``."""
    noise = torch.rand(codes.shape, generator=torch.Generator().manual_seed(seed))
    order = noise.view(len(codes), -1, 4).argsort(2)
    return codes.masked_fill((order < 2).view(codes.shape), zero)


def write_model(
    folder: Path, stored: Any, make: Make, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A model whose linears in the decoder are ``make``'s. Returns the tensors of the same one in fp32."""
    dense = dense_tensors(dtype)
    written: dict[str, Tensor] = {}
    plain = {name: value.float() for name, value in dense.items()}
    weights = {}
    for layer in range(2):
        for number, (name, shape) in enumerate(LINEARS.items()):
            module = f"model.layers.{layer}.{name}"
            weights[module] = make(module, shape, 10 * layer + number)
    for name, value in dense.items():
        module = name.removesuffix(".weight")
        if module in weights:
            written |= stored.write(module, weights[module])
            plain[name] = weights[module].dequantize(torch.float64).float()
        else:
            written[name] = value
    with CheckpointWriter(folder, written, overwrite=False) as writer:
        for name, value in written.items():
            writer.add(name, value, beside=FILE if is_extra(name) else None)
        writer.add_json(
            "config.json", CONFIG | {"dtype": str(dtype).removeprefix("torch.")} | stored.config_entries()
        )
        writer.commit()
    return plain


def greedy(folder: Path, **options: Any) -> list[list[int]]:
    """What the engine answers to PROMPTS."""
    options = {"dtype": "float32", "cpu_activations": "fp32", **options}
    config = EngineConfig(str(folder), "cpu", max_model_len=64, num_threads=1, seed=0, **options)
    engine, _ = build_engine(config, lambda *_: None)
    found = engine.generate(
        list(PROMPTS), SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    )
    return [list(output.token_ids) for output in found]


def greedy_of_transformers(model: Any) -> list[list[int]]:
    """The same of a model of transformers, token by token and without its cache."""
    found = []
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = list(prompt)
            for _ in range(NEW_TOKENS):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            found.append(ids[len(prompt) :])
    return found


def transformers_model(tensors: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> Any:
    """A LlamaForCausalLM with these weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**{key: CONFIG[key] for key in CONFIG if key != "architectures"}))
    model.load_state_dict(tensors)
    return model.to(dtype).eval()
