"""How the checkpoint that a run makes is to be stored."""

import re
from collections.abc import Mapping
from typing import Any

from ...kernels.layout import QuantSpec
from ..formats.base import Format
from ..formats.dense import DenseFormat
from ..formats.gptq import GPTQFormat
from ..formats.overlay import OverlayFormat
from .options import DENSE_BITS, QuantizeOptions
from .results import Stage


def storage_for(
    options: QuantizeOptions, stage: Stage, dense: Mapping[str, str], meta: Mapping[str, Any]
) -> Format:
    """The format for what is in ``stage``. dense: modules that were not tried. meta: provenance."""
    if options.bits == DENSE_BITS:
        return DenseFormat()
    specs, residuals = stage.specs(), stage.residuals()
    dynamic: dict[str, dict[str, Any]] = {f"-:{re.escape(name)}$": {} for name in dense}
    for name, spec in specs.items():
        if spec is None:
            dynamic[f"-:{re.escape(name)}$"] = {}
        elif spec != options.spec:
            dynamic[f"+:{re.escape(name)}$"] = _differences(spec, options.spec)
    base = GPTQFormat(options.spec, options.storage, dynamic=dynamic, meta=meta)
    return OverlayFormat(base, residuals, {"method": options.method}) if residuals else base


def _differences(spec: QuantSpec, base: QuantSpec) -> dict[str, Any]:
    """GPTQModel's names of what ``spec`` has otherwise."""
    found: dict[str, Any] = {}
    if spec.num_bits != base.num_bits:
        found["bits"] = spec.num_bits
    if spec.group_size != base.group_size:
        found["group_size"] = spec.group_size
    if spec.symmetric != base.symmetric:
        found["sym"] = spec.symmetric
    assert spec.actorder == base.actorder
    return found
