"""Layers to round, and what rounding costs them."""

import numpy as np
import torch
from nybble.kernels.layout import PackedWeight
from torch import Tensor


def correlated(rows: int, cols: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [rows, cols] and the Hessian of inputs with a strong common part, float64."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(cols, cols)) * 0.3 + 2 * random.normal(size=(cols, 1)) @ np.ones((1, cols))
    inputs = random.normal(size=(4 * cols, cols)) @ mixing / np.sqrt(cols)
    weight = random.normal(size=(rows, cols))
    return torch.from_numpy(weight), torch.from_numpy(2 * inputs.T @ inputs / len(inputs))


def proxy_loss(weight: Tensor, packed: PackedWeight, hessian: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T)."""
    difference = weight.double() - packed.dequantize(torch.float64)
    return float(torch.trace(difference @ hessian.double() @ difference.T))
