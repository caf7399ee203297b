"""2:4 sparsity, alone or with codes: magnitude, Wanda (arXiv 2306.11695), SparseGPT (arXiv 2301.00774).

SparseGPT chooses two of every four columns on its sweep, by what they hold then, and later columns repay what
is lost. With codes (``--bits`` below 16) there are two ways. ``joint``: prune and round in one sweep
(SparseGPT), or round the original weights under a mask that stands, so that rounding repays pruning too.
Else: prune first, then round what is left. Pruned weights have the code of zero, hence only symmetric grids.
Ranges are those of what is left after pruning alone, which costs a sweep more; fitted on the way, to weights
that pruning has yet to change, they cost more loss (ours; measured in docs/quantizers.md).
"""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from ...kernels.layout import PackedWeight, QuantSpec
from ..errors import ConfigError
from ..model.config import ModelConfig
from .grid import StaysDenseError
from .hessian import HessianFactor, factorize
from .masks import mask_24, transposable_mask
from .options import DENSE_BITS, QuantizeOptions
from .pipeline import Recipe, ToRound
from .rounding import matrix_bytes
from .sweep import How, sweep
from .transforms import get_transform
from .work import Work


@dataclass(frozen=True, slots=True)
class PruneStats:
    """norms: [K], sqrt(E[x^2]) of the inputs (ones: not known); factor: None where nothing is swept."""

    norms: Tensor | None
    factor: HessianFactor | None

    @property
    def damping(self) -> float | None:
        """What the Hessian needed."""
        return None if self.factor is None else self.factor.damping


@dataclass(frozen=True, slots=True)
class Sparse24:
    """prune: how the mask is chosen. dense: only prune. joint, transposable: see above and ``masks``."""

    prune: Literal["magnitude", "wanda", "sparsegpt"] = "sparsegpt"
    dense: bool = False
    joint: bool = True
    transposable: bool = False
    damping: float = 0.01
    mse: float = 0.0

    @property
    def rows_independent(self) -> bool:
        """Each row has a mask of its own, but where masks are transposable."""
        return not self.transposable

    @property
    def statistics(self) -> str:
        """See Rounder."""
        return "one Hessian [K, K] in fp32 per distinct input, one at a time" if self.needs_inputs else ""

    @property
    def needs_inputs(self) -> bool:
        """All but pruning by magnitude."""
        return not (self.dense and self.prune == "magnitude")

    def settings(self) -> dict[str, object]:
        """See Rounder; ``sparsity`` is what loaders look for."""
        found: dict[str, object] = {"sparsity": "2:4", "prune": self.prune, "transposable": self.transposable}
        if self.needs_inputs:
            found["damp_percent"] = self.damping
        return found if self.dense else found | {"joint": self.joint, "mse": self.mse}

    def peak_bytes(self, config: ModelConfig, num_tokens: int) -> int:
        """Four [K, K] while factorizing, eight of the widest slot's weight while sweeping."""
        return matrix_bytes(config, squares=4 if self.needs_inputs else 0, weights=8)

    def begin(self, work: Work) -> None:
        """Nothing."""

    def prepare(self, hessian: Tensor | None, spec: QuantSpec) -> PruneStats:
        """See Rounder."""
        if hessian is None:
            return PruneStats(None, None)
        swept = self.prune == "sparsegpt" or not self.dense
        factor = factorize(hessian, None if self.dense else spec, self.damping, "none") if swept else None
        return PruneStats((hessian.diagonal() / 2).sqrt(), factor)

    def round(self, module: ToRound, stats: PruneStats) -> PackedWeight:
        """See Rounder."""
        assert module.exclude is None
        if module.weight.shape[1] % 4 or (self.transposable and len(module.weight) % 4):
            raise StaysDenseError(f"{tuple(module.weight.shape)} is not made of fours")
        weight, factor = module.weight, stats.factor
        chosen = self.prune == "sparsegpt" and not self.transposable
        mask = None if chosen else ~self._mask(weight, stats)
        if factor is None:
            assert mask is not None
            return PackedWeight(weight.masked_fill(mask, 0))
        if self.prune == "sparsegpt" or self.dense:
            pruned = sweep(weight, factor, None, How(pruned=mask, prune=chosen)).codes
            if self.dense:
                return PackedWeight(pruned)
        else:
            assert mask is not None
            pruned = weight.masked_fill(mask, 0)
        how = How(mse=self.mse, ranges=pruned, pruned=mask, prune=chosen)
        if not self.joint:
            weight, how = pruned, replace(how, pruned=pruned == 0, prune=False)
        return sweep(weight, factor, module.spec, how).packed(module.spec)

    def _mask(self, weight: Tensor, stats: PruneStats) -> Tensor:
        """Before any sweep: bool [rows, K], True stays."""
        score = weight.abs()
        if self.prune == "wanda":
            assert stats.norms is not None
            score = score * stats.norms
        elif self.prune == "sparsegpt":
            assert stats.factor is not None
            score = (score / stats.factor.upper.diagonal()).square_()
        return transposable_mask(score) if self.transposable else mask_24(score)


def recipe(options: QuantizeOptions) -> Recipe:
    """--method sparse24. Raises ConfigError for options that contradict it."""
    options.refuse_actorder("two of every four neighbours are chosen")
    dense = options.bits == DENSE_BITS
    overrides = (options.dynamic or {}).values()
    if dense and any(overrides):
        raise ConfigError("--dynamic: with --bits 16 nothing is rounded; only '-:' patterns mean something")
    if not dense and not all((options.symmetric, *(o.get("symmetric", True) for o in overrides))):
        raise ConfigError(
            "--asym: pruned weights need the code of zero in every group; use --sym with sparse24"
        )
    rounder = Sparse24(
        options.prune, dense, options.joint, options.transposable, options.damping, options.mse
    )
    return Recipe(rounder, get_transform(options), options.true_sequential)
