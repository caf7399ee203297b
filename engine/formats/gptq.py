"""The GPTQ family as AutoGPTQ and GPTQModel write it: checkpoint_format "gptq" (v1) and "gptq_v2".

A module NAME with K inputs, N outputs, b bits and G = ceil(K / group_size) groups (1 for group_size -1):
  NAME.qweight  int32 [K*b/32, N]: codes packed along the inputs, least significant bits first
  NAME.qzeros   int32 [G, N*b/32]: zero points packed along the outputs; v1 stores each minus one
  NAME.scales   fp16 (bf16, fp32) [G, N]
  NAME.g_idx    int32 [K]: the group of each input; left out by some writers where it is arange // group_size
  NAME.bias     [N], optional
Weight[n, k] = scales[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n]).

The minus one of v1 was subtracted from whole int32 words (2, 4 and 8 bits), so it is added back to whole
words: a zero point of 0 borrowed from its neighbour, and only this undoes it. 3-bit fields straddle words
and wrap one by one. Kernels that read v1 field by field (AutoGPTQ's, exllama's) see something else there, so
v1 is written without zero points of 0 (``QuantSpec.least_zero``). Source: GPTQModel 7 (utils/model.py,
nn_modules/qlinear), whose arithmetic tests check.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ...kernels.layout import PackedWeight, QuantSpec
from ..errors import CheckpointError, UnsupportedModelError
from .base import FLOATS, Expected
from .dense import DenseFormat
from .fields import compiled, flag, group_size, refuse_foreign
from .packing import pack, unpack

Version = Literal["gptq", "gptq_v2"]
BITS = (2, 3, 4, 8)
_WORD_OF_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
# Keys whose other values change the stored form or the result: key -> values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "pack_dtype": (None, "int32"),
    "is_marlin_format": (None, False),
    "adapter": (None, {}),
    "rotation": (None, ""),
}


@dataclass(frozen=True)
class GPTQFormat:
    """Quant method "gptq".

    ``dynamic``: ordered patterns, matched at the start of a module's name; the first that matches decides.
    With the prefix "-:" it leaves the module dense; with "+:" or none it overrides keys of the specification.
    ``listed``: only modules that end with one of these names are quantized; None: all.
    """

    base: QuantSpec
    version: Version = "gptq"
    lm_head: bool = False
    dynamic: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    listed: tuple[str, ...] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    quant_method = "gptq"
    extra_files = ()

    @property
    def default_spec(self) -> QuantSpec | None:
        """What modules have that no pattern names."""
        return self.base

    @property
    def sparsity(self) -> str | None:
        """What ``meta`` says: int4 weights with 2:4 sparsity are an ordinary symmetric checkpoint."""
        return self.meta.get("sparsity")

    @classmethod
    def from_config(cls, quantize_config: Mapping[str, Any] | None) -> "GPTQFormat":
        """From quantize_config.json or config.json's quantization_config, AutoGPTQ's old keys tolerated."""
        config = quantize_config or {}
        version: Any = config.get("checkpoint_format") or config.get("format") or "gptq"
        if version not in ("gptq", "gptq_v2"):
            raise UnsupportedModelError(
                f"quantization_config: checkpoint_format {version!r} is not supported; convert the "
                "checkpoint to gptq or gptq_v2 with GPTQModel, or quantize the original with nybble quantize"
            )
        refuse_foreign(config, _NEUTRAL, "quantization_config")
        dynamic = config.get("dynamic") or {}
        if not isinstance(dynamic, dict) or not all(isinstance(v, dict) for v in dynamic.values()):
            raise CheckpointError("quantization_config: dynamic must map patterns to objects")
        for pattern, override in dynamic.items():
            compiled([_bare(pattern)], "quantization_config: dynamic")
            refuse_foreign(override, _NEUTRAL, f"quantization_config: dynamic {pattern[:100]!r}")
        base = _spec(config, QuantSpec(4, 128, True), "quantization_config", bits_required=True)
        found = cls(
            base,
            version,
            flag(config, "lm_head", False, "quantization_config"),
            dynamic,
            _listed(config),
            config.get("meta") or {},
        )
        for pattern, override in dynamic.items():
            _spec(override, base, f"quantization_config: dynamic {pattern[:100]!r}")
        return found

    def spec(self, module: str) -> QuantSpec | None:
        """The base specification with the first matching pattern's overrides; None: stored dense."""
        if module.rpartition(".")[2] == "lm_head" and not self.lm_head:
            return None
        if self.listed is not None and not module.endswith(self.listed):
            return None
        for pattern, override in self.dynamic.items():
            if re.match(_bare(pattern), module):
                return (
                    None if pattern.startswith("-:") else _spec(override, self.base, f"dynamic {pattern!r}")
                )
        return self.base

    def expressible(self, out: int, in_: int, spec: QuantSpec) -> str | None:
        """Why readers of this family could not hold a module of this shape; None if they can."""
        if spec.num_bits not in BITS:
            return f"{spec.num_bits} bits: the format has {', '.join(map(str, BITS))}"
        if in_ % 32:
            return f"{in_} inputs are not a multiple of 32"
        if out * spec.num_bits % 32:
            return f"{out} outputs of {spec.num_bits} bits do not fill 32-bit words"
        return None

    def tensors(self, module: str, out: int, in_: int, bias: bool) -> dict[str, Expected]:
        """qweight, qzeros, scales; g_idx, needed for act-order; the bias, which old files add unasked."""
        spec = self.spec(module)
        if spec is None:
            return DenseFormat().tensors(module, out, in_, bias)
        bits = spec.num_bits
        if in_ * bits % 32 or out * bits % 32:
            raise CheckpointError(
                f"{module}: {bits}-bit codes of a [{out}, {in_}] weight do not fill 32-bit words, so it "
                "cannot be quantized in this format; exclude it in the checkpoint's dynamic with '-:'"
            )
        groups = spec.num_groups(in_)
        return {
            f"{module}.qweight": Expected(("I32",), (in_ * bits // 32, out)),
            f"{module}.qzeros": Expected(("I32",), (groups, out * bits // 32)),
            f"{module}.scales": Expected(FLOATS, (groups, out)),
            f"{module}.g_idx": Expected(("I32",), (in_,), required=spec.actorder == "group"),
            f"{module}.bias": Expected(FLOATS, (out,), required=bias),
        }

    def read(self, tensors: Mapping[str, Tensor], module: str) -> PackedWeight:
        """The codes in the checkpoint's order of inputs; ``zeros`` and ``g_idx`` are None where trivial."""
        spec = self.spec(module)
        if spec is None:
            return DenseFormat().read(tensors, module)
        qweight, scales = tensors[f"{module}.qweight"], tensors[f"{module}.scales"]
        bits, out = spec.num_bits, qweight.shape[1]
        in_ = qweight.shape[0] * 32 // bits
        zeros: Tensor | None = self._read_zeros(tensors[f"{module}.qzeros"], bits, out).T.contiguous()
        if bool((zeros == 2 ** (bits - 1)).all()):
            zeros = None
        g_idx = self._read_g_idx(tensors.get(f"{module}.g_idx"), spec, in_, module)
        bias = tensors.get(f"{module}.bias")
        if bias is not None and not bool(bias.any()):
            bias = None  # AutoGPTQ wrote zeros for every module without one
        return PackedWeight(
            unpack(qweight.T.contiguous(), bits, in_),
            replace(spec, symmetric=zeros is None, actorder="none" if g_idx is None else "group"),
            scales.T.contiguous(),
            zeros,
            g_idx,
            bias,
        )

    def _read_zeros(self, words: Tensor, bits: int, out: int) -> Tensor:
        if self.version == "gptq_v2":
            return unpack(words, bits, out)
        if bits == 3:
            return (unpack(words, bits, out) + 1) & 7
        return unpack(words + _WORD_OF_ONES[bits], bits, out)

    def _read_g_idx(self, g_idx: Tensor | None, spec: QuantSpec, in_: int, module: str) -> Tensor | None:
        if g_idx is None:
            return None
        groups = spec.num_groups(in_)
        if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
            raise CheckpointError(
                f"{module}.g_idx: groups {int(g_idx.min())} to {int(g_idx.max())}, but there are {groups}"
            )
        size = in_ if spec.group_size == -1 else spec.group_size
        return None if torch.equal(g_idx, torch.arange(in_, dtype=torch.int32) // size) else g_idx

    def write(self, module: str, weight: PackedWeight) -> dict[str, Tensor]:
        """The tensors of ``tensors()``, g_idx always among them."""
        spec = self.spec(module)
        if spec is None:
            return DenseFormat().write(module, weight)
        self._check_writable(module, weight, spec)
        assert weight.scales is not None
        bits, groups = spec.num_bits, spec.num_groups(weight.in_features)
        mid = torch.full((weight.out_features, groups), 2 ** (bits - 1), dtype=torch.uint8)
        zeros = mid if weight.zeros is None else weight.zeros.to(torch.uint8)
        if self.version == "gptq":
            zeros = (zeros - 1) & (2**bits - 1)
        scales = weight.scales if weight.scales.dtype == torch.bfloat16 else weight.scales.to(torch.float16)
        found = {
            f"{module}.qweight": pack(weight.values, bits).T.contiguous(),
            f"{module}.qzeros": pack(zeros.T.contiguous(), bits),
            f"{module}.scales": scales.T.contiguous(),
            f"{module}.g_idx": weight.group_of_inputs().to(torch.int32),
        }
        if weight.bias is not None:
            found[f"{module}.bias"] = weight.bias
        return found

    def _check_writable(self, module: str, weight: PackedWeight, spec: QuantSpec) -> None:
        have = weight.spec
        if have is None:
            raise ValueError(
                f"{module}: dense, but the configuration says {spec}; exclude it in dynamic ('-:')"
            )
        if (have.num_bits, have.group_size) != (spec.num_bits, spec.group_size):
            raise ValueError(f"{module}: quantized as {have}, but the configuration says {spec}")
        reason = self.expressible(weight.out_features, weight.in_features, spec)
        if reason is not None:
            raise ValueError(f"{module}: {reason}; leave it dense")
        if weight.outliers is not None:
            raise ValueError(f"{module}: has residuals, which need an overlay's file")
        if weight.g_idx is not None and spec.actorder == "none":
            raise ValueError(f"{module}: has a g_idx, but the configuration says desc_act false")
        zeros, scales = weight.zeros, weight.scales
        assert scales is not None
        if zeros is not None:
            if zeros.is_floating_point() and not torch.equal(zeros, zeros.round()):
                raise ValueError(
                    f"{module}: zero points that are not integers cannot be stored in this format"
                )
            if spec.symmetric and bool((zeros != 2 ** (spec.num_bits - 1)).any()):
                raise ValueError(f"{module}: asymmetric, but the configuration says sym true")
            if self.version == "gptq" and bool((zeros == 0).any()):
                raise ValueError(
                    f"{module}: a zero point of 0 is ambiguous in checkpoint format gptq (v1); use gptq_v2"
                )
        if scales.dtype == torch.float32 and not torch.equal(scales.half().float(), scales):
            raise ValueError(f"{module}: scales are not fp16 values; round them before the codes are made")

    def with_head(self, name: str, spec: QuantSpec) -> "GPTQFormat":
        """The same with the output head quantized too."""
        differs: dict[str, Any] = {} if spec.num_bits == self.base.num_bits else {"bits": spec.num_bits}
        if self.base.actorder != spec.actorder:
            differs["desc_act"] = spec.actorder == "group"
        return replace(self, lm_head=True, dynamic={f"+:{re.escape(name)}$": differs, **self.dynamic})

    def config_entries(self) -> dict[str, Any]:
        """quantization_config."""
        return {"quantization_config": self.config_block()}

    def config_block(self) -> dict[str, Any]:
        """quantization_config with GPTQModel's keys."""
        block: dict[str, Any] = {
            "bits": self.base.num_bits,
            "group_size": self.base.group_size,
            "desc_act": self.base.actorder == "group",
            "sym": self.base.symmetric,
            "lm_head": self.lm_head,
            "quant_method": "gptq",
            "checkpoint_format": self.version,
            "pack_dtype": "int32",
            "meta": dict(self.meta),
        }
        if self.dynamic:
            block["dynamic"] = {pattern: dict(override) for pattern, override in self.dynamic.items()}
        if self.listed is not None:
            block["modules_in_block_to_quantize"] = [[name.removeprefix(".") for name in self.listed]]
        return block


def _bare(pattern: str) -> str:
    return pattern[2:] if pattern.startswith(("-:", "+:")) else pattern


def _spec(
    config: Mapping[str, Any], base: QuantSpec, where: str, *, bits_required: bool = False
) -> QuantSpec:
    bits = config.get("bits", None if bits_required else base.num_bits)
    if isinstance(bits, bool) or bits not in BITS:
        hint = " (5, 6 and 7 bits are GPTQModel's planar gptq_p)" if bits in (5, 6, 7) else ""
        raise UnsupportedModelError(f"{where}: bits {bits!r} is not supported{hint}; use 2, 3, 4 or 8")
    size = group_size(config.get("group_size", base.group_size), where)
    actorder = flag(config, "desc_act", base.actorder == "group", where)
    return QuantSpec(
        int(bits), size, flag(config, "sym", base.symmetric, where), "group" if actorder else "none"
    )


def _listed(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """transformers' modules_in_block_to_quantize: lists of the names quantized in a block."""
    groups = config.get("modules_in_block_to_quantize")
    if groups is None:
        return None
    if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        raise CheckpointError("quantization_config: modules_in_block_to_quantize must be a list of lists")
    return tuple(f".{name}" for group in groups for name in group)
