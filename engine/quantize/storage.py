"""How the checkpoint that a run makes is to be stored."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ...kernels.layout import QuantSpec
from ..errors import ConfigError
from ..formats.awq import AWQFormat
from ..formats.base import Format
from ..formats.compressed_tensors import CompressedTensorsFormat, Group
from ..formats.gptq import GPTQFormat
from ..formats.overlay import OverlayFormat
from ..model.plan import Part, Slot
from .options import DENSE_BITS, QuantizeOptions
from .results import Stage

_CLASS = "Linear"  # compressed-tensors' name for every linear; the output head is one, and stays as it is


def general_spec(options: QuantizeOptions) -> QuantSpec:
    """How each module is to be quantized that ``dynamic`` does not name."""
    free = options.actorder == "group" and not options.static_groups
    # v1 stores each zero point minus one, and readers disagree about 0 (engine/formats/gptq.py).
    least_zero = 1 if options.storage == "gptq" else 0
    return QuantSpec(
        options.bits, options.group_size, options.symmetric, "group" if free else "none", least_zero
    )


def refused_shape(out: int, in_: int, spec: QuantSpec, options: QuantizeOptions) -> str | None:
    """Why a module [out, in_] cannot be stored as asked, or None."""
    if options.bits == DENSE_BITS:
        return f"{in_} inputs are not whole fours" if in_ % 4 else None
    return _plain(options).expressible(out, in_, spec)


def refuse_unlike(options: QuantizeOptions, specs: Mapping[str, QuantSpec]) -> None:
    """ConfigError where modules are to differ in what the format says once for all."""
    for name, spec in specs.items() if options.storage == "awq" else ():
        if spec != general_spec(options):
            raise ConfigError(f"--checkpoint-format awq: {name} is {spec}, but all must be alike; use gptq")


def describe_zeros(options: QuantizeOptions, specs: Iterable[QuantSpec]) -> str | None:
    """What the format costs asymmetric weights, for people; None: nothing. specs: the head's too."""
    if options.storage != "gptq" or all(spec.symmetric for spec in specs):
        return None
    return (
        "checkpoint format gptq (v1) has no zero point of 0 that all engines read alike: groups that would "
        "have it get coarser steps; gptq_v2 has none of this"
    )


def describe_groups(parts: Iterable[tuple[Slot, Part]], specs: Mapping[str, QuantSpec]) -> str | None:
    """Which groups are longer than the rows they are cut from, for people; None: none."""
    found = [
        (part, specs[part.name].group_size)
        for _, part in parts
        if part.name in specs and specs[part.name].group_size > part.in_features
    ]
    if not found:
        return None
    part, size = found[0]
    return (
        f"groups of {size} are longer than rows of {part.in_features} inputs, which are one group each then "
        f"({len(found)} modules, as {part.name})"
    )


def storage_for(
    options: QuantizeOptions, stage: Stage, dense: Mapping[str, str], meta: Mapping[str, Any]
) -> Format:
    """The format for what is in ``stage``. dense: modules that were not tried. meta: provenance."""
    specs = stage.specs()
    others = [*dense, *(name for name, spec in specs.items() if spec is None and options.bits != DENSE_BITS)]
    base = _plain(options)
    differing = {
        name: spec for name, spec in specs.items() if spec is not None and spec != general_spec(options)
    }
    if isinstance(base, GPTQFormat):
        base = _gptq(base, others, differing, meta)
    elif isinstance(base, CompressedTensorsFormat):
        base = _compressed_tensors(options, others, differing, meta)
    else:
        assert not differing  # ``refuse_unlike``
        base = AWQFormat(base.base, tuple(others), meta=meta)
    residuals = stage.residuals()
    return OverlayFormat(base, residuals, {"method": options.method}) if residuals else base


def _plain(options: QuantizeOptions) -> GPTQFormat | AWQFormat | CompressedTensorsFormat:
    if options.storage == "gptq" or options.storage == "gptq_v2":
        return GPTQFormat(general_spec(options), options.storage)
    if options.storage == "awq":
        return AWQFormat(QuantSpec(options.bits, options.group_size, symmetric=False))
    return CompressedTensorsFormat((Group((_CLASS,), general_spec(options)),))


def _gptq(
    base: GPTQFormat,
    others: list[str],
    differing: Mapping[str, QuantSpec],
    meta: Mapping[str, Any],
) -> GPTQFormat:
    dynamic: dict[str, dict[str, Any]] = {f"-:{re.escape(name)}$": {} for name in others}
    names = {"num_bits": "bits", "group_size": "group_size", "symmetric": "sym"}
    for module, spec in differing.items():
        assert spec.actorder == base.base.actorder
        dynamic[f"+:{re.escape(module)}$"] = {
            key: getattr(spec, field)
            for field, key in names.items()
            if getattr(spec, field) != getattr(base.base, field)
        }
    return replace(base, dynamic=dynamic, meta=meta)


def _compressed_tensors(
    options: QuantizeOptions,
    others: list[str],
    differing: Mapping[str, QuantSpec],
    meta: Mapping[str, Any],
) -> CompressedTensorsFormat:
    ignore = ("lm_head", *others)
    if options.bits == DENSE_BITS:
        return CompressedTensorsFormat(ignore=ignore, bitmask=(_CLASS,), sparsity="2:4")
    by_spec: dict[QuantSpec, list[str]] = {}
    for name, spec in differing.items():
        by_spec.setdefault(spec, []).append(name)
    groups = [
        Group((_CLASS,), general_spec(options)),
        *(Group(tuple(n), spec) for spec, n in by_spec.items()),
    ]
    sparsity = meta.get("sparsity")
    return CompressedTensorsFormat(tuple(groups), ignore, sparsity=sparsity)
