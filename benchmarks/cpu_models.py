"""The models of benchmarks/cpu.py: random weights from a fixed seed (the demo: its own), the same for all."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nybble.engine.hardware import default_threads
from nybble.engine.model.config import ModelConfig
from nybble.engine.model.plan import weight_plan
from nybble.engine.model_files import DEMO_FOLDER
from nybble.engine.quantize.writer import CheckpointWriter

DEMO = DEMO_FOLDER.parent / "bf16"
SEED = 0
VOCAB = 32000


@dataclass(frozen=True)
class Shape:
    """A model and how it is measured. Lengths in tokens."""

    name: str
    title: str
    config: dict[str, Any] | None  # of a Llama with random weights; None: the demo
    threads: int
    context: int  # KV capacity of each of 8 streams
    prefill: int
    decode: int  # tokens of a decode measurement of one stream
    decode_batch: int  # the same for each of 8 streams

    @property
    def folder(self) -> str:
        """Its folder in the cache."""
        return f"{self.name}-seed{SEED}"


def llama(hidden: int, layers: int, heads: tuple[int, int, int], ffn: int, theta: float) -> dict[str, Any]:
    """config.json of a tied Llama; ``heads``: of queries, of keys and values, and their dimension."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 3,
        "dtype": "bfloat16",
    }


def shapes() -> dict[str, Shape]:
    """All of them, by name."""
    big = llama(2048, 16, (32, 8, 64), 8192, 500000.0)
    small = llama(288, 6, (6, 6, 48), 768, 10000.0)
    cores = default_threads()
    return {
        "1b": Shape("1b", "Llama shape of 1.04 B parameters, random weights", big, cores, 704, 512, 32, 16),
        "tiny": Shape("tiny", "Llama shape of 15 M parameters, random weights", small, 1, 704, 512, 256, 128),
        "demo": Shape("demo", "the demo model", None, cores, 512, 448, 256, 128),
    }


def prepare(shape: Shape, folder: Path, say: Callable[[str], None]) -> Path:
    """The checkpoint in bf16 and ours in 4 bit, made once; the folder that holds ``bf16`` and ``nybble``."""
    made = folder / shape.folder
    made.mkdir(parents=True, exist_ok=True)
    source, ours = made / "bf16", made / "nybble"
    if not source.exists():
        if shape.config is None:
            shutil.copytree(DEMO, source)
        else:
            say(f"writing random weights: {source}")
            write_random(shape.config, source)
    if not ours.exists():
        say(f"rounding to 4 bit, group 32: {ours}")
        command = [sys.executable, "-m", "nybble.server.cli", "quantize", str(source), str(ours)]
        command += ["--method", "rtn", "--bits", "4", "--group-size", "32"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return made


def write_random(config: dict[str, Any], out: Path) -> None:
    """A checkpoint of normal weights (deviation 0.02; norms: ones) in bf16, with the demo's tokenizer."""
    generator = torch.Generator().manual_seed(SEED)
    slots = weight_plan(ModelConfig.from_dict(config))
    parts = {part.name: (slot.kind, part) for slot in slots for part in slot.parts}  # a tied head comes once
    with CheckpointWriter(out, [f"{name}.weight" for name in parts], overwrite=False) as writer:
        for name, (kind, part) in parts.items():
            if kind == "vector":
                weight = torch.ones(part.out_features)
            else:
                weight = torch.randn(part.out_features, part.in_features, generator=generator) * 0.02
            writer.add(f"{name}.weight", weight.to(torch.bfloat16))
        writer.add_json("config.json", config)
        for name in ("tokenizer.json", "tokenizer_config.json"):  # some builders insist on one
            writer.add_file(DEMO / name)
        writer.commit()


def vocab_size(made: Path) -> int:
    """Of a prepared model."""
    return int(json.loads((made / "bf16" / "config.json").read_text())["vocab_size"])
