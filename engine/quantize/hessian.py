"""The Hessian of a linear's output error, H = 2 E[x x^T] over its inputs x: gathered, damped, factorized."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...kernels.layout import QuantSpec

DAMPING_STEPS = 4  # each ten times the one before

# none: as they come. group: the largest diagonal of H first. gar: group-aware (arXiv 2505.14638), the largest
# first within each group, and groups by their largest, so that groups stay as they are.
Order = Literal["none", "group", "gar"]


class FactorizationError(ArithmeticError):
    """The Hessian has no Cholesky factor even with the strongest damping."""


class HessianMean:
    """A running mean over batches, fp32: one [K, K] matrix. Statistic of GPTQ."""

    def __init__(self, in_features: int) -> None:
        self.value = torch.zeros((in_features, in_features), dtype=torch.float32)
        self.num_tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Count ``inputs`` [tokens, K]."""
        tokens = len(inputs)
        total = self.num_tokens + tokens
        scaled = inputs.float()
        self.value.addmm_(scaled.T, scaled, beta=self.num_tokens / total, alpha=2 / total)
        self.num_tokens = total


@dataclass(frozen=True, slots=True)
class HessianFactor:
    """One Hessian made ready; linears that read the same input share it.

    upper: [K, K], U with inverse(H + damping) = U^T U, rows and columns in the order of ``perm``.
    perm: [K] int64, the order in which columns are rounded; None: as they are.
    groups: [K] int64, the group of each column, in the order of rounding.
    damping: what was added to H's diagonal, as a share of its mean.
    """

    upper: Tensor
    perm: Tensor | None
    groups: Tensor
    damping: float


def factorize(
    hessian: Tensor, spec: QuantSpec | None, damping: float, order: Order | None = None
) -> HessianFactor:
    """Order, damp and factorize ``hessian`` [K, K] (not changed). order None: ``spec.actorder``.

    An input that was never non-zero gets a diagonal of the mean: nothing is known of it, so its column
    is rounded to nearest and takes part in no one's error. Where H is not positive definite in its
    precision, the damping grows tenfold up to ``DAMPING_STEPS`` times. Raises FactorizationError.
    """
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(hessian).all()):
        raise FactorizationError("the calibration's activations are not finite")
    mean = float(diagonal.mean()) or 1.0
    if order is None:
        order = "none" if spec is None else spec.actorder
    size = len(diagonal) if spec is None or spec.group_size == -1 else spec.group_size
    perm, groups = _order(diagonal, size, order, by_position=spec is None or spec.actorder == "group")
    ordered = hessian if perm is None else hessian[perm][:, perm]
    for step in range(DAMPING_STEPS + 1):
        share = damping * 10**step
        upper = _inverse_factor(ordered, mean, share * mean)
        if upper is not None:
            return HessianFactor(upper, perm, groups, share)
    raise FactorizationError(f"not positive definite with a damping of {share:g}")


def _order(diagonal: Tensor, size: int, order: Order, by_position: bool) -> tuple[Tensor | None, Tensor]:
    """The columns in the order of rounding, and their groups in it.

    by_position: with "group", groups form in the order of rounding (a g_idx says which they are); else they
    are those of the checkpoint's order, and each column goes to its own.
    """
    columns = torch.arange(len(diagonal), device=diagonal.device)
    groups = columns // size
    if order == "none":
        return None, groups
    perm = torch.argsort(diagonal, descending=True, stable=True)
    if order == "group":
        return perm, groups if by_position else groups[perm]
    largest = torch.full((int(groups[-1]) + 1,), -torch.inf, dtype=diagonal.dtype, device=diagonal.device)
    largest.scatter_reduce_(0, groups, diagonal, "amax")
    rank = torch.argsort(torch.argsort(largest, descending=True, stable=True))
    perm = perm[torch.argsort(rank[groups[perm]], stable=True)]
    return perm, groups[perm]


def _inverse_factor(hessian: Tensor, mean: float, shift: float) -> Tensor | None:
    """U, upper, with inverse(H + shift) = U^T U, where H has ``mean`` for zeros of the diagonal.

    H mirrored along both axes is L L^T, so H = R R^T with R, L mirrored back, upper; then U = inverse(R).
    One factorization and one triangular solve: cheaper and more exact than inverting H.
    """
    mirrored = hessian.flip(0, 1)
    diagonal = mirrored.diagonal()
    diagonal.masked_fill_(diagonal == 0, mean).add_(shift)
    lower, failed = torch.linalg.cholesky_ex(mirrored)
    del diagonal, mirrored  # each matrix here is as large as H
    if int(failed):
        return None
    right = lower.flip(0, 1)
    del lower
    eye = torch.eye(len(right), dtype=right.dtype, device=right.device)
    upper = torch.linalg.solve_triangular(right, eye, upper=True)
    del right, eye
    return upper if bool(torch.isfinite(upper).all()) else None
