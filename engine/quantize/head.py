"""The output head: left as it is, or rounded to nearest where ``--lm-head-bits`` says so; said either way."""

from dataclasses import replace

from ...kernels.layout import QuantSpec
from ..errors import ConfigError
from ..formats.awq import AWQFormat
from ..formats.base import Format
from ..formats.compressed_tensors import CompressedTensorsFormat, Group
from ..formats.gptq import GPTQFormat
from ..formats.overlay import OverlayFormat
from ..model.plan import LM_HEAD, Part, Slot, weight_plan
from .grid import StaysDenseError, round_nearest
from .options import DENSE_BITS, QuantizeOptions
from .results import QuantizedModule
from .source import Source
from .storage import general_spec, refused_shape


def head_spec(source: Source, options: QuantizeOptions) -> QuantSpec | None:
    """How the head is to be rounded; None: it stays as it is. ConfigError where it cannot be stored so."""
    if options.lm_head_bits is None:
        return None
    part = _head(source)[1]
    if part.name != LM_HEAD:
        raise ConfigError(
            f"--lm-head-bits {options.lm_head_bits}: this model's output head is its embedding, which "
            "checkpoints keep as floats; leave it out, and let nybble serve --lm-head-bits round it"
        )
    spec = replace(general_spec(options), num_bits=options.lm_head_bits, actorder="none")
    reason = "with --bits 16 nothing is rounded"
    if options.bits != DENSE_BITS:
        reason = refused_shape(part.out_features, part.in_features, spec, options) or ""
    if reason:
        raise ConfigError(f"--lm-head-bits {options.lm_head_bits}: {reason}; leave it out")
    return spec


def quantize_head(source: Source, spec: QuantSpec, mse: float) -> QuantizedModule:
    """The head, rounded to nearest. ConfigError where fp16 cannot hold its scales."""
    weight = source.read(*_head(source)).values.float()
    try:
        packed = round_nearest(weight, spec, mse)
    except StaysDenseError as error:
        raise ConfigError(f"--lm-head-bits {spec.num_bits}: {error}; leave it out") from error
    lost = (weight - packed.dequantize()).square().sum() / weight.square().sum().clamp(min=1e-30)
    return QuantizedModule(LM_HEAD, packed, float(lost))


def describe_head(source: Source, spec: QuantSpec | None) -> str:
    """What becomes of it, for people."""
    if spec is not None:
        return f"output head: rounded to nearest with {spec.num_bits} bits (--lm-head-bits)"
    part = _head(source)[1]
    info = source.files.tensors[f"{part.name}.weight"]
    tied = "" if part.name == LM_HEAD else ", which is the embedding"
    return f"output head: stays as it is{tied} ({info.dtype}, {info.nbytes / 1e6:.1f} MB)"


def with_head(storage: Format, spec: QuantSpec | None) -> Format:
    """``storage`` with the head's specification, which it can hold."""
    if spec is None:
        return storage
    if isinstance(storage, OverlayFormat):
        return replace(storage, base=with_head(storage.base, spec))
    if isinstance(storage, GPTQFormat):
        return storage.with_head(LM_HEAD, spec)
    if isinstance(storage, CompressedTensorsFormat):
        ignore = tuple(name for name in storage.ignore if name != LM_HEAD)
        return replace(storage, groups=(*storage.groups, Group((LM_HEAD,), spec)), ignore=ignore)
    assert isinstance(storage, AWQFormat)
    return replace(storage, lm_head=True)


def _head(source: Source) -> tuple[Slot, Part]:
    slot = next(slot for slot in weight_plan(source.config) if slot.name == LM_HEAD)
    return slot, slot.parts[0]
