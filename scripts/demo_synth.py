"""Sample synthetic stories from the tiny1m teacher (MIT licence), for the demo model.

The 4 MB of real stories are little for a 5 M parameter model, so `train_demo.py` can mix in
stories drawn at temperature 1 (no top-k, no top-p) from `tiny1m`, a 1 M parameter Llama that was
trained on TinyStories.  This script only draws them; it runs beside the training, which picks up
new stories while it goes on:

    python scripts/demo_synth.py --out .cache/train_demo/synth.txt --minutes 30

The teacher's context is 256 tokens, and it learnt to end every story there, finished or not.
A story that fills the context or stops in mid-sentence is therefore cut at its last blank and
marked with CUT, so that training on it does not learn to end stories there.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

SEPARATOR = "<|endoftext|>"
CUT = "<|cut|>"
BOS, EOS = 1, 2
CONTEXT = 256
FULL = 250  # a story of this many tokens ran into the end of the context
ENDINGS = (".", "!", "?", '"', "\u201d", "'")
HEAD_DIM = 64
NORM_EPS = 1e-6


@dataclass(frozen=True)
class Layer:
    """The weights of one decoder layer, with the q, k, v and the gate, up matrices joined."""

    norm1: torch.Tensor
    qkv: torch.Tensor
    out: torch.Tensor
    norm2: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Teacher:
    """A bare fp32 Llama with a static key/value cache: only what sampling from tiny1m needs."""

    def __init__(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        self.embed = weights["model.embed_tokens.weight"].float()
        self.head = weights["lm_head.weight"].float()
        self.norm = weights["model.norm.weight"].float()
        count = 1 + max(int(k.split(".")[2]) for k in weights if k.startswith("model.layers."))
        self.layers = [self._layer(weights, f"model.layers.{i}.") for i in range(count)]
        inverse = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
        angle = torch.arange(CONTEXT).float()[:, None] * inverse[None].repeat(1, 2)
        self.cos, self.sin = angle.cos(), angle.sin()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    @staticmethod
    def _layer(weights: dict[str, torch.Tensor], prefix: str) -> Layer:
        def get(*names: str) -> torch.Tensor:
            return torch.cat([weights[f"{prefix}{name}.weight"].float() for name in names])

        return Layer(
            norm1=get("input_layernorm"),
            qkv=get("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            out=get("self_attn.o_proj"),
            norm2=get("post_attention_layernorm"),
            gate_up=get("mlp.gate_proj", "mlp.up_proj"),
            down=get("mlp.down_proj"),
        )

    def step(self, ids: torch.Tensor, position: int, cache: list[torch.Tensor]) -> torch.Tensor:
        """Logits for one token per row; `cache[i]` is [2, batch, heads, CONTEXT, HEAD_DIM]."""
        x = self.embed[ids]
        rows, width = x.shape
        for layer, kept in zip(self.layers, cache, strict=True):
            h = F.rms_norm(x, (width,), layer.norm1, NORM_EPS)
            q, k, v = F.linear(h, layer.qkv).view(rows, 3, -1, HEAD_DIM).unbind(1)
            kept[0, :, :, position] = self._rotate(k, position)
            kept[1, :, :, position] = v
            keys, values = kept[:, :, :, : position + 1]
            q = self._rotate(q, position).unsqueeze(2)
            mixed = F.scaled_dot_product_attention(q, keys, values)
            x = x + F.linear(mixed.reshape(rows, width), layer.out)
            h = F.rms_norm(x, (width,), layer.norm2, NORM_EPS)
            gate, up = F.linear(h, layer.gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        return F.linear(F.rms_norm(x, (width,), self.norm, NORM_EPS), self.head)

    def _rotate(self, x: torch.Tensor, position: int) -> torch.Tensor:
        turned = torch.cat((-x[..., HEAD_DIM // 2 :], x[..., : HEAD_DIM // 2]), -1)
        return x * self.cos[position] + turned * self.sin[position]

    @torch.inference_mode()
    def sample(self, batch: int, generator: torch.Generator) -> list[str]:
        """Draw `batch` stories at temperature 1."""
        heads = self.embed.shape[1] // HEAD_DIM
        cache = [torch.zeros(2, batch, heads, CONTEXT, HEAD_DIM) for _ in self.layers]
        ids = torch.full((batch,), BOS)
        drawn = torch.empty(batch, CONTEXT, dtype=torch.long)
        for position in range(CONTEXT):
            odds = self.step(ids, position, cache).softmax(-1)
            ids = torch.multinomial(odds, 1, generator=generator)[:, 0]
            drawn[:, position] = ids
        return [self._text(row) for row in drawn.tolist()]

    def _text(self, ids: list[int]) -> str:
        length = ids.index(EOS) if EOS in ids else CONTEXT
        text = str(self.tokenizer.decode(ids[:length])).strip()
        if length < FULL and text.endswith(ENDINGS):
            return text
        return text[: max(text.rfind(" "), text.rfind("\n"))].rstrip() + CUT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--teacher", type=Path, default=Path("../shared/data/models/tiny1m"))
    parser.add_argument("--out", type=Path, required=True, help="text file to append to")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    teacher = Teacher(options.teacher)
    generator = torch.Generator().manual_seed(options.seed)
    start, written = time.monotonic(), 0
    while time.monotonic() - start < options.minutes * 60:
        stories = teacher.sample(options.batch, generator)
        with options.out.open("a", encoding="utf-8") as file:
            written += file.write("".join(f"{s}\n{SEPARATOR}\n" for s in stories))
        elapsed = time.monotonic() - start
        print(f"{elapsed:7.0f} s  {written / 1e6:7.2f} MB  {written / elapsed / 1e3:5.1f} kB/s", flush=True)


if __name__ == "__main__":
    main()
