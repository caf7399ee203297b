"""Train Nybble's demo model: a Llama of 5.2 M parameters that tells small stories.

    python scripts/train_demo.py --minutes 90 --out engine/demo --synthetic synth.txt

The time is spent by the wall clock: the learning rate, the mixture of corpora and the width of
the windows all follow the share of `--minutes` that is over, so a run always ends annealed.
State is saved every few minutes and found again when the same command is started anew.  The
result is an ordinary Hugging Face checkpoint in `<out>/bf16` and a model card in `<out>`.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_data import PHASES, Documents, Mixture, documents, train_tokenizer
from demo_model import Llama, Shape
from demo_report import bits_per_byte, export, finish
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

DECAY = 0.45  # share of the time at which the learning rate begins to fall, linearly to zero
BATCH_TOKENS = 4096
MATRIX_RATE, OTHER_RATE, WEIGHT_DECAY = 4e-3, 3e-3, 0.1
SAVE_SECONDS, TEST_SECONDS, REFRESH_SECONDS = 240.0, 180.0, 180.0
EXPORT_SECONDS = 480.0


@dataclass
class Status:
    """What a run has done so far; saved with the weights."""

    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    losses: list[tuple[float, float]] = field(default_factory=list)
    tests: list[tuple[float, float]] = field(default_factory=list)


def optimizers(model: Llama) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the decoder layers, AdamW for the embedding and the norms."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, weight in model.named_parameters():
        (matrices if weight.ndim == 2 and "layers" in name else others).append(weight)
    return [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [
                {"params": [w for w in others if w.ndim == 2], "weight_decay": WEIGHT_DECAY},
                {"params": [w for w in others if w.ndim == 1], "weight_decay": 0.0},
            ],
            lr=OTHER_RATE,
            betas=(0.9, 0.95),
            fused=True,
        ),
    ]


def rate(share: float) -> float:
    """The learning rate's factor when `share` of the time is over."""
    if share < DECAY:
        return min(1.0, 0.05 + share / 0.01)
    return max(0.0, (1.0 - share) / (1.0 - DECAY))


class Trainer:
    """The training loop with its state."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.status = options, Status()
        torch.manual_seed(options.seed)
        torch.set_num_threads(options.threads)
        self.train, self.held = documents(options.data)
        options.work.mkdir(parents=True, exist_ok=True)
        self.tokenizer = self._tokenizer(options.work / "tokenizer.json", self.train)
        self.mixture = Mixture(self.tokenizer, self.train, options.synthetic)
        self.model = Llama(Shape(vocab=self.tokenizer.get_vocab_size()), options.dropout)
        self.optimizers = optimizers(self.model)
        self.rates = [[g["lr"] for g in o.param_groups] for o in self.optimizers]
        self.rng = np.random.default_rng(options.seed)
        self.choose = random.Random(options.seed)
        self.state_path = options.work / "state.pt"
        if self.state_path.exists():
            self.load()

    def _tokenizer(self, path: Path, train: Documents) -> Tokenizer:
        if not path.exists():
            train_tokenizer(train, self.options.vocab, self.options.seed).save(str(path))
        return Tokenizer.from_file(str(path))

    def save(self) -> None:
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "status": vars(self.status),
        }
        partial = self.state_path.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(self.state_path)

    def load(self) -> None:
        state = torch.load(self.state_path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.status = Status(**state["status"])
        seed = self.options.seed + self.status.steps
        self.rng, self.choose = np.random.default_rng(seed), random.Random(seed)
        torch.manual_seed(seed)
        print(f"going on after {self.status.seconds / 60:.1f} min", flush=True)

    def step(self, share: float) -> float:
        """One batch; returns its loss in nats per token."""
        _, width, shares = next(p for p in reversed(PHASES) if share >= p[0])
        inputs, targets = self.mixture.batch(shares, BATCH_TOKENS // width, width, self.rng)
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, full in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = full * rate(share)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.options.bf16):
            loss = self.model(torch.from_numpy(inputs), torch.from_numpy(targets))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.status.tokens += BATCH_TOKENS
        self.status.steps += 1
        return float(loss.detach())

    def test(self) -> str:
        """Bits per byte on the held-out stories and on as many training stories."""
        held = bits_per_byte(self.model, self.tokenizer, self.held["stories"])
        seen = bits_per_byte(self.model, self.tokenizer, self.train["stories"][:155])
        status = self.status
        status.tests.append((status.seconds, held))
        speed = status.tokens / max(status.seconds, 1.0)
        return (
            f"{status.seconds / 60:6.1f} min  step {status.steps:6d}  {status.tokens / 1e6:6.2f} M"
            f" tokens  {speed:5.0f} tok/s  loss {status.losses[-1][1]:.3f}"
            f"  stories: held out {held:.4f}, seen {seen:.4f} bits/byte"
        )

    def run(self, progress: Progress) -> None:
        total, mean = self.options.minutes * 60, 0.0
        task = progress.add_task("training", total=total, note="")
        due = dict.fromkeys(("test", "save", "refresh", "export"), 0.0)
        due["export"] = max(EXPORT_SECONDS, self.status.seconds)
        due["test"] = due["save"] = self.status.seconds + 60
        last = time.monotonic()
        while self.status.seconds < total:
            now, status = self.status.seconds, self.status
            if now >= due["refresh"]:
                self.mixture.refresh(self.choose)
                due["refresh"] = now + REFRESH_SECONDS
            loss = self.step(now / total)
            mean = loss if mean == 0 else 0.98 * mean + 0.02 * loss
            if status.steps % 20 == 0:
                status.losses.append((now, mean))
                progress.update(task, completed=now, note=f"{mean:.3f} nats/token")
            if now >= due["test"] and status.losses:
                progress.console.print(self.test(), soft_wrap=True, highlight=False)
                due["test"] = now + TEST_SECONDS
            if now >= due["save"]:
                self.save()
                due["save"] = now + SAVE_SECONDS
            if now >= due["export"]:
                export(self.model, self.tokenizer, self.options.out / "bf16")
                due["export"] = now + EXPORT_SECONDS
            status.seconds += time.monotonic() - last
            last = time.monotonic()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=90.0, help="time for training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("engine/demo"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data/text"))
    parser.add_argument("--teacher", type=Path, default=Path("../shared/data/models/tiny1m"))
    parser.add_argument("--synthetic", type=Path, help="stories drawn by demo_synth.py")
    parser.add_argument("--work", type=Path, default=Path(".cache/train_demo"), help="run state")
    parser.add_argument("--notes", default="", help="a remark on the run, for the model card")
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def main() -> None:
    options = parse()
    trainer = Trainer(options)
    sizes = {n: round(len(s.ids) / 1e6, 2) for n, s in trainer.mixture.streams.items()}
    print(f"{trainer.model.parameter_count():,} parameters; M tokens besides stories: {sizes}")
    note = TextColumn("{task.fields[note]}")
    columns = (*Progress.get_default_columns()[:3], TimeRemainingColumn(), note)
    with Progress(*columns, disable=not sys.stdout.isatty()) as progress:
        trainer.run(progress)
    trainer.save()
    finish(trainer.model, trainer.tokenizer, trainer.held, options, trainer.status)


if __name__ == "__main__":
    main()
