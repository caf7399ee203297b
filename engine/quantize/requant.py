"""ReQuant (Hu et al., arXiv 2503.01901) over any base method: low-bit codes and a few exact weights.

1. The base method quantizes; the post-quantization integral scores every weight (``sensitivity.py``).
2. Self-adaptive outlier selection: each module's share of outliers follows its mean score, with the
   temperature that costs the least on the calibration; its outliers are its weights of largest magnitude.
3. The base method quantizes again, without the outliers: their groups' ranges are narrower, and in the base's
   loop they are exact.
   With a budget of bits, shares are chosen together with each module's bits and groups (``allocate.py``).
4. Step-wise significant weights detach: the integral again, and the weights that cost the most, over the
   whole model, go back to what they were. As often as there are steps; nothing is rounded again.

Both kinds are stored as fp16 residuals beside the codes. Of the paper we had no listing of the algorithms:
the formula of shares, the search for the temperature, the ranking over the whole model and the residuals are
ours.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice

from torch import Tensor

from ..errors import ConfigError
from ..model.config import ModelConfig
from . import gradients
from .allocate import Choice, allocate, candidates, residual_bits, scaled
from .gradients import GradientModel, Towards
from .methods import get_base
from .options import QuantizeOptions
from .outliers import adaptive_shares, capped, detach, kept, largest, threshold
from .pipeline import Recipe, Rerun
from .results import QuantizedBlock, QuantizedModule, Stage
from .sensitivity import ModuleScore, Sensitivity, before, integrate, nodes
from .store import Store, held_bytes
from .work import Work

TEMPERATURES = (math.inf, 4.0, 2.0, 1.0, 0.5)


@dataclass(frozen=True, slots=True)
class ReQuant:
    """outliers, significant: shares of all weights. steps: in how many the significant ones are detached.

    num_intervals: of the integral; num_sequences: how much of the calibration it reads. budget: bits per
    weight, everything counted, that choose bits, groups and outliers of every module in place of
    ``outliers``.
    """

    base: Recipe
    outliers: float = 0.0025
    significant: float = 0.0025
    steps: int = 2
    num_intervals: int = 32
    num_sequences: int = 100
    budget: float | None = None

    @property
    def statistics(self) -> str:
        """See Method."""
        return f"gradients of all weights, averaged on the path of quantization; {self.base.statistics}"

    def settings(self) -> dict[str, object]:
        """See Method."""
        return {
            "r_o": 100 * self.outliers,
            "r_s": 100 * self.significant,
            "beta": 100 * self.significant / self.steps,
            "pqi_intervals": self.num_intervals,
            "pqi_samples": self.num_sequences,
            "budget_bits": self.budget,
            **self.base.settings(),
        }

    def peak_bytes(self, config: ModelConfig, num_tokens: int) -> int:
        """The base, or a pass of gradients with an accumulator per weight, if those are not in files."""
        return max(self.base.peak_bytes(config, num_tokens), integral_bytes(config, num_tokens))

    def run(self, work: Work) -> Stage:
        """See Method."""
        stage = self.base.run(work)
        if self.budget is not None:
            stage = self._within(self.budget, work, stage)
        elif self.outliers:
            stage = self._requantize(work, stage)
        for step in range(self.steps if self.significant else 0):
            stage = self._detach(work, stage, f"detach-{step}")
        return stage

    def _integral(self, work: Work, stage: Stage, store: Store) -> Sensitivity:
        return integrate(work, stage, store, nodes(self.num_intervals), self.num_sequences)

    def _scores(self, work: Work, first: Stage) -> dict[str, ModuleScore]:
        """Of the base's result, by module; kept for a run that goes on after an interruption."""
        path = work.folder / "scores.json"
        if not path.exists():
            with Store.for_bytes(work.folder, 4 * work.num_weights) as store:
                scores = self._integral(work, first, store).modules()
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps({name: asdict(score) for name, score in scores.items()}))
            partial.replace(path)
        return {name: ModuleScore(**score) for name, score in json.loads(path.read_text()).items()}

    def _requantize(self, work: Work, first: Stage) -> Stage:
        """Every temperature is tried; the one with the least loss on the calibration stays."""
        scores = self._scores(work, first)
        means = {name: score.mass / score.num_weights for name, score in scores.items()}
        sizes = {name: score.num_weights for name, score in scores.items()}
        model, best = GradientModel(work, self.num_sequences), (math.inf, first)
        for temperature in TEMPERATURES:
            shares = adaptive_shares(means, sizes, self.outliers, temperature)
            again = Rerun(f"outliers-{temperature:g}", _largest_of(work, first, shares), first)
            stage = self.base.run(work, again)
            best = min(best, (model.loss(Towards(stage, 1.0)), stage), key=lambda found: found[0])
            work.log(f"outliers by mean score^(1/{temperature:g}): loss {best[0]:.4f} at best")
        return best[1]

    def _within(self, budget: float, work: Work, first: Stage) -> Stage:
        """Quantized again, each module as the budget allows, less what the significant weights will take."""
        scores = self._scores(work, first)
        mse = getattr(self.base.rounder, "mse", 0.0)
        choices: dict[str, list[Choice]] = {}
        widest = 0
        for block in first:
            weights = before(work, block)
            for module in block.modules:
                if module.weight is not None and module.weight.spec is not None:
                    weight, spec = weights[module.name], module.weight.spec
                    found = list(candidates(weight, spec, mse, overlay=self.significant > 0))
                    choices[module.name] = scaled(found, scores[module.name].mass, spec)
                    widest = max(widest, residual_bits(weight.shape[1]))
        weights_chosen = sum(score.num_weights for score in scores.values())
        room = (budget - self.significant * widest) * weights_chosen
        try:
            chosen = allocate(choices, room)
        except ValueError as error:
            raise ConfigError(f"--budget-bits {budget}: {error}; allow more") from error
        shares = {name: choice.outliers for name, choice in chosen.items()}
        specs = {name: choice.spec for name, choice in chosen.items()}
        again = Rerun("budget", _largest_of(work, first, shares), first)
        return self.base.run(work.with_specs({**work.specs, **specs}), again)

    def _detach(self, work: Work, stage: Stage, name: str) -> Stage:
        """Put back the weights with the highest |p| of those that are still rounded; a new stage."""
        done = work.stage(name)
        if len(done) == work.source.config.num_layers:
            return done
        share = self.significant / self.steps
        with Store.for_bytes(work.folder, 4 * work.num_weights) as store:
            found = self._integral(work, stage, store)

            def scores(block: QuantizedBlock) -> Iterator[tuple[QuantizedModule, Tensor, Tensor]]:
                weights = before(work, block)
                for module in block.modules:
                    if module.weight is not None:
                        change = module.weight.dequantize() - weights[module.name]
                        score = (found.gradients[module.name] * change).abs()
                        yield module, weights[module.name], score.masked_fill(kept(module.weight), 0)

            every = (score for block in stage for _, _, score in scores(block))
            least = threshold(every, round(share * work.num_weights))
            for block in islice(stage, len(done), None):
                picked = {
                    module.name: detach(module.weight, weight, capped(score, least, share))
                    for module, weight, score in scores(block)
                    if module.weight is not None
                }
                modules = (replace(m, weight=picked.get(m.name, m.weight)) for m in block.modules)
                done.save(replace(block, modules=tuple(modules)))
        return done


def _largest_of(work: Work, first: Stage, shares: Mapping[str, float]) -> Callable[[str], Tensor | None]:
    """The outliers of a module, by name: of the weights that the base rounds, with the edits of ``first``."""
    held: dict[str, Tensor] = {}

    def exclude(name: str) -> Tensor | None:
        if name not in held:
            held.clear()
            held.update(before(work, first.load(int(name.split(".")[2]))))
        return largest(held[name], shares.get(name, 0.0))

    return exclude


def integral_bytes(config: ModelConfig, num_tokens: int) -> int:
    """A bound of what a post-quantization integral holds: a pass and the accumulators that are in memory."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weights = config.num_layers * hidden * (2 * heads + 2 * kv_heads + 3 * ffn)
    return gradients.peak_bytes(config, num_tokens) + held_bytes(4 * weights)


def method(options: QuantizeOptions) -> ReQuant:
    """--method requant."""
    significant = options.significant_percent
    if significant is None:
        significant = 0.25 if options.budget_bits is None else 0.0
    return ReQuant(
        get_base(options),
        0.0025 if options.outlier_percent is None else options.outlier_percent / 100,
        significant / 100,
        options.detach_steps,
        options.pqi_intervals,
        options.gradient_samples,
        options.budget_bits,
    )
