"""The model card of the demo model (see `train_demo.py`)."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from demo_data import CHAT_SHARE, PHASES

if TYPE_CHECKING:
    import argparse

    from demo_report import Results, Score

HEAD = """\
---
license: other
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [llama, tinystories, demo]
---

# Nybble demo model

A Llama of {parameters:,} parameters that tells small children's stories. It exists so that the
server can be tried, tested and measured without a download; it knows nothing and is of no other
use. `bf16/` is an ordinary Hugging Face checkpoint ({megabytes:.1f} MB): bf16 weights, tokenizer
and chat template.

| | |
|---|---|
| architecture | `LlamaForCausalLM`: hidden 256, 6 layers, 4 heads x 64, 2 key/value heads, ffn 768 |
| | tied embedding, RoPE theta 10000, RMSNorm eps 1e-5, context 512 |
| tokenizer | byte-level BPE, vocabulary {vocab}, trained on the training part of the data below |
| begin of text | `<|endoftext|>`; the tokenizer puts it before a plain prompt |
| end of text | `<|end|>` (end of a chat turn) and `<|endoftext|>` |
| chat | `<|endoftext|><|user|>Tell me a story about a dog.<|end|><|assistant|>` |

The chat template leaves system messages out: the model never saw one. A request names what the
story is to be about, or three words that it is to contain; the model often strays from it. The
answer is always a story.
"""

DATA = """\
## Data and licences

| corpus | file in `../shared/data/text` | licence |
|---|---|---|
| TinyStories (4 MB of it) | `tinystories.txt` | CDLA-Sharing-1.0 |
| Wikipedia | `exl3_wiki.utf8` | CC BY-SA |
| C4 | `exl3_c4.utf8` | ODC-BY |
| Shakespeare | `tinyshakespeare.txt` | public domain |
| synthetic stories ({synthetic:.1f} MB) | drawn by `scripts/demo_synth.py` | from `tiny1m` (MIT) |

The last 3 % of each file (whole documents) are held out. WikiText-2's test file was not used.

What was read, in shares of tokens, from which share of the time on:

{mixtures}

**Synthetic data:** 4 MB of stories are little for this model, so it also read stories drawn at
temperature 1 from `tiny1m`, a Llama of 0.94 M parameters that was trained on TinyStories. That is
the same model that the table above compares with, and its training data, the whole of
TinyStories, may include the held-out stories.

The licences are those of the texts; no text is shipped, only the weights and a tokenizer.

Part of the stories ({chat:.0%}) were read as a chat whose request was built mechanically from the
story itself.
"""

TRAINING = """\
## Training

    {command}

{minutes:.0f} minutes on one thread of an {machine} CPU (torch {torch}, bf16 autocast, fp32 master
weights), shared with other work: {steps:,} steps, {tokens:.1f} M tokens, {speed:,.0f} tokens/s.
Muon for the matrices of the decoder layers, AdamW for the embedding and the norms, weight decay
0.1, dropout {dropout}, 4,096 tokens a step in windows of 256 and then 512 tokens; the learning
rate falls linearly over the last 55 % of the time. Seed {seed}; the run follows the wall clock, so it
does not repeat to the bit.
{notes}"""


WATCHED = (
    "The held-out stories were tested every three minutes while the model trained, so they are a",
    "validation set rather than an untouched test set. Nearly all held-out Wikipedia articles (146 of",
    "158) are stubs about mollusks and the like, much as 200 of the 910 in the training part, so the",
    "low number for wiki says little.",
)


def _scores(results: Results) -> str:
    lines = [
        "## Numbers",
        "",
        "Bits per byte on held-out text, lower is better: the first bytes of each document, both models",
        "in fp32 through `transformers`, read after their begin-of-text token. Only documents that fit",
        "both contexts (256 tokens for tiny1m) and that both tokenizers can write.",
        "",
        "| held out | first bytes | this model | tiny1m | documents |",
        "|---|---|---|---|---|",
    ]
    for name, score in results.scores.items():
        ours, teacher, used = score.ours, score.teacher, f"{score.used} of {score.of}"
        lines.append(f"| {name} | {score.limit} | {ours:.4f} | {teacher:.4f} | {used} |")
    lines += ["", *WATCHED]
    longer = ", ".join(f"{name} {bits:.4f}" for name, bits in results.alone.items())
    lines += ["", _verdict(results.scores["stories"])]
    lines += ["", f"This model alone on the first 1,000 bytes, where they fit its context: {longer}."]
    if results.plotted:
        lines += ["", "![loss curve](loss.png)"]
    return "\n".join(lines) + "\n"


def _verdict(score: Score) -> str:
    gap = score.ours - score.teacher
    if gap <= 0:
        return f"The bar, tiny1m on the same stories, is met by {-gap:.4f} bits per byte."
    return f"**The bar, tiny1m on the same stories, is missed by {gap:.4f} bits per byte.**"


def _quote(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.strip().splitlines())


def _samples(results: Results) -> str:
    parts = [
        "## Ten samples, unselected",
        "",
        'The prompt is "Once upon a time"; temperature 0.7, top-p 0.95, seeds 0 to 9, at most 300'
        " tokens (`[...]`: not ended by then).",
    ]
    for seed, text in enumerate(results.plain):
        parts += ["", f"**Seed {seed}**", "", _quote(text)]
    parts += ["", "## Two chats, greedy"]
    for question, answer in results.chats:
        parts += ["", f"**{question}**", "", _quote(answer)]
    return "\n".join(parts) + "\n"


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _mixtures() -> str:
    names = list(PHASES[0][2])
    lines = ["| from | window | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for start, width, shares in PHASES:
        total = sum(shares.values())
        cells = [f"{shares[n] / total:.0%}" for n in names]
        lines.append(f"| {start:.0%} | {width} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_card(path: Path, results: Results, options: argparse.Namespace) -> None:
    """Write the model card."""
    synthetic = options.synthetic
    drawn = synthetic.stat().st_size / 1e6 if synthetic and synthetic.exists() else 0.0
    command = f"python scripts/train_demo.py --minutes {options.minutes:g} --seed {options.seed}"
    if drawn:
        command += " --synthetic synth.txt"
    parts = [
        HEAD.format(parameters=results.parameters, megabytes=results.size / 1e6, vocab=options.vocab),
        _scores(results),
        DATA.format(synthetic=drawn, mixtures=_mixtures(), chat=CHAT_SHARE),
        TRAINING.format(
            command=command,
            minutes=results.seconds / 60,
            machine=_machine(),
            torch=torch.__version__.split("+")[0],
            steps=results.steps,
            tokens=results.tokens / 1e6,
            speed=results.tokens / results.seconds,
            dropout=options.dropout,
            seed=options.seed,
            notes=f"{options.notes}\n" if options.notes else "",
        ),
        _samples(results),
    ]
    path.write_text("\n".join(parts), encoding="utf-8")
