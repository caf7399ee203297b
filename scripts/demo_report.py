"""Evaluation, export and the model card of the demo model (see `train_demo.py`)."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from demo_card import write_card
from demo_data import CHAT_TEMPLATE, END, SEPARATOR, Documents, clip
from demo_model import Llama, export_weights
from tokenizers import Tokenizer

if TYPE_CHECKING:
    import argparse

TEST_BYTES = 450  # of each text; at most 256 tokens of tiny1m, which is that model's context
OTHER_BYTES = 150  # the same for the other corpora, which tiny1m spells out in bytes
LONG_BYTES = 1000  # what this model is tested on alone; its own context is 512 tokens
SAMPLES = 10
PROMPT = "Once upon a time"
SAMPLE_TOKENS = 300
CHAT_QUESTIONS = ("Tell me a story about a brave little dog.", "Write a short story about the sea.")


@torch.no_grad()
def bits_per_byte(model: Llama, tokenizer: Tokenizer, texts: list[str]) -> float:
    """Bits per byte of the first TEST_BYTES of each text, read after `<|endoftext|>`."""
    training = model.training
    model.eval()
    clipped = sorted((clip(t, TEST_BYTES) for t in texts), key=len)
    nats = 0.0
    for at in range(0, len(clipped), 16):
        rows = [tokenizer.encode(t).ids for t in clipped[at : at + 16]]
        width = max(map(len, rows))
        ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
        targets = torch.tensor([r[1:] + [-100] * (width - len(r) + 1) for r in rows])
        logits = model(ids).float()
        nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    model.train(training)
    return nats / math.log(2) / sum(len(t.encode()) for t in clipped)


def load(folder: Path) -> tuple[Any, Any]:
    """A checkpoint and its tokenizer through transformers, in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def hf_nats(folder: Path, texts: list[str], limit: int) -> list[float | None]:
    """Nats of the first `limit` bytes of each text through transformers, in fp32, read after BOS.

    None: the text does not fit the model's context, or its tokenizer cannot write it.
    """
    model, tokenizer = load(folder)
    nats: list[float | None] = []
    for text in (clip(t, limit) for t in texts):
        ids = [model.config.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
        fits = len(ids) <= model.config.max_position_embeddings
        if not fits or tokenizer.decode(ids[1:]).strip() != text.strip():
            nats.append(None)
            continue
        row = torch.tensor([ids])
        logits = model(row).logits[0, :-1]
        nats.append(F.cross_entropy(logits, row[0, 1:], reduction="sum").item())
    return nats


@dataclass(frozen=True)
class Score:
    """Bits per byte of both models on the same texts, and on how many of how many texts."""

    limit: int
    ours: float
    teacher: float
    used: int
    of: int


def compare(ours: Path, teacher: Path, texts: list[str], limit: int) -> Score:
    """Both models on the beginnings of those texts that both can read."""
    nats = [hf_nats(folder, texts, limit) for folder in (ours, teacher)]
    used = [i for i in range(len(texts)) if nats[0][i] is not None and nats[1][i] is not None]
    bits = math.log(2) * sum(len(clip(texts[i], limit).encode()) for i in used)
    sums = [sum(n[i] or 0.0 for i in used) for n in nats]
    return Score(limit, sums[0] / bits, sums[1] / bits, len(used), len(texts))


def alone(folder: Path, texts: list[str]) -> float:
    """Bits per byte of the first LONG_BYTES of the texts that fit this model's context."""
    nats = hf_nats(folder, texts, LONG_BYTES)
    fitting = [i for i, n in enumerate(nats) if n is not None]
    size = sum(len(clip(texts[i], LONG_BYTES).encode()) for i in fitting)
    return sum(nats[i] or 0.0 for i in fitting) / math.log(2) / size


def export(model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the checkpoint: bf16 weights, configuration, tokenizer and chat template."""
    from transformers import PreTrainedTokenizerFast

    bos, end = (int(tokenizer.token_to_id(t) or 0) for t in (SEPARATOR, END))
    export_weights(model, folder, bos, [end, bos])
    fast: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=END,
        model_max_length=model.shape.context,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


@torch.no_grad()
def verify(model: Llama, folder: Path, text: str) -> float:
    """Largest difference of logits, this module against transformers on the exported weights."""
    other, tokenizer = load(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids
    rounded = Llama(model.shape).eval()
    rounded.load_state_dict({k: v.bfloat16().float() for k, v in model.state_dict().items()})
    gap = (rounded(ids) - other(ids).logits).abs().max().item()
    if gap > 1e-3:
        raise SystemExit(f"the exported checkpoint differs from the trained model by {gap}")
    return float(gap)


def samples(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Unselected samples: plain ones by seed, and greedy answers to two chat requests."""
    model, tokenizer = load(folder)
    start = tokenizer(PROMPT, return_tensors="pt").input_ids
    settings: dict[str, Any] = {"max_new_tokens": SAMPLE_TOKENS, "pad_token_id": 0}
    plain = []
    for seed in range(SAMPLES):
        torch.manual_seed(seed)
        out = model.generate(start, do_sample=True, temperature=0.7, top_p=0.95, top_k=0, **settings)
        ended = out[0, -1].item() in model.generation_config.eos_token_id
        plain.append(tokenizer.decode(out[0], skip_special_tokens=True) + ("" if ended else " [...]"))
    chats = []
    for question in CHAT_QUESTIONS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).input_ids
        out = model.generate(ids, do_sample=False, temperature=None, top_p=None, **settings)
        chats.append((question, tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)))
    return plain, chats


