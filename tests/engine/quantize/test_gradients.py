"""Gradients by recomputed blocks against transformers' autograd over the whole model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from nybble.engine.errors import ConfigError
from nybble.engine.model.plan import Slot
from nybble.engine.quantize import gradients
from nybble.engine.quantize.calibrate import Calibration
from nybble.engine.quantize.gradients import GradientModel, Sampled
from nybble.engine.quantize.sensitivity import plain_gradients
from nybble.engine.quantize.source import Block, Source
from nybble.engine.quantize.store import Store
from nybble.engine.quantize.work import Work
from nybble.kernels.layout import QuantSpec
from tiny_sequences import SEQUENCES
from torch import Tensor


def work_on(source: Source, folder: Path) -> Work:
    specs = {part.name: QuantSpec(4, 32, True) for _, part in source.parts()}
    return Work.on(source, specs, Calibration(SEQUENCES, "random", ""), folder / "work")


def by_autograd(model: Any) -> tuple[float, dict[str, Tensor]]:
    """The mean loss per token and its gradients in every linear."""
    model.requires_grad_(True)
    total = torch.zeros((), dtype=torch.float64)
    for sequence in SEQUENCES:
        logprobs = model(torch.tensor([sequence])).logits[0, :-1].log_softmax(-1)
        total = total - logprobs.gather(1, torch.tensor(sequence)[1:, None]).sum(dtype=torch.float64)
    loss = total / sum(len(s) - 1 for s in SEQUENCES)
    loss.backward()
    found = {n.removesuffix(".weight"): p.grad for n, p in model.named_parameters() if "_proj.weight" in n}
    return float(loss.detach()), found


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kept", [1 << 30, 1])
def test_they_are_autograd_s(
    model_type: str, kept: int, make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sequences at once, and one after another; logits in one piece, and in rows."""
    monkeypatch.setattr(gradients, "KEPT_BYTES", kept)
    monkeypatch.setattr(gradients, "LOGIT_BYTES", kept)
    folder, model = make_model(model_type, tie_word_embeddings=model_type == "llama")
    with Source(folder) as source, Store() as store:
        work = work_on(source, tmp_path)
        found = plain_gradients(work, store, len(SEQUENCES))
        loss = GradientModel(work).loss()
    expected_loss, expected = by_autograd(model)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


def test_accumulators_may_lie_in_files(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama")
    with Source(folder) as source, Store() as memory, Store(tmp_path) as files:
        work = work_on(source, tmp_path)
        in_memory = plain_gradients(work, memory, 2)
        in_files = plain_gradients(work, files, 2)
        for name, gradient in in_memory.items():
            assert torch.equal(gradient, in_files[name])
        assert any(tmp_path.glob(".store-*/*"))
    assert not any(tmp_path.glob(".store-*"))


def test_sampled_tokens_have_no_mean_gradient(make_model: Any, tmp_path: Path) -> None:
    """E[d log q / dw] = 0 where tokens come from q itself: averaged gradients shrink as 1 / sqrt(draws)."""
    folder, _ = make_model("llama", num_hidden_layers=1)
    name = "model.layers.0.mlp.down_proj"
    with Source(folder) as source:
        work = work_on(source, tmp_path)
        model, sums = GradientModel(work), []

        def take(slot: Slot, x: Tensor, g: Tensor, lengths: Sequence[int]) -> None:
            assert sum(lengths) == len(x) == len(g)
            if slot.name == name:
                sums.append(g.T @ x)

        targets = Sampled(0)
        for _ in range(64):
            list(model.run(take, targets=targets))
    draws = torch.stack(sums)
    single = draws.square().sum((1, 2)).mean().sqrt()
    assert float(draws.mean(0).norm()) < 0.25 * float(single)


def test_long_sequences_are_cut(make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "BATCH_TOKENS", 16)
    folder, _ = make_model("llama", num_hidden_layers=1)
    with Source(folder) as source:
        model = GradientModel(work_on(source, tmp_path))
        assert [len(sequence) for sequence in model.sequences] == [16, 4, 7, 16, 16, 2, 12]
        assert model.num_predicted == 73 - 7
        assert 0 < model.loss() < 20


def test_an_overflow_is_told(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama", num_hidden_layers=1)

    def break_it(block: Block) -> None:
        next(iter(block.weights().values())).fill_(torch.inf)

    with Source(folder) as source:
        model = GradientModel(work_on(source, tmp_path))
        with pytest.raises(ConfigError, match="its loss on the calibration is nan"):
            model.loss(break_it)
