"""YAQA (arXiv 2505.22988): adaptive rounding of a weight by both sides of its curvature.

With the Fisher information of W [m, n] as H_O x H_I (``kronecker.py``), the model's divergence grows with
tr(E^T H_O E H_I) for E = W - Q. Let H = L D L^T with L unit lower triangular, and round, for every (i, j),

    Q_ij = round(W_ij + (L_O^T E L_I - E)_ij),

which asks of E only what is below and to the right of (i, j). The loss then is sum r_ij^2 D_O[i] D_I[j],
where r is what rounding left. H_O = I gives GPTQ, from right to left.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...kernels.layout import PackedWeight, QuantSpec, SparseOverlay
from ..errors import ConfigError, LayerError
from ..model.config import ModelConfig
from . import gradients
from .grid import Grid, fit, fit_by, restore
from .hessian import FactorizationError
from .kronecker import Sketches, sketch_bytes
from .options import QuantizeOptions
from .pipeline import Recipe, ToRound
from .rounding import matrix_bytes
from .store import held_bytes
from .work import Work

TILE = 128


def unit_lower(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """L unit lower triangular, D [n], L diag(D) L^T = ``matrix``; None where it is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return None
    diagonal = lower.diagonal()
    return lower / diagonal, diagonal.square()


def round_two_sided(
    weight: Tensor,
    factors: tuple[Tensor, Tensor],
    spec: QuantSpec,
    mse: float = 0.0,
    exclude: Tensor | None = None,
    costs: Tensor | None = None,
) -> PackedWeight:
    """Quantize ``weight`` [m, n] (not changed). factors: L_O [m, m], L_I [n, n], unit lower triangular.

    mse: 0 takes whole ranges, else the exponent of the error that a group's range minimises; costs: [n], what
    an input's error counts in it (D_I is what it counts in the loss); None: all the same.

    A group of at most TILE inputs is fitted when it is reached, on weights that hold every error below and to
    the right of its tile (ours; the paper's quantizers have no groups); a wider one on the weights as they
    come. exclude: [m, n] bool, weights that count for no range and make no error; what the recursion made of
    them comes back exactly (to fp16) by ``outliers``. Raises ScaleOverflowError.
    """
    return _TwoSided(weight, factors, spec, _Ranges(mse, exclude, costs)).run()


@dataclass(frozen=True, slots=True)
class _Ranges:
    """What the ranges of groups depend on; see round_two_sided."""

    mse: float
    exclude: Tensor | None
    costs: Tensor | None

    def fit(self, weight: Tensor, spec: QuantSpec, down: slice, inputs: slice) -> Grid:
        """The grid of one group, whose weights ``weight`` stand at [down, inputs]."""
        masked = None if self.exclude is None else self.exclude[down, inputs]
        if self.mse == 0 or self.costs is None:
            return fit(weight, spec, self.mse, masked)
        costs = self.costs[inputs]
        counted = weight if masked is None else weight.masked_fill(masked, 0)
        return fit_by(counted, spec, lambda d: (d.abs_().pow_(self.mse) * costs).sum(1, keepdim=True))