def plot(losses: Sequence[Sequence[float]], tests: Sequence[Sequence[float]], path: Path) -> bool:
    """The loss curve as a small PNG, if matplotlib is there."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, left = pyplot.subplots(figsize=(6.4, 3.4), dpi=100)
    left.plot([t / 60 for t, _ in losses], [v for _, v in losses], color="#8aa4c8", lw=1)
    left.set(xlabel="minutes", ylabel="training loss, nats/token (all corpora)")
    right = left.twinx()
    right.plot([t / 60 for t, _ in tests], [v for _, v in tests], color="#b4452f", marker=".")
    right.set(ylabel="held-out stories, bits/byte", ylim=(0.6, 1.2))
    left.set(ylim=(1.5, 4.5))
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return True


@dataclass
class Results:
    """What the model card reports."""

    parameters: int
    size: int
    tokens: int
    steps: int
    seconds: float
    scores: dict[str, Score]
    alone: dict[str, float]
    gap: float
    plain: list[str]
    chats: list[tuple[str, str]]
    plotted: bool


def finish(
    model: Llama, tokenizer: Tokenizer, held: Documents, options: argparse.Namespace, status: Any
) -> None:
    """Export, verify, evaluate, sample, and write the card."""
    folder = options.out / "bf16"
    export(model, tokenizer, folder)
    gap = verify(model, folder, clip(held["stories"][0], TEST_BYTES))
    limits = dict.fromkeys(held, OTHER_BYTES) | {"stories": TEST_BYTES}
    scores = {n: compare(folder, options.teacher, t, limits[n]) for n, t in held.items()}
    plain, chats = samples(folder)
    results = Results(
        parameters=model.parameter_count(),
        size=(folder / "model.safetensors").stat().st_size,
        tokens=status.tokens,
        steps=status.steps,
        seconds=status.seconds,
        scores=scores,
        alone={n: alone(folder, texts) for n, texts in held.items()},
        gap=gap,
        plain=plain,
        chats=chats,
        plotted=plot(status.losses, status.tests, options.out / "loss.png"),
    )
    write_card(options.out / "README.md", results, options)
    print(time.strftime("%H:%M:%S"), scores, results.alone, gap, flush=True)
