"""Make the demo model's GPTQ checkpoint from its bf16 weights, and add what it cost to the model card.

    python scripts/quantize_demo.py

Reads ``engine/demo/bf16`` and the texts it was trained on, writes ``engine/demo/gptq-4bit-g64`` with
``nybble quantize``, scores the original, this checkpoint and rounding to nearest on held-out stories with
``nybble eval``'s code, and replaces the section "Quantized" of ``engine/demo/README.md``.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from demo_data import SEPARATOR, Documents, as_chat, documents
from nybble.engine.evaluate import EvaluateOptions, evaluate

NAME = "gptq-4bit-g64"
OPTIONS = ("--bits", "4", "--group-size", "64", "--sym")
GPTQ = ("--method", "gptq", "--num-samples", "512", "--seq-len", "512", "--mse", "2.4")
# Documents of the calibration text by corpus; a third of the stories are chats, as in training.
SHARES = {"stories": 640, "wiki": 40, "c4": 40, "shakespeare": 20}
CHAT_SHARE = 1 / 3
SECTION = "## Quantized\n"


def calibration_text(train: Documents, seed: int) -> str:
    """Training documents, the special tokens of chats written out; the tokenizer puts its own in front."""
    choose = random.Random(seed)
    picked = []
    for name, count in SHARES.items():
        for text in choose.sample(train[name], min(count, len(train[name]))):
            chat = name == "stories" and choose.random() < CHAT_SHARE
            picked.append(as_chat(text, choose).removeprefix(SEPARATOR) if chat else text)
    choose.shuffle(picked)
    return SEPARATOR.join(picked)


def quantize(demo: Path, out: Path, *options: str) -> None:
    """Run the command."""
    command = [sys.executable, "-P", "-m", "nybble.server.cli", "quantize", str(demo / "bf16"), str(out)]
    subprocess.run([*command, *OPTIONS, *options, "--overwrite"], check=True)


def score(folder: Path, demo: Path, text: Path) -> dict[str, Any]:
    """Figures of one checkpoint on ``text``, in fp32, against the bf16 one."""
    options = EvaluateOptions(str(folder), against=str(demo / "bf16"), text=str(text))
    return evaluate(options, lambda phase, done, total: None, print)


def section(scores: dict[str, dict[str, Any]], sizes: dict[str, int], num_documents: int) -> str:
    """The card's text."""
    tokens = scores["bf16"]["num_tokens"]
    lines = [
        SECTION,
        f"`{NAME}/` holds the same model with 4-bit weights (GPTQ, groups of 64, symmetric; embedding and",
        "norms stay bf16); it is what `nybble serve` loads where no model is named. Made by",
        "`python scripts/quantize_demo.py`: calibrated on training documents only, scored with `nybble eval`",
        f"in fp32 on the {num_documents} held-out stories ({tokens:,} tokens):",
        "",
        "| weights | bytes | NLL per token | bits per byte | KL per token | same top token |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in scores.items():
        cells = [
            name,
            f"{sizes[name] / 1e6:.2f} MB",
            *(f"{found[key]:.4f}" for key in ("nll_per_token", "bits_per_byte", "kl_per_token")),
            f"{found['top1_agreement']:.2%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def replace_section(card: str, text: str) -> str:
    """``card`` with its section replaced, or with ``text`` before the section "Data and licences"."""
    start = card.find(SECTION)
    if start >= 0:
        end = card.find("\n## ", start + len(SECTION))
        return card[:start] + text + (card[end:] if end >= 0 else "")
    before = card.find("## Data and licences")
    return card + "\n" + text if before < 0 else card[:before] + text + "\n" + card[before:]


def main() -> None:
    """Make the checkpoint, score it, write the card's section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("engine/demo"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data/text"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    demo: Path = options.demo
    train, held = documents(options.data)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "calibration.txt").write_text(calibration_text(train, options.seed), encoding="utf-8")
        (work / "held-out.txt").write_text(SEPARATOR.join(held["stories"]), encoding="utf-8")
        quantize(demo, work / NAME, *GPTQ, "--calibration", str(work / "calibration.txt"))
        quantize(demo, work / "rtn", "--method", "rtn")
        folders = {
            "bf16": demo / "bf16",
            "GPTQ 4-bit": work / NAME,
            "rounded to nearest, 4-bit": work / "rtn",
        }
        scores = {name: score(folder, demo, work / "held-out.txt") for name, folder in folders.items()}
        sizes = {name: (folder / "model.safetensors").stat().st_size for name, folder in folders.items()}
        text = section(scores, sizes, len(held["stories"]))
        print(text)
        shutil.rmtree(demo / NAME, ignore_errors=True)
        shutil.copytree(work / NAME, demo / NAME)
    card = demo / "README.md"
    if card.exists():
        card.write_text(replace_section(card.read_text(encoding="utf-8"), text), encoding="utf-8")
    else:
        print(f"{card} does not exist yet: run this again when it does", file=sys.stderr)


if __name__ == "__main__":
    main()