class _TwoSided:
    def __init__(
        self,
        weight: Tensor,
        factors: tuple[Tensor, Tensor],
        spec: QuantSpec,
        ranges: _Ranges,
    ) -> None:
        self.weight, self.spec, self.ranges, self.exclude = weight, spec, ranges, ranges.exclude
        self.lower_out, self.lower_in = factors
        rows, cols = weight.shape
        self.size = cols if spec.group_size == -1 else spec.group_size
        self.error = torch.zeros_like(weight)
        self.codes = torch.zeros_like(weight)
        shape = (rows, spec.num_groups(cols))
        self.scales, self.zeros = weight.new_empty(shape), weight.new_empty(shape)
        if self.size > TILE:
            self._fit(weight, slice(0, rows), slice(0, cols))

    def run(self) -> PackedWeight:
        """Tiles from the bottom to the top of each block of columns, blocks from right to left."""
        rows, cols = self.weight.shape
        for start in reversed(range(0, cols, TILE)):
            across = slice(start, min(start + TILE, cols))
            mixed = self.error[:, across.stop :] @ self.lower_in[across.stop :, across]
            for top in reversed(range(0, rows, TILE)):
                down = slice(top, min(top + TILE, rows))
                below = self.lower_out[down.stop :, down].T @ mixed[down.stop :]
                target = self.weight[down, across] + mixed[down] + below
                if self.size <= TILE:
                    self._fit(target, down, across)
                self._tile(down, across, target, mixed)
        return self._packed()

    def _fit(self, weight: Tensor, down: slice, across: slice) -> None:
        """Grids of the groups in ``across`` for ``weight``, which stands at [down, across]."""
        for start in range(across.start, across.stop, self.size):
            stop = min(start + self.size, across.stop)
            columns = weight[:, start - across.start : stop - across.start]
            grid = self.ranges.fit(columns, self.spec, down, slice(start, stop))
            self.scales[down, start // self.size] = grid.scales[:, 0]
            self.zeros[down, start // self.size] = grid.zeros[:, 0]

    def _tile(self, down: slice, across: slice, target: Tensor, mixed: Tensor) -> None:
        """Round one tile, anti-diagonal by anti-diagonal, whose entries do not depend on each other.

        target: the weights and what the outside asks for. mixed: E L_I of what is done, then the tile's too.
        Rows are mirrored, so that an anti-diagonal is a diagonal: its rows and columns are then slices.
        """
        group = torch.arange(across.start, across.stop) // self.size
        weight, scales, zeros = (
            matrix.flip(0)
            for matrix in (self.weight[down, across], self.scales[down, group], self.zeros[down, group])
        )
        keep = None if self.exclude is None else self.exclude[down, across].flip(0)
        rows, cols = weight.shape
        lower_in, upper_out = (
            self.lower_in[across, across].contiguous(),
            self.lower_out[down, down].flip(0, 1),
        )
        # state[0]: the targets, but for what rows below ask, which is in asked [c, r]; state[1]: E L_I.
        state = torch.stack([target.flip(0), mixed[down].flip(0)])
        asked = weight.new_zeros(cols, rows)
        codes, errors = torch.empty_like(weight), torch.empty_like(weight)
        max_code = 2**self.spec.num_bits - 1
        for step in range(rows + cols - 1):
            first, last = max(0, step - cols + 1), min(rows, step + 1)
            place = cols - 1 - step + first
            a, j = slice(first, last), slice(place, place + last - first)
            wanted = state[0, a, j].diagonal() + asked[j, a].diagonal()
            scale, zero = scales[a, j].diagonal(), zeros[a, j].diagonal()
            code = (torch.round(wanted / scale) + zero).clamp_(0, max_code)
            value = scale * (code - zero)
            if keep is not None:
                value += keep[a, j].diagonal() * (wanted - value).to(torch.float16).to(value.dtype)
            error = weight[a, j].diagonal() - value
            codes[a, j].diagonal().copy_(code)
            errors[a, j].diagonal().copy_(error)
            state[:, a] += error[:, None] * lower_in[j]
            asked[j] += state[1, a, j].diagonal()[:, None] * upper_out[a]
        self.codes[down, across], self.error[down, across] = codes.flip(0), errors.flip(0)
        mixed[down] = state[1].flip(0)

    def _packed(self) -> PackedWeight:
        zeros = None if self.spec.symmetric else self.zeros.to(torch.uint8)
        packed = PackedWeight(self.codes.to(torch.uint8), self.spec, self.scales.to(torch.float16), zeros)
        return restore(self.weight - self.error, packed, self.exclude)


@dataclass(slots=True, eq=False)
class YAQA:
    """shrinkage: share of the identity in both factors, once their mean diagonals are 1.

    activations: share of the Hessian of the inputs, as they come from the blocks already quantized, in H_I.
    It is ours: a sketch of few sequences is noisy, and knows only the original model. seed: of the tokens
    drawn.
    """

    shrinkage: float = 0.1
    activations: float = 0.5
    mse: float = 0.0
    seed: int = 0
    _sketches: Sketches | None = field(default=None, init=False)
    statistics = (
        "a sketch of the Fisher information, [out, out] and [in, in] in fp32 for every linear at once"
    )
    needs_inputs = True
    rows_independent = False

    def settings(self) -> dict[str, object]:
        """See Rounder."""
        return {
            "shrinkage": self.shrinkage,
            "activation_share": self.activations,
            "mse": self.mse,
            "sketch": "B",
        }

    def peak_bytes(self, config: ModelConfig, num_tokens: int) -> int:
        """The sketch's pass over the model with its sums, or six [K, K] and weights while rounding."""
        sketching = gradients.peak_bytes(config, num_tokens) + held_bytes(sketch_bytes(config))
        return max(sketching, matrix_bytes(config, squares=6, weights=8))

    def begin(self, work: Work) -> None:
        """Sketch the whole model."""
        self._sketches = Sketches((work.kept or work.folder) / "yaqa")
        self._sketches.gather(work, self.seed)

    def prepare(self, hessian: Tensor | None, spec: QuantSpec) -> Tensor:
        """See Rounder."""
        assert hessian is not None
        if not bool(torch.isfinite(hessian).all()):
            raise FactorizationError("the calibration's activations are not finite")
        return hessian

    def round(self, module: ToRound, stats: Tensor) -> PackedWeight:
        """See Rounder."""
        assert self._sketches is not None
        outputs, inputs = map(_unit_diagonal, self._sketches(module.name))
        if not bool(torch.isfinite(outputs).all() and torch.isfinite(inputs).all()):
            raise LayerError(
                f"{module.name}: the sketch of its gradients is not finite; use --method gptq",
                layer=module.name,
            )
        inputs.lerp_(_unit_diagonal(stats), self.activations)
        order = _Order.of(outputs, inputs, module.spec)
        (lower_out, _), (lower_in, costs) = (
            _shrunk_factors(order.rows_of(outputs), self.shrinkage),
            _shrunk_factors(order.cols_of(inputs), self.shrinkage / 2),
        )
        exclude = None if module.exclude is None else order.apply(module.exclude)
        weight, factors = order.apply(module.weight), (lower_out, lower_in)
        packed = round_two_sided(weight, factors, module.spec, self.mse, exclude, costs)
        return order.undo(packed)


@dataclass(frozen=True, slots=True)
class _Order:
    """In which rows [m], columns [n] and groups are laid out for rounding, which goes from the last to the
    first.

    The largest diagonals of H come last, columns within their groups and groups by their largest, as in
    GPTQ's group-aware order (arXiv 2505.14638); rows are free. Ours: the paper's order is that of the weight.
    """

    rows: Tensor
    cols: Tensor
    groups: Tensor

    @staticmethod
    def of(outputs: Tensor, inputs: Tensor, spec: QuantSpec) -> "_Order":
        """Groups that do not divide a row leave the columns as they are."""
        rows, diagonal = torch.argsort(outputs.diagonal(), stable=True), inputs.diagonal()
        size = len(diagonal) if spec.group_size == -1 else spec.group_size
        if len(diagonal) % size:
            return _Order(rows, torch.arange(len(diagonal)), torch.arange(spec.num_groups(len(diagonal))))
        within = diagonal.view(-1, size)
        groups = torch.argsort(within.amax(1), stable=True)
        cols = torch.argsort(within, dim=1, stable=True) + torch.arange(0, len(diagonal), size)[:, None]
        return _Order(rows, cols[groups].flatten(), groups)

    def apply(self, matrix: Tensor) -> Tensor:
        """[m, n] in this order."""
        return matrix[self.rows][:, self.cols]

    def rows_of(self, matrix: Tensor) -> Tensor:
        """[m, m] in this order."""
        return matrix[self.rows][:, self.rows]

    def cols_of(self, matrix: Tensor) -> Tensor:
        """[n, n] in this order."""
        return matrix[self.cols][:, self.cols]

    def undo(self, packed: PackedWeight) -> PackedWeight:
        """Back in the checkpoint's order."""
        rows, cols, groups = (torch.argsort(order) for order in (self.rows, self.cols, self.groups))
        outliers = packed.outliers
        if outliers is not None:
            residuals = torch.zeros(packed.values.shape)
            outliers.add_to(residuals)
            outliers = SparseOverlay.of(residuals[rows][:, cols])
        assert packed.scales is not None
        return replace(
            packed,
            values=packed.values[rows][:, cols].contiguous(),
            scales=packed.scales[rows][:, groups].contiguous(),
            zeros=None if packed.zeros is None else packed.zeros[rows][:, groups].contiguous(),
            outliers=outliers,
        )


def _unit_diagonal(matrix: Tensor) -> Tensor:
    """Scaled to a mean diagonal of 1; zeros, where nothing was seen, become the identity."""
    mean = float(matrix.diagonal().mean())
    return matrix / mean if mean > 0 else torch.eye(len(matrix))


def _shrunk_factors(matrix: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """L and D of (1 - share) ``matrix`` + share I, the share raised tenfold until it is positive definite."""
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    while (found := unit_lower(torch.lerp(matrix, eye, share))) is None:
        assert share < 1, "the identity is positive definite"
        share = min(1.0, 10 * share)
    return found


def recipe(options: QuantizeOptions) -> Recipe:
    """--method yaqa."""
    options.refuse_actorder("but its own, within groups and over the outputs")
    if options.transform not in (None, "none"):
        raise ConfigError(
            f"--transform {options.transform}: yaqa's sketch is of the weights as they are; use none, or gptq"
        )
    return Recipe(YAQA(options.shrinkage, mse=options.mse, seed=options.seed), None, options.true_sequential)
